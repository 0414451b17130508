// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestCut: what a new policy forbids ends, in both directions of talk, and nothing else does.
func TestCut(t *testing.T) {
	b := newBed(t)
	server := b.pod("a", "server", nil, "10.42.0.2", "fd00:42::2")
	client := b.pod("a", "client", tags{"app": "client"}, "10.42.0.3", "fd00:42::3")
	stranger := b.pod("b", "stranger", nil, "10.42.0.4", "fd00:42::4")
	b.nft(`
add table ip services
add chain ip services prerouting { type nat hook prerouting priority -100 ; }
add rule ip services prerouting ip daddr 10.43.0.20 dnat to 10.42.0.2`)
	t.Cleanup(func() { b.nft("delete table ip services") })
	live := []net.Conn{
		b.hold(client, "10.42.0.2"), b.hold(client, "fd00:42::2"), b.hold(client, "10.43.0.20"), b.hold(server, "10.42.0.4"), b.hold(server, "fd00:42::4"),
	}
	dead := []net.Conn{b.hold(stranger, "10.42.0.2"), b.hold(stranger, "fd00:42::2"), b.hold(stranger, "10.43.0.20")}
	udp, err := stranger.dial("udp", addr("10.42.0.2"), 8080, testTimeout)
	must(t, err)
	t.Cleanup(func() { udp.Close() })
	dead = append(dead, udp)
	pusher := b.push(server, stranger, "10.42.0.2")

	b.policy("a", "allow", `{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]}`)
	eventually(t, "a connection in which the server talks", pusher)
	for i, conn := range dead {
		if ping(conn, 2*quick) == nil {
			t.Errorf("connection %d is still alive", i)
		}
	}
	for i, conn := range live {
		if err := ping(conn, testTimeout); err != nil {
			t.Errorf("connection %d was cut: %v", i, err)
		}
	}

	// A peer that stops to be one.
	p, err := b.api.CoreV1().Pods("a").Get(context.Background(), "client", metav1.GetOptions{})
	must(t, err)
	p.Labels = nil
	_, err = b.api.CoreV1().Pods("a").Update(context.Background(), p, metav1.UpdateOptions{})
	must(t, err)
	b.settle()
	for i, conn := range live {
		if err := ping(conn, 2*quick); (err == nil) != (i > 2) {
			t.Errorf("connection %d: %v", i, err)
		}
	}
}

// TestCutLateAnswer: an answer that comes after its connection was cut does not bring it back, though the client goes on sending without
// waiting for answers, and the server takes longer for one than the client for the next packet.
func TestCutLateAnswer(t *testing.T) {
	b := newBed(t)
	server := b.pod("a", "server", nil, "10.42.0.2")
	stranger := b.pod("b", "stranger", nil, "10.42.0.4")
	must(t, server.Do(func() error {
		conn, err := net.ListenPacket("udp", ":9001")
		if err != nil {
			return err
		}
		t.Cleanup(func() { conn.Close() })
		go func() {
			packet := make([]byte, 1)
			for {
				_, from, err := conn.ReadFrom(packet)
				if err != nil {
					return
				}
				time.AfterFunc(500*time.Millisecond, func() { _, _ = conn.WriteTo(packet, from) })
			}
		}()
		return nil
	}))
	const clients, interval = 20, 100 * time.Millisecond
	var answered [clients]atomic.Int64
	for i := range clients {
		var conn net.Conn
		must(t, stranger.Do(func() (err error) {
			conn, err = net.Dial("udp", "10.42.0.2:9001")
			return err
		}))
		t.Cleanup(func() { conn.Close() })
		go func() {
			for packet := make([]byte, 1); ; {
				if _, err := conn.Read(packet); errors.Is(err, net.ErrClosed) {
					return
				} else if err == nil {
					answered[i].Store(time.Now().UnixNano())
				}
			}
		}()
		go func() {
			time.Sleep(interval * time.Duration(i) / clients)
			for {
				if _, err := conn.Write([]byte("x")); errors.Is(err, net.ErrClosed) {
					return
				}
				time.Sleep(interval)
			}
		}()
	}
	silent := func(which bool) func() error {
		return func() error {
			for i := range clients {
				if s := time.Since(time.Unix(0, answered[i].Load())); (s > quick) != which {
					return fmt.Errorf("connection %d is silent for %s", i, s)
				}
			}
			return nil
		}
	}
	eventually(t, "answers", silent(false))
	b.policy("a", "deny", `{podSelector: {}}`)
	eventually(t, "no answers", silent(true))
}

// ended waits until nothing passes on a connection any more.
func ended(t *testing.T, conn net.Conn) {
	t.Helper()
	eventually(t, "a connection that is to be cut", func() error {
		if ping(conn, 2*quick) == nil {
			return errors.New("it lives on")
		}
		return nil
	})
}

// push is a connection on which only the side that accepted it sends. The function fails for as long as something arrives.
func (b *bed) push(server, client *space, to string) func() error {
	b.t.Helper()
	var last atomic.Int64
	must(b.t, server.Do(func() error {
		l, err := net.Listen("tcp", ":9000")
		if err != nil {
			return err
		}
		b.t.Cleanup(func() { l.Close() })
		go func() {
			conn, err := l.Accept()
			for err == nil {
				_, err = conn.Write([]byte("x"))
				time.Sleep(5 * time.Millisecond)
			}
		}()
		return nil
	}))
	var conn net.Conn
	must(b.t, client.Do(func() (err error) {
		conn, err = net.Dial("tcp", to+":9000")
		return err
	}))
	b.t.Cleanup(func() { conn.Close() })
	go func() {
		for b := make([]byte, 1); ; last.Store(time.Now().UnixNano()) {
			if _, err := conn.Read(b); err != nil {
				return
			}
		}
	}()
	return func() error {
		if silent := time.Since(time.Unix(0, last.Load())); silent < quick {
			return fmt.Errorf("silent for %s only", silent)
		}
		return nil
	}
}

// traffic dials again and again, until stop; it counts what passed and what did not.
func traffic(from *space, to string, timeout time.Duration) (stop func() (passed, failed int)) {
	var passed, failed int
	var wg sync.WaitGroup
	end := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-end:
				return
			default:
			}
			if from.try("tcp", addr(to), 8080, timeout) == nil {
				passed++
			} else {
				failed++
			}
			time.Sleep(5 * time.Millisecond) // leave something of the machine to the others
		}
	})
	return func() (int, int) { close(end); wg.Wait(); return passed, failed }
}
