// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/kedge-io/kedge/tests/testlog"
)

// nameserver is a DNS server on a free port of 127.0.0.1 that answers every A query with answer.
func nameserver(t *testing.T, answer string) netip.AddrPort {
	t.Helper()
	return serveUpstream(t, func(w miekg.ResponseWriter, r *miekg.Msg) {
		m := new(miekg.Msg).SetReply(r)
		m.Answer = []miekg.RR{&miekg.A{
			Hdr: miekg.RR_Header{Name: r.Question[0].Name, Rrtype: miekg.TypeA, Class: miekg.ClassINET, Ttl: 1}, A: net.ParseIP(answer),
		}}
		if err := w.WriteMsg(m); err != nil {
			t.Errorf("upstream: %v", err)
		}
	})
}

// serveUpstream starts a DNS server on a free port of 127.0.0.1.
func serveUpstream(t *testing.T, handler miekg.HandlerFunc) netip.AddrPort {
	t.Helper()
	port := freePort(t)
	addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
	for _, network := range []string{"udp", "tcp"} {
		started := make(chan struct{})
		srv := &miekg.Server{Addr: addr.String(), Net: network, Handler: handler, NotifyStartedFunc: func() { close(started) }}
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := srv.ListenAndServe(); err != nil {
				t.Errorf("upstream: %v", err)
			}
		})
		<-started
		t.Cleanup(func() { srv.Shutdown(); wg.Wait() })
	}
	return addr
}

// harness is a Server that runs on a free port of 127.0.0.1.
type harness struct {
	*Server
	t         *testing.T
	resolv    string
	upstreams sync.Map // netip.Addr in resolv.conf → netip.AddrPort
	stop      func()
}

func start(t *testing.T, change func(*Config)) *harness {
	t.Helper()
	dir := t.TempDir()
	cfg := Config{
		NodeName: "node-1", ClusterDomain: "cluster.local", Addr: netip.MustParseAddr("127.0.0.1"), Port: freePort(t),
		Kubeconfig: filepath.Join(dir, "missing.kubeconfig"), ResolvConf: filepath.Join(dir, "resolv.conf"),
		KubeletResolvConf: filepath.Join(dir, "kubelet-resolv.conf"), Dir: filepath.Join(dir, "dns"), MetricsAddr: MetricsOff,
	}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg, testlog.New(t))
	if err != nil {
		t.Fatal(err)
	}
	s.poll = 50 * time.Millisecond
	h := &harness{Server: s, t: t, resolv: cfg.ResolvConf}
	s.upstreamAt = func(a netip.Addr) netip.AddrPort {
		if v, ok := h.upstreams.Load(a); ok {
			return v.(netip.AddrPort)
		}
		return dnsPort(a)
	}
	return h
}

func (h *harness) run() {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	h.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				h.t.Errorf("Run: %v", err)
			}
		case <-time.After(20 * time.Second):
			h.t.Error("Run did not return")
		}
	})
	h.t.Cleanup(h.stop)
	eventually(h.t, "listening", func() error {
		if h.Status().Listen == "" {
			return h.Ready()
		}
		return nil
	})
}

func freePort(t *testing.T) uint16 {
	t.Helper()
	for range 20 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		pc, err := net.ListenPacket("udp", fmt.Sprintf("127.0.0.1:%d", port))
		l.Close()
		if err == nil {
			pc.Close()
			return uint16(port)
		}
	}
	t.Fatal("no port is free for both TCP and UDP")
	return 0
}

// eventually waits for f to succeed.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// writeResolv replaces resolv.conf the way DHCP clients do.
func (h *harness) writeResolv(text string) {
	h.t.Helper()
	if err := os.WriteFile(h.resolv+".new", []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Rename(h.resolv+".new", h.resolv); err != nil {
		h.t.Fatal(err)
	}
}

func (h *harness) query(network, name string, qtype uint16) (*miekg.Msg, error) {
	m := new(miekg.Msg).SetQuestion(miekg.Fqdn(name), qtype)
	m.SetEdns0(1232, false)
	c := miekg.Client{Net: network, Timeout: 3 * time.Second}
	r, _, err := c.Exchange(m, h.cfg.listen())
	return r, err
}

// answers fails unless the query gets an A record with want.
func (h *harness) answers(network, name, want string) error {
	r, err := h.query(network, name, miekg.TypeA)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if len(r.Answer) != 1 {
		return fmt.Errorf("%s: no answer, rcode %s", name, miekg.RcodeToString[r.Rcode])
	}
	if a, ok := r.Answer[0].(*miekg.A); !ok || a.A.String() != want {
		return fmt.Errorf("%s: got %v, want %s", name, r.Answer[0], want)
	}
	return nil
}

// rcode fails unless the query gets want, within a second.
func (h *harness) rcode(name string, want int) error {
	start := time.Now()
	r, err := h.query("udp", name, miekg.TypeA)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if r.Rcode != want {
		return fmt.Errorf("%s: got %s, want %s", name, miekg.RcodeToString[r.Rcode], miekg.RcodeToString[want])
	}
	if took := time.Since(start); took > time.Second {
		return fmt.Errorf("%s: took %s", name, took)
	}
	return nil
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
