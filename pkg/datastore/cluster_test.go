// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// cluster is a place for real members with real certificates in this process.
type cluster struct {
	t     *testing.T
	dir   string
	files TLSFiles
	log   *slog.Logger
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	dir := t.TempDir()
	t.Parallel() // members mostly wait
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("DATASTORE_TEST_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	return &cluster{t: t, dir: dir, log: log, files: testFiles(t, log)}
}

// testFiles are certificates of a new CA.
func testFiles(t *testing.T, log *slog.Logger) TLSFiles {
	t.Helper()
	p, err := pki.Ensure(t.Context(), pki.Config{
		Dir: t.TempDir(), NodeName: "m", NodeIPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")},
		ServiceIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")}, Logger: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	return TLSFiles{Cert: p.CertFile(pki.EtcdPeer), Key: p.KeyFile(pki.EtcdPeer), CA: p.CertFile(pki.EtcdCA)}
}

func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String())
}

// proc is what a supervisor would see of one [etcd] process.
type proc struct {
	t   *testing.T
	cfg Config

	cancel context.CancelFunc
	done   chan struct{}
	err    error

	mu     sync.Mutex
	state  supervise.State
	reason string
	past   []string
}

// config is that of a member that has never run.
func (c *cluster) config(name string) Config {
	return Config{Name: name, Dir: filepath.Join(c.dir, name, "etcd"), Socket: filepath.Join(c.dir, name+".sock"), PeerAddress: freePort(c.t),
		PeerCert: c.files.Cert, PeerKey: c.files.Key, PeerCA: c.files.CA}
}

func (c *cluster) start(cfg Config) *proc {
	c.t.Helper()
	if err := os.MkdirAll(filepath.Dir(cfg.Dir), 0o700); err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &proc{t: c.t, cfg: cfg, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.err = run(ctx, cfg, func(s supervise.State, reason string) {
			p.mu.Lock()
			defer p.mu.Unlock()
			if s != p.state || reason != p.reason {
				p.past = append(p.past, string(s)+": "+reason)
			}
			p.state, p.reason = s, reason
		}, c.log.With("member", cfg.Name))
	}()
	c.t.Cleanup(p.stop)
	return p
}

// stop ends the process as the supervisor does.
func (p *proc) stop() { p.cancel(); <-p.done }

func (p *proc) status() (supervise.State, string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state, p.reason
}

func (p *proc) wait(what string, ok func(supervise.State, string) bool) {
	p.t.Helper()
	for deadline := time.Now().Add(40 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		state, reason := p.status()
		if ok(state, reason) {
			return
		}
		select {
		case <-p.done:
			p.t.Fatalf("%s: not %s: ended: %v", p.cfg.Name, what, p.err)
		default:
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("%s: not %s: %s %q, before that %q", p.cfg.Name, what, state, reason, p.past)
		}
	}
}

func (p *proc) ready() *proc {
	p.t.Helper()
	p.wait("ready", func(s supervise.State, _ string) bool { return s == supervise.Ready })
	return p
}

func (p *proc) learner() *proc {
	p.t.Helper()
	p.wait("a learner", func(s supervise.State, r string) bool { return s == supervise.Running && r == ReasonLearner })
	return p
}

// ended waits for an end that nobody asked for.
func (p *proc) ended() error {
	p.t.Helper()
	select {
	case <-p.done:
		return p.err
	case <-time.After(40 * time.Second):
		state, reason := p.status()
		p.t.Fatalf("%s does not end: %s %q", p.cfg.Name, state, reason)
		return nil
	}
}

func (c *cluster) members(p *proc) *Members {
	c.t.Helper()
	tls, err := c.files.ClientConfig()
	if err != nil {
		c.t.Fatal(err)
	}
	m, err := NewMembers(Endpoint(p.cfg.Socket), tls)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { m.Close() })
	return m
}

// join does what a joining server and the join API do together.
func (c *cluster) join(m *Members, cfg Config) *proc {
	c.t.Helper()
	id, all, err := m.Add(c.t.Context(), cfg.Name, cfg.peerURL())
	if err != nil {
		c.t.Fatal(err)
	}
	cfg.InitialCluster = all
	p := c.start(cfg).learner()
	c.promote(m, id)
	return p.ready()
}

func (c *cluster) promote(m *Members, nameOrID string) {
	c.t.Helper()
	err := supervise.Poll(c.t.Context(), func() error {
		err := m.Promote(c.t.Context(), nameOrID)
		if err != nil && !errors.Is(err, ErrNotReady) {
			c.t.Fatal(err)
		}
		return err
	})
	if err != nil {
		c.t.Fatal(err)
	}
}

// three starts a cluster of three voters.
func (c *cluster) three() (m1, m2, m3 *proc) {
	c.t.Helper()
	first := c.config("m1")
	first.Bootstrap = true
	m1 = c.start(first).ready()
	m := c.members(m1)
	return m1, c.join(m, c.config("m2")), c.join(m, c.config("m3"))
}

func (c *cluster) client(p *proc) *clientv3.Client {
	c.t.Helper()
	cl, err := clientv3.New(clientv3.Config{Endpoints: []string{Endpoint(p.cfg.Socket)}, DialTimeout: 5 * time.Second})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { cl.Close() })
	return cl
}

func (c *cluster) put(p *proc, prefix string, n int) {
	c.t.Helper()
	cl := c.client(p)
	for i := range n {
		ctx, cancel := context.WithTimeout(c.t.Context(), 20*time.Second)
		_, err := cl.Put(ctx, fmt.Sprintf("%s%d", prefix, i), strings.Repeat("v", 100))
		cancel()
		if err != nil {
			c.t.Fatal(err)
		}
	}
}

func (c *cluster) count(p *proc, prefix string) int {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 20*time.Second)
	defer cancel()
	resp, err := c.client(p).Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		c.t.Fatal(err)
	}
	return int(resp.Count)
}

// list is the members as "name url voter|learner", for comparisons.
func (c *cluster) list(m *Members) map[string]string {
	c.t.Helper()
	all, err := m.List(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	list := map[string]string{}
	for _, o := range all {
		role := "voter"
		if o.Learner {
			role = "learner"
		}
		list[o.Name] = role + " " + strings.Join(o.PeerURLs, ",")
	}
	return list
}

func id(t *testing.T, p *proc) string {
	t.Helper()
	who, err := ReadMember(p.cfg.Dir)
	if err != nil || who == nil {
		t.Fatalf("no identity of %s: %v", p.cfg.Name, err)
	}
	return who.ID
}

// membersFromPeers asks the members at urls, by their peer ports, for what the cluster has agreed on.
func membersFromPeers(ctx context.Context, urls []string, files TLSFiles) ([]Member, error) {
	c, err := files.ClientConfig()
	if err != nil {
		return nil, err
	}
	_, members, err := newPeerClient(c).first(ctx, urls)
	return members, err
}
