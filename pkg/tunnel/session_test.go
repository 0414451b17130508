// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"
	listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
)

// TestRefusals: who is no node, or asks in another way, gets the API's kind of answer.
func TestRefusals(t *testing.T) {
	b := newBed(t)
	upgradeHeader := http.Header{"Connection": {"Upgrade"}, "Upgrade": {upgradeProtocol}}
	for name, test := range map[string]struct {
		user, group, method string
		header              http.Header
		http2               bool
		code                int
		message             string
	}{
		"a person":          {user: "kim", group: "system:masters", header: upgradeHeader, code: 403, message: `"kim" is not a node`},
		"a server":          {user: "system:kedge:server:m1", group: "system:kedge:servers", header: upgradeHeader, code: 403, message: "is not a node"},
		"not in the group":  {user: "system:node:m2", group: "system:authenticated", header: upgradeHeader, code: 403, message: "is not a node"},
		"no name":           {user: "system:node:", group: nodesGroup, header: upgradeHeader, code: 403, message: "is not a node"},
		"no upgrade":        {user: "system:node:m2", group: nodesGroup, code: 400, message: "upgrade to kedge-tunnel"},
		"HTTP/2":            {user: "system:node:m2", group: nodesGroup, http2: true, code: 400, message: "HTTP/2 has no upgrade"},
		"not a GET request": {user: "system:node:m2", group: nodesGroup, method: http.MethodPost, header: upgradeHeader, code: 405, message: "POST is not supported"},
	} {
		t.Run(name, func(t *testing.T) {
			transport := &http.Transport{TLSClientConfig: b.ca.nodeTLS(t, test.user, test.group), ForceAttemptHTTP2: test.http2}
			defer transport.CloseIdleConnections()
			req, _ := http.NewRequestWithContext(t.Context(), test.method, "https://"+b.address()+ConnectPath, nil)
			for k, v := range test.header {
				req.Header[k] = v
			}
			res, err := transport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			var status metav1.Status
			if err := json.NewDecoder(res.Body).Decode(&status); err != nil {
				t.Fatal(err)
			}
			if res.StatusCode != test.code || !strings.Contains(status.Message, test.message) || status.Kind != "Status" {
				t.Errorf("%d %+v", res.StatusCode, status)
			}
		})
	}
	t.Run("nobody", func(t *testing.T) {
		w := httptest.NewRecorder()
		b.server.ServeHTTP(w, httptest.NewRequest(http.MethodGet, ConnectPath, nil))
		if w.Code != 401 {
			t.Errorf("status %d", w.Code)
		}
	})
	if s := b.server.Sessions(); len(s) != 0 {
		t.Errorf("sessions %v", s)
	}
}

// TestClientSaysWhy: the reason is in the log, once, and in Links.
func TestClientSaysWhy(t *testing.T) {
	b := newBed(t)
	elsewhere := newAuthority(t)
	closed := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Addr().String()
	}()
	mute := listen(t, "127.0.0.1:0", func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 64<<10)) })
	plain := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	plain.Config.ErrorLog = nil
	for name, test := range map[string]struct {
		server string
		tls    *tls.Config
		err    error
		reason string
	}{
		"nothing listens":       {server: closed, tls: b.ca.nodeTLS(t, "system:node:m2", nodesGroup), reason: "connection refused"},
		"the server hangs up":   {server: mute, tls: b.ca.nodeTLS(t, "system:node:m2", nodesGroup), reason: "the server closed the connection without an answer"},
		"another CA":            {server: b.address(), tls: elsewhere.nodeTLS(t, "system:node:m2", nodesGroup), reason: "certificate signed by unknown authority"},
		"not a node":            {server: b.address(), tls: b.ca.nodeTLS(t, "kim", "people"), reason: `403 Forbidden: tunnels is forbidden: "kim" is not a node`},
		"no certificate":        {server: b.address(), err: errors.New("kubelet.pem: no such file"), reason: "the node's client certificate: kubelet.pem"},
		"without port":          {server: "10.0.0.1", tls: &tls.Config{}, reason: "missing port"},
		"not an API of Kedge's": {server: plain.Listener.Addr().String(), tls: &tls.Config{InsecureSkipVerify: true}, reason: "404 Not Found: is it of a Kedge version without tunnels?"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // each waits for a second try
			c, stop := b.join(name, func(c *Client) {
				c.cfg.TLS = func() (*tls.Config, error) { return test.tls, test.err }
				c.SetServers([]string{test.server})
			})
			var reason string
			eventually(t, "a reason", func() bool {
				for _, l := range c.Links() {
					reason = l.Reason
				}
				return reason != ""
			})
			if !strings.Contains(reason, test.reason) {
				t.Errorf("reason %q", reason)
			}
			time.Sleep(700 * time.Millisecond) // a second try
			stop()
			if lines := b.log.lines(`node="` + name); len(lines) > 1 && strings.Contains(name, " ") {
				t.Errorf("%d lines: %q", len(lines), lines)
			}
		})
	}
}

// TestServersChange: connections follow the list.
func TestServersChange(t *testing.T) {
	a := newBed(t)
	other := newBed(t)
	other.ca = a.ca
	second := httptest.NewUnstartedServer(a.ca.filters(other.server))
	second.TLS = a.ca.serverTLS(t)
	second.StartTLS()
	defer second.Close()
	c, _ := a.join("m2")
	a.open("m2")
	if l := c.Links(); len(l) != 1 || !l[0].Open || l[0].Server != a.address() || l[0].Since.IsZero() {
		t.Errorf("links %+v", l)
	}
	both := []string{a.address(), second.Listener.Addr().String()}
	c.SetServers(both)
	other.open("m2")
	a.open("m2")
	c.SetServers(both[1:])
	a.open()
	other.open("m2")
	eventually(t, "one link", func() bool { return len(c.Links()) == 1 })
	c.SetServers(nil)
	other.open()
}

// TestReconnect: a node's new connection takes over, what runs through the old one goes on, and the old one is used again when the
// new one has ended.
func TestReconnect(t *testing.T) {
	b := newBed(t, alwaysTunnel, noDirect)
	b.addNode("m2", "", internal("127.0.0.2"))
	addr := listen(t, "127.0.0.2:0", echo)
	b.join("m2")
	b.open("m2")
	before := b.dial(addr)
	exchange(t, before, "before")
	old := b.session("m2")

	_, stop := b.join("m2") // the same node again: it has lost its connection, or knows the server by two addresses
	eventually(t, "another session", func() bool { return b.session("m2") != old })
	exchange(t, before, "still there")
	after := b.dial(addr)
	exchange(t, after, "after")
	if s, _ := streamOf(after); s.session == old {
		t.Error("the old connection is still the first choice")
	}
	stop()
	eventually(t, "the old session", func() bool { return b.session("m2") == old })
	if _, err := after.Read(make([]byte, 1)); err == nil {
		t.Error("a stream outlives its connection")
	}
	exchange(t, before, "not affected")
	exchange(t, b.dial(addr), "old but good")
	if lines := b.log.lines("no tunnel to the server"); len(lines) != 0 {
		t.Errorf("%q", lines)
	}
}

// TestTooManySessions: the oldest of too many is closed.
func TestTooManySessions(t *testing.T) {
	b := newBed(t)
	b.join("m2")
	b.open("m2")
	first := b.session("m2")
	for range maxSessions {
		before := b.session("m2")
		b.join("m2", func(c *Client) { c.log = (&logs{}).logger() })
		eventually(t, "one more", func() bool { return b.session("m2") != before })
	}
	select {
	case <-first.link.closed:
	case <-time.After(5 * time.Second):
		t.Error("the first one is still open")
	}
}

func (b *bed) session(node string) *session {
	b.server.mu.Lock()
	defer b.server.mu.Unlock()
	all := b.server.sessions[node]
	return all[len(all)-1]
}

// TestServerReturns: the tunnel comes back by itself, with one line in the log for each change.
func TestServerReturns(t *testing.T) {
	b := newBed(t, alwaysTunnel, noDirect)
	b.addNode("m2", "", internal("127.0.0.2"))
	addr := listen(t, "127.0.0.2:0", echo)
	c, _ := b.join("m2")
	b.open("m2")
	conn := b.dial(addr)
	exchange(t, conn, "x")
	b.session("m2").link.Conn.(*tls.Conn).NetConn().Close() // as if the process had died
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("a stream outlives its tunnel")
	} else if !strings.Contains(err.Error(), "the tunnel of node m2 has ended: ") {
		t.Error(err)
	}
	eventually(t, "open again", func() bool {
		l := c.Links()
		return len(l) == 1 && l[0].Open && len(b.log.lines("tunnel to the server is open")) == 2
	})
	b.open("m2")
	exchange(t, b.dial(addr), "y")
	if lines := b.log.lines("no tunnel to the server"); len(lines) != 1 || !strings.Contains(lines[0], "the other side closed it") {
		t.Errorf("%q", lines)
	}
	if lines := b.log.lines("a node's tunnel"); len(lines) != 3 {
		t.Errorf("%q", lines)
	}
}

// TestClose: an API server that stops ends its tunnels and takes none.
func TestClose(t *testing.T) {
	b := newBed(t, alwaysTunnel, noDirect)
	b.addNode("m2", "", internal("127.0.0.2"))
	c, _ := b.join("m2")
	b.open("m2")
	conn := b.dial(listen(t, "127.0.0.2:0", echo))
	exchange(t, conn, "x")
	b.server.Close()
	if _, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "the API server stops") {
		t.Error(err)
	}
	eventually(t, "reason", func() bool {
		l := c.Links()
		return len(l) == 1 && strings.Contains(l[0].Reason, "503 Service Unavailable")
	})
}

// freezer is a proxy that can stop forwarding without closing anything: a black hole.
type freezer struct {
	frozen chan struct{}
	ended  <-chan struct{}
}

func (f *freezer) copy(to, from net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		select {
		case <-f.frozen: // what still comes is lost, also the end
			if err != nil {
				<-f.ended
				return
			}
			continue
		default:
		}
		if err != nil {
			to.Close()
			return
		}
		_, _ = to.Write(buf[:n])
	}
}

// TestBlackHole: with real sockets and short intervals, both sides notice that the other is gone.
func TestBlackHole(t *testing.T) {
	short := health{after: 100 * time.Millisecond, timeout: 100 * time.Millisecond}
	b := newBed(t, alwaysTunnel, noDirect, func(s *Server) { s.health = short })
	b.addNode("m2", "", internal("127.0.0.2"))
	hole := &freezer{frozen: make(chan struct{}), ended: t.Context().Done()}
	proxy := listen(t, "127.0.0.1:0", func(near *net.TCPConn) {
		far, err := net.Dial("tcp", b.address())
		if err != nil {
			return
		}
		defer far.Close()
		defer context.AfterFunc(t.Context(), func() { near.Close(); far.Close() })()
		go hole.copy(near, far)
		hole.copy(far, near)
	})
	c, _ := b.join("m2", func(c *Client) { c.health = short; c.SetServers([]string{proxy}) })
	b.open("m2")
	conn := b.dial(listen(t, "127.0.0.2:0", echo))
	exchange(t, conn, "x")
	time.Sleep(500 * time.Millisecond)
	exchange(t, conn, "pings are answered")
	close(hole.frozen)
	if _, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "no sign of life for ") {
		t.Errorf("the stream: %v", err)
	}
	b.open()
	eventually(t, "the node notices", func() bool { l := c.Links(); return len(l) == 1 && !l[0].Open })
	eventually(t, "the node says so", func() bool { return len(b.log.lines("no sign of life for ")) == 2 })
}

// TestIdle is about the real intervals: what an idle tunnel costs, and how soon a dead peer is noticed.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newAuthority(t)
		log := &logs{}
		server := NewServer(ServerConfig{Nodes: listers.NewNodeLister(cache.NewIndexer(cache.MetaNamespaceKeyFunc, nil)), Log: log.logger()})
		front := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			node := &user.DefaultInfo{Name: "system:node:m2", Groups: []string{nodesGroup}}
			server.ServeHTTP(w, r.WithContext(request.WithUser(r.Context(), node)))
		})}
		accept := &acceptor{conns: make(chan net.Conn), closed: make(chan struct{})}
		go front.Serve(tls.NewListener(accept, ca.serverTLS(t)))
		cfg := ca.nodeTLS(t, "system:node:m2", nodesGroup)
		client := NewClient(ClientConfig{TLS: func() (*tls.Config, error) { return cfg, nil }, Log: log.logger(), Allow: func(netip.AddrPort) bool { return false }})
		wires := &wires{accept: accept}
		client.dialer = wires
		client.SetServers([]string{"api:6443"})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = client.Run(ctx) }()
		synctest.Wait()
		if !slices.Equal(server.Sessions(), []string{"m2"}) {
			t.Fatalf("sessions %v: %q", server.Sessions(), log.lines(""))
		}

		opening := wires.bytes.Load()
		const minutes = 30
		time.Sleep(minutes * time.Minute)
		perMinute := (wires.bytes.Load() - opening) / minutes
		t.Logf("opening takes %d bytes, a minute %d, in %d records", opening, perMinute, (wires.records.Load())/minutes)
		if perMinute > 500 || perMinute == 0 {
			t.Errorf("%d bytes a minute", perMinute)
		}

		began := time.Now()
		wires.frozen.Store(true)
		first := wires.last.Load()
		<-first.closed
		<-first.peer.closed
		if took := time.Since(began); took > time.Minute {
			t.Errorf("noticed after %s", took)
		} else {
			t.Logf("noticed after %s", took)
		}
		synctest.Wait()
		if n := len(log.lines("no sign of life for ")); n != 2 {
			t.Errorf("%q", log.lines(""))
		}
		wires.frozen.Store(false)
		time.Sleep(time.Minute)
		if !slices.Equal(server.Sessions(), []string{"m2"}) {
			t.Errorf("not back: %q", log.lines(""))
		}
		cancel()
		<-done
		server.Close()
		front.Close()
		time.Sleep(time.Minute) // timers of HTTP/2
	})
}

// wires dials connections in memory, counts what they carry, and can lose it.
type wires struct {
	accept         *acceptor
	bytes, records atomic.Int64
	frozen         atomic.Bool
	last           atomic.Pointer[wire]
}

func (w *wires) DialContext(ctx context.Context, _, _ string) (net.Conn, error) {
	if w.frozen.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	near, far := net.Pipe()
	a, b := &wire{Conn: near, all: w, closed: make(chan struct{})}, &wire{Conn: far, all: w, closed: make(chan struct{})}
	a.peer, b.peer = b, a
	w.last.Store(a)
	if !w.accept.offer(b) {
		return nil, net.ErrClosed
	}
	return a, nil
}

type wire struct {
	net.Conn
	all    *wires
	peer   *wire
	closed chan struct{}
	once   sync.Once
}

func (w *wire) Write(p []byte) (int, error) {
	if w.all.frozen.Load() {
		return len(p), nil
	}
	w.all.bytes.Add(int64(len(p)))
	w.all.records.Add(1)
	return w.Conn.Write(p)
}

// Close is silent: the other side learns nothing of it while the wire is frozen.
func (w *wire) Close() error {
	w.once.Do(func() {
		close(w.closed)
		if w.all.frozen.Load() {
			_ = w.Conn.SetReadDeadline(time.Unix(1, 0))
			go func() { <-w.peer.closed; w.Conn.Close() }()
			return
		}
		w.Conn.Close()
	})
	return nil
}
