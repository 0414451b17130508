// SPDX-License-Identifier: Apache-2.0

package apilb

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lines is a log that can be searched.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *lines) logger() *slog.Logger      { return slog.New(slog.NewTextHandler(l, nil)) }
func (l *lines) count(text string) (n int) { return strings.Count(l.String(), text) }

// backend is a TCP server that hands each connection to serve.
func backend(t testing.TB, serve func(*net.TCPConn)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() { defer conn.Close(); serve(conn.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() { listener.Close(); running.Wait() })
	return listener.Addr().String()
}

func well(context.Context, string) error { return nil }

// plain starts a balancer in front of one TCP server.
func plain(t testing.TB, serve func(*net.TCPConn), change func(*Balancer)) *harness {
	t.Helper()
	address := backend(t, serve)
	return start(t, &authority{}, Config{Local: address, Probe: well, Logger: slog.New(slog.DiscardHandler)}, change)
}

func (h *harness) dial() *net.TCPConn {
	h.t.Helper()
	conn, err := net.Dial("tcp", h.Addr())
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

// The server answers with the digest after it has read everything to the end.
func TestHalfClose(t *testing.T) {
	t.Parallel()
	h := plain(t, func(conn *net.TCPConn) {
		digest := sha256.New()
		if _, err := io.Copy(digest, conn); err != nil {
			t.Error(err)
		}
		conn.Write(digest.Sum(nil))
	}, nil)
	data := make([]byte, 10<<20)
	rand.NewChaCha8([32]byte{1}).Read(data)
	want := sha256.Sum256(data)
	for _, inside := range []bool{false, true} {
		dial := net.Dial
		if inside {
			dial = func(string, string) (net.Conn, error) { return h.Dial(t.Context()) }
		}
		conn, err := dial("tcp", h.Addr())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(conn)
		if err != nil || !bytes.Equal(got, want[:]) {
			t.Errorf("got %x, %v", got, err)
		}
		conn.Close()
	}
	eventually(t, "no connection is left", func() bool { return h.Servers()[0].Connections == 0 })
}

// A client that has gone is not held for ever by a server that does not care.
func TestLinger(t *testing.T) {
	t.Parallel()
	held := make(chan struct{})
	h := plain(t, func(conn *net.TCPConn) { <-held }, func(b *Balancer) { b.timing.linger = 100 * time.Millisecond })
	t.Cleanup(func() { close(held) })
	conn := h.dial()
	eventually(t, "connected", func() bool { return h.Servers()[0].Connections == 1 })
	conn.Close()
	eventually(t, "no connection is left", func() bool { return h.Servers()[0].Connections == 0 })
}

// Each side's reset reaches the other.
func TestReset(t *testing.T) {
	t.Parallel()
	reset := func(conn *net.TCPConn) { conn.SetLinger(0); conn.Close() }
	result := make(chan error, 1)
	h := plain(t, func(conn *net.TCPConn) {
		b := make([]byte, 1)
		conn.Read(b)
		if b[0] == 's' {
			reset(conn)
			return
		}
		_, err := conn.Read(b)
		result <- err
	}, nil)
	conn := h.dial()
	conn.Write([]byte("s"))
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d", n)
	}
	conn = h.dial()
	conn.Write([]byte("c"))
	eventually(t, "connected", func() bool { return h.Servers()[0].Connections == 1 })
	reset(conn)
	if err := <-result; err == nil {
		t.Error("no error")
	}
	eventually(t, "no connection is left", func() bool { return h.Servers()[0].Connections == 0 })
}

// Idle connections hold no buffers and no file descriptors beside their two sockets.
func TestIdle(t *testing.T) {
	const n = 50
	var lent atomic.Int64
	h := plain(t, echo, func(b *Balancer) { b.buffers.New = func() any { lent.Add(1); return new(buffer) } })
	fds := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := fds()
	for range n {
		conn := h.dial()
		conn.Write([]byte("x"))
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if got := fds() - before; got > 4*n+5 { // the client's, two of the balancer's, the server's
		t.Errorf("%d file descriptors for %d connections", got, n)
	}
	if got := lent.Load(); got > n/2 {
		t.Errorf("%d buffers were made for %d connections, one in use after the other", got, n)
	}
}

// failing fails before it accepts.
type failing struct {
	net.Listener
	left atomic.Int64
}

func (l *failing) Accept() (net.Conn, error) {
	if l.left.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", unix.EMFILE)}
	}
	return l.Listener.Accept()
}

func TestAcceptErrors(t *testing.T) {
	t.Parallel()
	address := backend(t, func(conn *net.TCPConn) { conn.Write([]byte("x")) })
	log := &lines{}
	b, err := New(Config{Listen: "127.0.0.1:0", Local: address, File: t.TempDir() + "/f", Probe: well, Logger: log.logger()})
	if err != nil {
		t.Fatal(err)
	}
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listener := &failing{Listener: inner}
	listener.left.Store(5)
	var running sync.WaitGroup
	running.Go(func() { b.accept(t.Context(), listener) })
	conn, err := net.Dial("tcp", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "x" {
		t.Errorf("got %q, %v", got, err)
	}
	conn.Close()
	listener.Close()
	running.Wait()
	if got := log.count("cannot accept"); got != 1 {
		t.Errorf("log:\n%s", log)
	}
}

// Clients that come and go while servers fail and return never hang, and the books are right in the end.
func TestChurn(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	servers := []*apiServer{newAPIServer(t, a, "one", "127.0.0.1:0"), newAPIServer(t, a, "two", "127.0.0.1:0"), newAPIServer(t, a, "three", "127.0.0.1:0")}
	h := start(t, a, Config{Local: servers[0].address, Logger: slog.New(slog.DiscardHandler)}, func(b *Balancer) {
		quick(b)
		b.timing.timeout, b.timing.suspect, b.timing.home = 200*time.Millisecond, 50*time.Millisecond, 100*time.Millisecond
	})
	h.use(servers[1].address, servers[2].address)
	h.settled(servers[0].address)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
	defer cancel()
	var running sync.WaitGroup
	var done, failed atomic.Int64
	for range 8 {
		running.Go(func() {
			for ctx.Err() == nil {
				s, err := h.connect(5 * time.Second)
				for range 20 {
					if err == nil {
						s.conn.SetDeadline(time.Now().Add(5 * time.Second))
						_, err = s.who()
					}
				}
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error("a client hangs")
				}
				if err != nil {
					failed.Add(1)
				} else {
					done.Add(1)
				}
				if s != nil {
					s.conn.Close()
				}
			}
		})
	}
	for i := 0; ctx.Err() == nil; i++ {
		s := servers[i%2] // the third one is always well
		s.hold()
		select {
		case <-ctx.Done():
		case <-time.After(300 * time.Millisecond):
		}
		s.release()
		if i%3 == 0 {
			h.use(servers[2].address)
			h.use(servers[1].address, servers[2].address)
		}
	}
	running.Wait()
	t.Logf("%d sessions went well, %d were cut off", done.Load(), failed.Load())
	if done.Load() < failed.Load() {
		t.Error("more were cut off than went well")
	}
	eventually(t, "no connection is left", func() bool {
		for _, s := range h.Servers() {
			if s.Connections > 0 {
				return false
			}
		}
		return true
	})
}

// echo sends back what it gets, sink swallows it.
func echo(conn *net.TCPConn) { io.Copy(conn, struct{ io.Reader }{conn}) }
func sink(conn *net.TCPConn) {
	io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{conn}, make([]byte, 256<<10))
}

// dialer for a benchmark: through the balancer, or past it.
func eachWay(b *testing.B, serve func(*net.TCPConn), run func(*testing.B, *net.TCPConn)) {
	h := plain(b, serve, nil)
	for name, address := range map[string]string{"direct": h.Servers()[0].Address, "balanced": h.Addr()} {
		b.Run(name, func(b *testing.B) {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				b.Fatal(err)
			}
			defer conn.Close()
			run(b, conn.(*net.TCPConn))
		})
	}
}

func BenchmarkThroughput(b *testing.B) {
	eachWay(b, sink, func(b *testing.B, conn *net.TCPConn) {
		data := make([]byte, 256<<10)
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			if _, err := conn.Write(data); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// A request of 200 bytes, an answer of the same size.
func BenchmarkRoundTrip(b *testing.B) {
	eachWay(b, echo, func(b *testing.B, conn *net.TCPConn) {
		data := make([]byte, 200)
		for b.Loop() {
			conn.Write(data)
			if _, err := io.ReadFull(conn, data); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// Connect, one byte there and back, close.
func BenchmarkConnect(b *testing.B) {
	h := plain(b, echo, nil)
	for name, address := range map[string]string{"direct": h.Servers()[0].Address, "balanced": h.Addr()} {
		b.Run(name, func(b *testing.B) {
			data := make([]byte, 1)
			for b.Loop() {
				conn, err := net.Dial("tcp", address)
				if err != nil {
					b.Fatal(err)
				}
				conn.Write(data)
				if _, err := io.ReadFull(conn, data); err != nil {
					b.Fatal(err)
				}
				conn.(*net.TCPConn).SetLinger(0)
				conn.Close()
			}
		})
	}
}
