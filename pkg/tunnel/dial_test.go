// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
)

// answers makes a way that takes so long and then has a connection or an error.
func answers(name string, after time.Duration, err error) way {
	return way{name, func(ctx context.Context) (net.Conn, error) {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(after):
		}
		if err != nil {
			return nil, err
		}
		conn, _ := net.Pipe()
		return conn, nil
	}}
}

func TestRace(t *testing.T) {
	refused := &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	const never = time.Hour
	for name, test := range map[string]struct {
		ways []way
		won  string
		took time.Duration
		text string
	}{
		"the first is quick":               {ways: []way{answers("a", time.Millisecond, nil), answers("b", 0, nil)}, won: "a", took: time.Millisecond},
		"the first is slow":                {ways: []way{answers("a", 3*time.Second, nil), answers("b", time.Millisecond, nil)}, won: "b", took: headStart + time.Millisecond},
		"the second is slower still":       {ways: []way{answers("a", 3*time.Second, nil), answers("b", 5*time.Second, nil)}, won: "a", took: 3 * time.Second},
		"the first fails":                  {ways: []way{answers("a", time.Millisecond, refused), answers("b", time.Millisecond, nil)}, won: "b", took: 2 * time.Millisecond},
		"the second fails beside":          {ways: []way{answers("a", 3*time.Second, nil), answers("b", time.Millisecond, refused)}, won: "a", took: 3 * time.Second},
		"both fail":                        {ways: []way{answers("a", time.Millisecond, refused), answers("b", time.Millisecond, errNoTunnel)}, took: 2 * time.Millisecond, text: "a: connection refused; b: none is open"},
		"nobody answers":                   {ways: []way{answers("a", never, nil), answers("b", never, nil)}, took: dialTimeout, text: "a: no answer within 10s; b: no answer within 9s"},
		"only one, and it does not answer": {ways: []way{answers("a", never, nil)}, took: dialTimeout, text: "a: no answer within 10s"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), dialTimeout)
				defer cancel()
				began := time.Now()
				conn, won, failures := race(ctx, test.ways)
				if took := time.Since(began); took != test.took {
					t.Errorf("took %s, want %s", took, test.took)
				}
				switch {
				case failures != nil:
					err := &dialError{target: target{node: "m2", direct: "10.0.0.2:1"}, failures: failures}
					if test.won != "" || test.text == "" || !strings.Contains(err.Error(), test.text) {
						t.Error(err)
					}
				case test.ways[won].name != test.won || conn == nil:
					t.Errorf("%s won, %v", test.ways[won].name, conn)
				}
			})
		})
	}
}

// TestChoice: direct or tunnel, as the direct way's behaviour and the mode have it.
func TestChoice(t *testing.T) {
	refused := func(context.Context, string, string) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	}
	b := newBed(t)
	works := b.server.direct
	b.addNode("m2", "127.1.2.0/24", internal("127.0.0.2"), corev1.NodeAddress{Type: corev1.NodeHostName, Address: "m2.lan"})
	addr := listen(t, "127.0.0.2:0", echo)
	pod := listen(t, "127.1.2.7:0", echo)
	_, port, _ := net.SplitHostPort(addr)
	b.join("m2")
	b.open("m2")
	for _, test := range []struct {
		name   string
		mode   Mode
		direct func(context.Context, string, string) (net.Conn, error)
		addr   string
		tunnel bool
		slow   bool
	}{
		{"direct works", Auto, works, addr, false, false},
		{"direct works, pod", Auto, works, pod, false, false},
		{"by name", Auto, works, "m2:" + port, false, false},
		{"by host name", Auto, works, "M2.lan:" + port, false, false},
		{"direct is refused", Auto, refused, addr, true, false},
		{"direct hangs", Auto, blackHole, addr, true, true},
		{"direct hangs, pod", Auto, blackHole, pod, true, true},
		{"direct hangs, by name", Auto, blackHole, "m2:" + port, true, true},
		{"tunnel only", Always, works, addr, true, false},
		{"tunnel only, by name", Always, works, "m2:" + port, true, false},
		{"direct only", Direct, works, addr, false, false},
		{"direct only, by name", Direct, works, "m2:" + port, false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			b.server.cfg.Mode, b.server.direct = test.mode, test.direct
			clear(b.server.avoid)
			began := time.Now()
			conn, err := b.server.Dial(t.Context(), "tcp", test.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			exchange(t, conn, "x")
			_, tunnel := streamOf(conn)
			if tunnel != test.tunnel {
				t.Errorf("by tunnel: %v", tunnel)
			}
			if slow := time.Since(began) >= headStart; slow != test.slow {
				t.Errorf("took %s", time.Since(began))
			}
			if !test.slow {
				return
			}
			// The next one does not wait again.
			began = time.Now()
			again, err := b.server.Dial(t.Context(), "tcp", test.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer again.Close()
			if took := time.Since(began); took > headStart/2 {
				t.Errorf("the second took %s", took)
			}
		})
	}
}

func streamOf(c net.Conn) (*conn, bool) { s, ok := c.(*conn); return s, ok }

// TestAvoid: the direct way is the first one again after a minute, and when it was the one that worked.
func TestAvoid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := testServer()
		a, b := path{node: "m2"}, path{node: "m2", pod: true}
		s.setAvoid(a, time.Now().Add(avoidFor))
		if !s.avoided(a) || s.avoided(b) {
			t.Error("a node and its pods are two paths")
		}
		time.Sleep(avoidFor)
		if s.avoided(a) {
			t.Error("still avoided")
		}
		s.setAvoid(b, time.Now().Add(avoidFor))
		if len(s.avoid) != 1 {
			t.Errorf("kept %v", s.avoid)
		}
		s.setAvoid(b, time.Time{})
		if s.avoided(b) {
			t.Error("still avoided")
		}
	})
}

func testServer() *Server {
	return NewServer(ServerConfig{Nodes: listers.NewNodeLister(cache.NewIndexer(cache.MetaNamespaceKeyFunc, nil)), Log: (&logs{}).logger()})
}

// TestTunnelFails: the direct way is still there when a tunnel that was preferred breaks.
func TestTunnelFails(t *testing.T) {
	b := newBed(t)
	b.addNode("m2", "", internal("127.0.0.2"))
	_, stop := b.join("m2")
	b.open("m2")
	addr := listen(t, "127.0.0.2:0", echo)
	b.server.setAvoid(path{node: "m2"}, time.Now().Add(time.Hour))
	if _, ok := streamOf(b.dial(addr)); !ok {
		t.Error("not by the tunnel")
	}
	stop()
	b.open()
	conn := b.dial(addr)
	if _, ok := streamOf(conn); ok {
		t.Error("by the tunnel that is gone")
	}
	if b.server.avoided(path{node: "m2"}) {
		t.Error("the direct way works and is still avoided")
	}
}

// TestPodThroughOthers: a pod of a node without a tunnel is reached through any other node of the cluster, a kubelet is not.
func TestPodThroughOthers(t *testing.T) {
	b := newBed(t, noDirect)
	b.addNode("m2", "127.1.2.0/24", internal("127.0.0.2"))
	b.addNode("m3", "127.1.3.0/24", internal("127.0.0.3"))
	b.join("m3")
	b.open("m3")
	exchange(t, b.dial(listen(t, "127.1.2.9:0", echo)), "x")
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	if _, err := b.server.Dial(ctx, "tcp", "127.0.0.2:10250"); err == nil || !strings.Contains(err.Error(), "tunnel: none is open from the node") {
		t.Error(err)
	}
	// A node that is no longer one is not trusted with others' traffic.
	_ = b.nodes.Delete(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "m3"}})
	ctx, cancel = context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	if _, err := b.server.Dial(ctx, "tcp", "127.1.2.9:80"); err == nil || !strings.Contains(err.Error(), "none is open") {
		t.Error(err)
	}
}

// TestTunnelComesLate: after the start of an API server, its nodes need a moment.
func TestTunnelComesLate(t *testing.T) {
	b := newBed(t, noDirect)
	b.addNode("m2", "", internal("127.0.0.2"))
	addr := listen(t, "127.0.0.2:0", echo)
	started := make(chan struct{})
	go func() {
		<-started
		time.Sleep(headStart + 200*time.Millisecond)
		b.join("m2")
	}()
	close(started)
	exchange(t, b.dial(addr), "x")
}

func TestDialErrors(t *testing.T) {
	b := newBed(t)
	b.addNode("m2", "127.1.2.0/24", internal("127.0.0.2"))
	b.addNode("m4", "", internal("127.0.0.4"))
	b.join("m2")
	b.open("m2")
	closed := func(ip string) string {
		l, err := net.Listen("tcp", ip+":0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Addr().String()
	}
	node, pod, none := closed("127.0.0.2"), closed("127.1.2.3"), closed("127.0.0.4")
	works := b.server.direct
	for _, test := range []struct {
		addr   string
		direct func(context.Context, string, string) (net.Conn, error)
		want   string
		is     error
	}{
		{node, works, "node m2 (" + node + "): direct: connection refused; tunnel: the node answers: connection refused", syscall.ECONNREFUSED},
		{pod, works, "pod " + pod + " on node m2: direct: connection refused; tunnel: the node answers: connection refused", syscall.ECONNREFUSED},
		{"127.0.0.2:22", blackHole, "node m2 (127.0.0.2:22): direct: no answer within 1.5s; tunnel: the node answers: 127.0.0.2:22 is neither this node's kubelet nor a pod: not allowed", context.DeadlineExceeded},
		{none, works, "node m4 (" + none + "): direct: connection refused; tunnel: none is open from the node: is its kedge agent running?", errNoTunnel},
		{none, blackHole, "node m4 (" + none + "): direct: no answer within 1.5s; tunnel: none is open from the node: is its kedge agent running?", context.DeadlineExceeded},
		{"127.0.0.9:1", works, "dial tcp 127.0.0.9:1: connect: connection refused", syscall.ECONNREFUSED},
		{"nonsense", works, "missing port in address", nil},
	} {
		b.server.direct = test.direct
		clear(b.server.avoid)
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		_, err := b.server.Dial(ctx, "tcp", test.addr)
		cancel()
		if err == nil || !strings.Contains(err.Error(), test.want) || test.is != nil && !errors.Is(err, test.is) {
			t.Errorf("%s: %v\nwant %s", test.addr, err, test.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	b.server.direct = blackHole
	if _, err := b.server.Dial(ctx, "tcp", none); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
}

// TestRequests: what a node answers to requests that its API server does not make.
func TestRequests(t *testing.T) {
	b := newBed(t)
	b.join("m2")
	b.open("m2")
	for addr, want := range map[string]string{
		"m2:10250":       "a tunnel dials addresses with a port",
		"127.0.0.1:0x1":  "a tunnel dials addresses with a port",
		"8.8.8.8:53":     "not allowed",
		"[fe80::1%lo]:1": "not allowed",
	} {
		_, err := b.session("m2").dial(t.Context(), addr)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", addr, err)
		}
	}
}

func TestLocate(t *testing.T) {
	b := newBed(t)
	external := corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: "203.0.113.7"}
	b.addNode("m1", "10.42.0.0/24", internal("10.0.0.1"), internal("fd00::1"))
	b.addNode("m2", "10.42.1.0/24", internal("192.168.1.5"), external)
	b.addNode("m3", "10.42.2.0/24", internal("192.168.1.5"))
	b.addNode("bare", "", corev1.NodeAddress{Type: corev1.NodeHostName, Address: "bare"})
	for addr, want := range map[string]target{
		"10.0.0.1:10250":          {node: "m1", direct: "10.0.0.1:10250", inside: "10.0.0.1:10250"},
		"[fd00::1]:10250":         {node: "m1", direct: "[fd00::1]:10250", inside: "[fd00::1]:10250"},
		"[::ffff:10.0.0.1]:10250": {node: "m1", direct: "[::ffff:10.0.0.1]:10250", inside: "10.0.0.1:10250"},
		"m1:10250":                {node: "m1", direct: "10.0.0.1:10250", inside: "10.0.0.1:10250"},
		"203.0.113.7:10250":       {node: "m2", direct: "203.0.113.7:10250", inside: "192.168.1.5:10250"},
		"192.168.1.5:10250":       {node: "m2", direct: "192.168.1.5:10250", inside: "192.168.1.5:10250"}, // neither has a tunnel
		"bare:10250":              {node: "bare", direct: "bare:10250", inside: "127.0.0.1:10250"},
		"10.42.2.3:8080":          {node: "m3", pod: true, direct: "10.42.2.3:8080", inside: "10.42.2.3:8080"},
		"10.42.9.3:8080":          {direct: "10.42.9.3:8080"},
		"example.org:443":         {direct: "example.org:443"},
	} {
		if got, err := b.server.locate(addr); err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: %+v, %v", addr, got, err)
		}
	}
	// Two machines behind routers may have one address. The one that has a tunnel is meant; if both have, nobody knows.
	b.join("m3")
	b.open("m3")
	if got, _ := b.server.locate("192.168.1.5:10250"); got.node != "m3" || len(got.rivals) != 0 {
		t.Errorf("%+v", got)
	}
	b.join("m2")
	b.open("m2", "m3")
	b.server.direct = blackHole
	ctx, cancel := context.WithTimeout(t.Context(), 1200*time.Millisecond)
	defer cancel()
	if _, err := b.server.Dial(ctx, "tcp", "192.168.1.5:10250"); err == nil || !strings.Contains(err.Error(), "the address is also that of m3 in another network") {
		t.Error(err)
	}
}

// TestLateLoser: a connection that loses the race is closed.
func TestLateLoser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		stubborn := way{"a", func(context.Context) (net.Conn, error) { time.Sleep(2 * time.Second); return ours, nil }}
		conn, won, _ := race(t.Context(), []way{stubborn, answers("b", 0, nil)})
		if won != 1 || conn == nil {
			t.Fatal("the stubborn one won")
		}
		if _, err := theirs.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the loser's connection: %v", err)
		}
	})
}

// TestOwnTunnelComesBack: with nothing but tunnels, a pod's node is waited for when another one that has a tunnel does not reach the pod.
func TestOwnTunnelComesBack(t *testing.T) {
	b := newBed(t, alwaysTunnel, noDirect)
	b.addNode("m2", "127.1.2.0/24", internal("127.0.0.2"))
	b.addNode("m3", "127.1.3.0/24", internal("127.0.0.3"))
	b.join("m3", func(c *Client) { c.cfg.Allow = func(netip.AddrPort) bool { return false } })
	b.open("m3")
	addr := listen(t, "127.1.2.9:0", echo)
	go func() {
		time.Sleep(headStart + 200*time.Millisecond)
		b.join("m2")
	}()
	exchange(t, b.dial(addr), "x")
}

// TestOwnPods: this machine's pods are dialled directly with nothing but tunnels, too: it has none to itself, and another node that has one
// need not reach them.
func TestOwnPods(t *testing.T) {
	b := newBed(t, alwaysTunnel, func(s *Server) { s.cfg.NodeName = "self" })
	b.addNode("self", "127.1.2.0/24", internal("127.0.0.2"))
	b.addNode("m3", "127.1.3.0/24", internal("127.0.0.3"))
	b.join("m3", func(c *Client) { c.cfg.Allow = func(netip.AddrPort) bool { return false } })
	b.open("m3")
	exchange(t, b.dial(listen(t, "127.1.2.9:0", echo)), "x")
}
