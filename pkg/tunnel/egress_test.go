// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/server/egressselector"
)

// selector starts ServeEgress and gives the API server's own dialler for it.
func selector(t *testing.T, b *bed) utilnet.DialFunc {
	t.Helper()
	dir := t.TempDir()
	socket := filepath.Join(dir, "egress.sock")
	if err := os.WriteFile(socket, []byte("left by a crash"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.server.ServeEgress(ctx, socket) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	eventually(t, "socket", func() bool { _, err := net.Dial("unix", socket); return err == nil })
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	file := filepath.Join(dir, "egress.yaml")
	if err := os.WriteFile(file, EgressConfig(socket), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := egressselector.ReadEgressSelectorConfiguration(file)
	if err != nil {
		t.Fatal(err)
	}
	if errs := egressselector.ValidateEgressSelectorConfiguration(cfg); len(errs) != 0 {
		t.Fatal(errs)
	}
	want := []apiserver.EgressSelection{{Name: "cluster", Connection: apiserver.Connection{
		ProxyProtocol: apiserver.ProtocolHTTPConnect, Transport: &apiserver.Transport{UDS: &apiserver.UDSTransport{UDSName: socket}},
	}}}
	if diff := cmp.Diff(want, cfg.EgressSelections); diff != "" {
		t.Fatal(diff)
	}
	s, err := egressselector.NewEgressSelector(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []egressselector.EgressType{egressselector.Etcd, egressselector.ControlPlane} {
		if dial, err := s.Lookup(kind.AsNetworkContext()); err != nil || dial != nil {
			t.Errorf("%s has a dialler, %v: etcd's unix socket would be dialled as TCP", kind, err)
		}
	}
	dial, err := s.Lookup(egressselector.Cluster.AsNetworkContext())
	if err != nil || dial == nil {
		t.Fatal(err)
	}
	return dial
}

// TestEgress: the API server's client, the proxy, the tunnel and a kubelet with TLS, HTTP/2 and an upgrade.
func TestEgress(t *testing.T) {
	b := newBed(t, noDirect)
	b.addNode("m2", "", internal("127.0.0.2"))
	b.join("m2")
	b.open("m2")
	b.server.setAvoid(path{node: "m2"}, time.Now().Add(time.Hour))

	kubelet := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			fmt.Fprintf(w, "%s %s", r.Proto, r.URL)
			return
		}
		conn, buffered, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n")
		_, _ = io.Copy(conn, buffered)
	}))
	kubelet.Listener.Close()
	l, err := net.Listen("tcp", "127.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	kubelet.Listener = l
	kubelet.EnableHTTP2 = true
	kubelet.StartTLS()
	defer kubelet.Close()

	dial := selector(t, b)
	transport := &http.Transport{DialContext: dial, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	for range 3 {
		res, err := (&http.Client{Transport: transport}).Get("https://" + l.Addr().String() + "/containerLogs/a/b")
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(res.Body); err != nil || string(body) != "HTTP/2.0 /containerLogs/a/b" {
			t.Errorf("%q, %v", body, err)
		}
		res.Body.Close()
	}

	raw, err := dial(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	exec := tls.Client(raw, &tls.Config{InsecureSkipVerify: true})
	defer exec.Close()
	fmt.Fprintf(exec, "POST /exec/a/b HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n")
	r := bufio.NewReader(exec)
	if res, err := http.ReadResponse(r, nil); err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(res, err)
	}
	_, _ = io.WriteString(exec, "opaque \x00 bytes\n")
	if line, err := r.ReadString('\n'); err != nil || line != "opaque \x00 bytes\n" {
		t.Errorf("%q, %v", line, err)
	}
}

// TestEgressHalfClose: plain connections through proxy and tunnel, and through the proxy alone.
func TestEgressHalfClose(t *testing.T) {
	b := newBed(t)
	b.addNode("m2", "", internal("127.0.0.2"))
	b.join("m2")
	b.open("m2")
	dial := selector(t, b)
	addr := listen(t, "127.0.0.2:0", func(c *net.TCPConn) {
		all, err := io.ReadAll(c)
		fmt.Fprintf(c, "%d bytes, %v", len(all), err)
	})
	for _, mode := range []Mode{Auto, Always} {
		b.server.cfg.Mode = mode
		conn, err := dial(t.Context(), "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write(make([]byte, 1_000_000)); err != nil {
			t.Fatal(err)
		}
		_ = conn.(*net.UnixConn).CloseWrite()
		if got, err := io.ReadAll(conn); err != nil || string(got) != "1000000 bytes, <nil>" {
			t.Errorf("%s: %q, %v", mode, got, err)
		}
	}
}

// TestEgressErrors: the reason reaches the API server's user.
func TestEgressErrors(t *testing.T) {
	b := newBed(t)
	b.addNode("m4", "", internal("127.0.0.4"))
	dial := selector(t, b)
	_, err := dial(t.Context(), "tcp", "127.0.0.4:2")
	if err == nil || !strings.Contains(err.Error(), "code 502: 502 node m4 (127.0.0.4:2): direct: connection refused; tunnel: none is open from the node: is its kedge agent running?") {
		t.Error(err)
	}
}

// TestEgressEnds: connections end with the proxy, and a second one on the socket takes its place.
func TestEgressEnds(t *testing.T) {
	b := newBed(t)
	socket := filepath.Join(t.TempDir(), "s")
	addr := listen(t, "127.0.0.1:0", echo)
	for range 2 {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- b.server.ServeEgress(ctx, socket) }()
		var conn net.Conn
		eventually(t, "socket", func() bool { c, err := net.Dial("unix", socket); conn = c; return err == nil })
		fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n", addr)
		r := bufio.NewReader(conn)
		if res, err := http.ReadResponse(r, nil); err != nil || res.StatusCode != 200 {
			t.Fatal(res, err)
		}
		_, _ = io.WriteString(conn, "x")
		if _, err := r.ReadByte(); err != nil {
			t.Fatal(err)
		}
		cancel()
		if _, err := r.ReadByte(); err == nil {
			t.Error("still open")
		}
		conn.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if err := b.server.ServeEgress(t.Context(), filepath.Join(socket, "no", "directory")); err == nil {
		t.Error("a socket nowhere")
	}
}

// FuzzRefusal: whatever an error says, the client reads one answer with that status.
func FuzzRefusal(f *testing.F) {
	f.Add("node m2: a\r\nSet-Cookie: b\r\n\r\n", false)
	f.Add("", true)
	f.Add(strings.Repeat("ä", 3000), false)
	f.Fuzz(func(t *testing.T, text string, timeout bool) {
		err := errors.New(text)
		want := http.StatusBadGateway
		if timeout {
			err, want = fmt.Errorf("%s %w", text, os.ErrDeadlineExceeded), http.StatusGatewayTimeout
		}
		r := bufio.NewReader(strings.NewReader(refusalHead(err)))
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode != want || len(res.Header) != 1 || r.Buffered() != 0 {
			t.Errorf("%d %v %d", res.StatusCode, res.Header, r.Buffered())
		}
	})
}
