// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/kedge-io/kedge/pkg/logging"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// TestSingleMemberMoves: the address of the only server changes.
func TestSingleMemberMoves(t *testing.T) {
	c := newCluster(t)
	cfg := c.config("m1")
	cfg.Bootstrap = true
	p := c.start(cfg).ready()
	c.put(p, "a", 3)
	p.stop()
	p.cfg.PeerAddress = freePort(t)
	p = c.start(p.cfg).ready()
	c.waitURL(c.members(p), "m1", p.cfg.peerURL())
	if n := c.count(p, "a"); n != 3 {
		t.Errorf("%d of 3 keys", n)
	}
	// A restart where nothing has changed leaves the notes alone.
	before, err := os.Stat(MemberFile(cfg.Dir))
	if err != nil {
		t.Fatal(err)
	}
	p.stop()
	c.start(p.cfg).ready()
	if after, err := os.Stat(MemberFile(cfg.Dir)); err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("%s was written again (%v)", MemberFile(cfg.Dir), err)
	}
}

func (c *cluster) waitURL(m *Members, name, url string) {
	c.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); c.list(m)[name] != "voter "+url; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			c.t.Fatalf("%s is not at %s: %v", name, url, c.list(m))
		}
	}
}

// TestMemberMoves: one of three servers gets another address while it is off. The others cannot reach it, it reaches them. The
// second time it has missed so much that it needs a snapshot, which the leader has to dial it for.
func TestMemberMoves(t *testing.T) {
	c := newCluster(t)
	few := []string{"--snapshot-count=100", "--snapshot-catchup-entries=5"}
	first := c.config("m1")
	first.Bootstrap, first.Args = true, few
	m1 := c.start(first).ready()
	m := c.members(m1)
	var others []*proc
	for _, name := range []string{"m2", "m3"} {
		cfg := c.config(name)
		cfg.Args = few
		others = append(others, c.join(m, cfg))
	}
	m3 := others[1]
	for _, missed := range []int{0, 400} {
		m3.stop()
		c.put(m1, "a", missed)
		m3.cfg.PeerAddress = freePort(t)
		m3 = c.start(m3.cfg).ready()
		c.waitURL(m, "m3", m3.cfg.peerURL())
		if n := c.count(m3, "a"); n != missed {
			t.Errorf("m3 has %d of %d keys", n, missed)
		}
	}
	// The cluster lives on with the moved one and one other.
	others[0].stop()
	c.put(m1, "b", 1)

	// Without a majority it says who is missing.
	m3.stop()
	m1.wait("waiting, with the names", func(s supervise.State, r string) bool {
		return s == supervise.Running && r == "waiting for a leader: 1 of 3 members answer (m2, m3 do not)"
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := m.List(ctx)
	expect(t, err, ErrNoLeader, "--cluster-reset")
	ctx, cancel = context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err = membersFromPeers(ctx, []string{m1.cfg.peerURL(), m3.cfg.peerURL()}, c.files)
	expect(t, err, ErrNoLeader, m1.cfg.peerURL(), m3.cfg.peerURL())
	// One that cannot get ready can be stopped.
	m1.stop()
	m1 = c.start(m1.cfg)
	m1.wait("waiting", func(_ supervise.State, r string) bool { return strings.HasPrefix(r, "waiting for a leader") })
	m1.stop()
	others[0] = c.start(others[0].cfg)
	c.start(m1.cfg).ready()
	others[0].ready()
}

// TestClientsOnOtherMachines: a certificate of etcd's CA opens the client port, and nothing else does.
func TestClientsOnOtherMachines(t *testing.T) {
	c := newCluster(t)
	cfg := c.config("m1")
	cfg.Bootstrap, cfg.ClientListen = true, freePort(t)
	p := c.start(cfg).ready()
	if info, err := os.Stat(cfg.Socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", info, err)
	}
	conf, err := c.files.ClientConfig()
	if err != nil {
		t.Fatal(err)
	}
	m, err := NewMembers("https://"+cfg.ClientListen.String(), conf)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if got := c.list(m); got["m1"] != "voter "+p.cfg.peerURL() {
		t.Errorf("got %v", got)
	}
	cl, err := clientv3.New(clientv3.Config{Endpoints: []string{"https://" + cfg.ClientListen.String()}, Logger: zap.NewNop(),
		TLS: &tls.Config{RootCAs: conf.RootCAs}})
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := cl.Get(ctx, "a"); err == nil {
		t.Error("a client without a certificate is served")
	}
}

// TestProbe: what a peer port tells.
func TestProbe(t *testing.T) {
	c := newCluster(t)
	cfg := c.config("m1")
	cfg.Bootstrap = true
	c.start(cfg).ready()
	conf, err := c.files.ClientConfig()
	if err != nil {
		t.Fatal(err)
	}
	mute, err := net.Listen("tcp", "127.0.0.1:0") // as a frozen process: the kernel accepts
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	nobody := PeerURL(freePort(t))
	stranger, err := testFiles(t, c.log).ClientConfig()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		tls  *tls.Config
		urls []string
		want life
	}{
		{"a member", conf, []string{nobody, cfg.peerURL()}, serving},
		{"a frozen one", conf, []string{"https://" + mute.Addr().String()}, open},
		{"one of another cluster", stranger, []string{cfg.peerURL()}, open},
		{"nobody", conf, []string{nobody}, dead},
		{"no address", conf, nil, dead},
	} {
		if got := newPeerClient(tt.tls).probe(t.Context(), tt.urls); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.name, got, tt.want)
		}
	}
}

func TestWhoAnswers(t *testing.T) {
	others := []Member{{ID: "2", Name: "m2"}, {ID: "3", PeerURLs: []string{"https://192.0.2.3:2380"}}}
	for _, tt := range []struct {
		seen map[string]life
		want string
	}{
		{map[string]life{"2": serving, "3": serving}, "waiting for a leader: all 3 members answer"},
		{map[string]life{"2": serving, "3": open}, "waiting for a leader: 2 of 3 members answer (192.0.2.3:2380 does not)"},
		{nil, "waiting for a leader: 1 of 3 members answer (192.0.2.3:2380, m2 do not)"},
	} {
		if got := whoAnswers(others, tt.seen); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}

func TestGoneFrom(t *testing.T) {
	m := &member{id: Identity{ID: "a", ClusterID: "c", Name: "m1"}}
	if err := m.goneFrom("c", []Member{{ID: "a"}}); err != nil {
		t.Error(err)
	}
	expect(t, m.goneFrom("c", []Member{{ID: "b"}}), ErrRemoved, "unknown to the others")
	expect(t, m.goneFrom("d", []Member{{ID: "a"}}), ErrRemoved, "cluster d", "cluster c")
}

// TestTend: who is removed, and when.
func TestTend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now()
		silentFrom := map[string]time.Duration{"silent": 0, "dies": time.Minute, "slow": time.Hour}
		removedAt := map[string]time.Duration{}
		done := make(chan struct{})
		go func() {
			defer close(done)
			tend(ctx, tender{
				learners: func(context.Context) ([]Member, error) {
					var list []Member
					for id := range silentFrom {
						if _, gone := removedAt[id]; !gone {
							list = append(list, Member{ID: id})
						}
					}
					return list, nil
				},
				alive:  func(_ context.Context, m Member) bool { return time.Since(start) < silentFrom[m.ID] },
				remove: func(_ context.Context, m Member) error { removedAt[m.ID] = time.Since(start); return nil },
			}, slog.New(slog.DiscardHandler))
		}()
		time.Sleep(20 * time.Minute)
		cancel()
		<-done
		for id, want := range map[string]time.Duration{"silent": 35 * time.Second, "dies": 85 * time.Second, "slow": 10*time.Minute + 5*time.Second} {
			if removedAt[id] != want {
				t.Errorf("%s is removed after %s, want %s", id, removedAt[id], want)
			}
		}
	})
}

// lines keeps messages.
type lines struct {
	slog.Handler
	got *[]string
}

func (l lines) Enabled(context.Context, slog.Level) bool { return true }
func (l lines) Handle(_ context.Context, r slog.Record) error {
	line := r.Message
	r.Attrs(func(a slog.Attr) bool { line += " " + a.String(); return true })
	*l.got = append(*l.got, line)
	return nil
}

func TestQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []string
		log := logging.Zap(slog.New(lines{slog.DiscardHandler, &got})).WithOptions(zap.WrapCore(quiet))
		for range 24 {
			log.Warn("prober detected unhealthy status")
			log.With(zap.Int("n", 1)).Debug("other")
			time.Sleep(5 * time.Second)
		}
		warned := slices.DeleteFunc(got, func(s string) bool { return strings.HasPrefix(s, "other") })
		if len(warned) != 6 || warned[3] != "prober detected unhealthy status left-out=9" {
			t.Errorf("got %q", warned)
		}
	})
}
