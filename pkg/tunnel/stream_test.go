// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// tunnelled is a bed with a node whose connections all take the tunnel.
func tunnelled(t *testing.T) *bed {
	t.Helper()
	b := newBed(t, alwaysTunnel, noDirect)
	b.addNode("m2", "127.1.2.0/24", internal("127.0.0.2"))
	b.join("m2")
	b.open("m2")
	return b
}

func TestEcho(t *testing.T) {
	b := tunnelled(t)
	conn := b.dial(listen(t, "127.0.0.2:0", echo))
	for range 3 {
		exchange(t, conn, "hello")
	}
	if got := conn.RemoteAddr().String(); !strings.HasPrefix(got, "127.0.0.2:") {
		t.Errorf("remote address %s", got)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if _, err := conn.Write([]byte("x")); err == nil {
		t.Error("written after Close")
	}
}

func exchange(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(conn, got); err != nil {
		t.Fatal(err)
	}
	if string(got) != text {
		t.Fatalf("got %q, want %q", got, text)
	}
}

// TestHalfClose: each direction ends by itself.
func TestHalfClose(t *testing.T) {
	b := tunnelled(t)
	t.Run("from here", func(t *testing.T) {
		conn := b.dial(listen(t, "127.0.0.2:0", func(c *net.TCPConn) {
			all, err := io.ReadAll(c)
			fmt.Fprintf(c, "%d bytes, %v", len(all), err)
		}))
		if _, err := conn.Write(make([]byte, 100_000)); err != nil {
			t.Fatal(err)
		}
		if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(conn); err != nil || string(got) != "100000 bytes, <nil>" {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("from the target", func(t *testing.T) {
		got := make(chan string, 1)
		conn := b.dial(listen(t, "127.0.0.2:0", func(c *net.TCPConn) {
			_, _ = io.WriteString(c, "that is all")
			_ = c.CloseWrite()
			all, err := io.ReadAll(c)
			got <- fmt.Sprintf("%d bytes, %v", len(all), err)
		}))
		if all, err := io.ReadAll(conn); err != nil || string(all) != "that is all" {
			t.Fatalf("got %q, %v", all, err)
		}
		for range 10 { // it still takes
			if _, err := conn.Write(make([]byte, 100_000)); err != nil {
				t.Fatal(err)
			}
		}
		conn.Close()
		if s := <-got; s != "1000000 bytes, <nil>" {
			t.Errorf("the target got %s", s)
		}
	})
}

// TestCloseSendsAll: what was written before Close arrives, as with a socket.
func TestCloseSendsAll(t *testing.T) {
	b := tunnelled(t)
	for _, size := range []int{1, 5000, 3_000_000} {
		got := make(chan string, 1)
		conn := b.dial(listen(t, "127.0.0.2:0", func(c *net.TCPConn) {
			all, err := io.ReadAll(c)
			got <- fmt.Sprintf("%d bytes, %v", len(all), err)
		}))
		if _, err := conn.Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if s := <-got; s != fmt.Sprintf("%d bytes, <nil>", size) {
			t.Errorf("of %d the target got %s", size, s)
		}
	}
}

// TestBrokenTarget: a connection that was reset is no complete one.
func TestBrokenTarget(t *testing.T) {
	b := tunnelled(t)
	conn := b.dial(listen(t, "127.0.0.2:0", func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "half of")
		_, _ = c.Read(make([]byte, 1))
		_ = c.SetLinger(0)
	}))
	half := make([]byte, len("half of"))
	if _, err := io.ReadFull(conn, half); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(conn); err == nil {
		t.Error("a reset looks like an end")
	}
	eventually(t, "writing fails", func() bool { _, err := conn.Write([]byte("x")); return err != nil })
}

// TestCloseReachesTarget: a target notices that the API server has gone.
func TestCloseReachesTarget(t *testing.T) {
	b := tunnelled(t)
	ended := make(chan error, 1)
	conn := b.dial(listen(t, "127.0.0.2:0", func(c *net.TCPConn) {
		for { // a log that is followed
			if _, err := c.Write(make([]byte, 1000)); err != nil {
				ended <- err
				return
			}
		}
	}))
	if _, err := io.CopyN(io.Discard, conn, 100_000); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("the target still sends")
	}
}

func TestDeadlines(t *testing.T) {
	b := tunnelled(t)
	conn := b.dial(listen(t, "127.0.0.2:0", echo))
	if err := conn.SetDeadline(time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	exchange(t, conn, "no deadline")
	_ = conn.SetWriteDeadline(time.Unix(1, 0))
	if _, err := conn.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("write: %v", err)
	}
	_ = conn.SetWriteDeadline(time.Time{})
	exchange(t, conn, "again")
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read: %v", err)
	}
}

// TestManyStreams: a hundred at a time, in both directions, byte for byte.
func TestManyStreams(t *testing.T) {
	b := tunnelled(t)
	addr := listen(t, "127.0.0.2:0", echo)
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			conn, err := b.server.Dial(t.Context(), "tcp", addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			sent := make([]byte, 300_000)
			seed := [32]byte{byte(i)}
			_, _ = rand.NewChaCha8(seed).Read(sent)
			go func() {
				_, _ = conn.Write(sent)
				_ = conn.(interface{ CloseWrite() error }).CloseWrite()
			}()
			got, err := io.ReadAll(conn)
			if err != nil || !bytes.Equal(got, sent) {
				t.Errorf("stream %d: %d of %d bytes, %v", i, len(got), len(sent), err)
			}
		})
	}
	all.Wait()
}

// TestSlowReaders: streams whose readers stand still hold up no other, in either direction, and get everything in the end.
func TestSlowReaders(t *testing.T) {
	const size = 50 << 20
	b := tunnelled(t)
	data := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(data)
	want := sha256.New()
	for range size / len(data) {
		want.Write(data)
	}
	slow := b.dial(listen(t, "127.0.0.2:0", func(c *net.TCPConn) {
		for range size / len(data) {
			if _, err := c.Write(data); err != nil {
				return
			}
		}
	}))
	// Targets that do not read: each fills its window and the buffers of the sockets.
	stalled := listen(t, "127.0.0.2:0", func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, hang{t}) })
	for range 30 {
		conn := b.dial(stalled)
		go func() { _, _ = io.Copy(conn, zeros{}) }()
	}
	time.Sleep(300 * time.Millisecond) // all of them get stuck
	quick := b.dial(listen(t, "127.0.0.2:0", echo))
	began := time.Now()
	for range 100 {
		exchange(t, quick, strings.Repeat("x", 20_000))
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the stream beside them took %s", took)
	}
	got := sha256.New()
	if n, err := io.Copy(got, slow); err != nil || n != size || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Errorf("the slow one got %d bytes, %v", n, err)
	}
}

// hang blocks until the test ends.
type hang struct{ t *testing.T }

func (h hang) Read([]byte) (int, error) { <-h.t.Context().Done(); return 0, io.EOF }

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
