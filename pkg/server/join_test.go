// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bytes"
	"encoding/json"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/pki"
)

// What a server is to its cluster, by what it finds on its disk and was told. No server answers in this test.
func TestEnter(t *testing.T) {
	joined, made := &agent.Membership{Cluster: clusterSettings(), Joined: true}, &agent.Membership{Cluster: clusterSettings()}
	joins := func(c *config.Config) { c.Server = "https://127.0.0.1:1" } // without a token: it says so before it waits
	noEtcd := func(c *config.Config) { c.DisableEtcd = true }
	external := func(c *config.Config) { c.Datastore.Endpoints = []string{"https://e:2379"} }
	const needsToken = "a token is needed to join https://127.0.0.1:1: give --token (on a server: kedge token create --role server)"
	for _, test := range []struct {
		name          string
		change        func(*config.Config)
		known         *agent.Membership
		data, removed bool
		want          string // of the error; empty: it goes on
		bootstrap     bool
		remembers     *agent.Membership // what is written; nil: nothing
		moved         bool
	}{
		{name: "nothing at all", bootstrap: true, remembers: made},
		{name: "an interrupted first start", known: made, bootstrap: true, remembers: made},
		{name: "goes on", known: made, data: true},
		{name: "goes on after it has joined", known: joined, data: true},
		{name: "goes on in spite of --server", change: joins, known: joined, data: true},
		{name: "data of a version that kept no membership", data: true, remembers: made},

		{name: "told of another server", change: joins, want: needsToken},
		{name: "an interrupted join", change: joins, known: joined, want: needsToken},
		{name: "an interrupted join, without --server", known: joined,
			want: "this server joined a cluster, but its datastore DIR is empty: to join again, give --server and --token"},

		{name: "removed", known: joined, data: true, removed: true,
			want: "this server was removed from its cluster (noticed 2026-11-24T10:00:00Z), and cannot take part again by itself: no other server that is known here counts on it"},
		{name: "removed, told of another server", change: joins, known: joined, data: true, removed: true, want: needsToken, moved: true, remembers: joined},
		{name: "removed, made the cluster, told of another server", change: joins, known: made, data: true, removed: true, want: needsToken, moved: true, remembers: joined},
		{name: "removed, the first server of its cluster", known: made, data: true, removed: true, want: "this server was removed from its cluster"},
		{name: "removed, data moved aside already", change: joins, known: joined, removed: true, want: needsToken, remembers: joined},

		{name: "no member, goes on", change: noEtcd, known: joined},
		{name: "no member, joins", change: func(c *config.Config) { noEtcd(c); joins(c) }, want: needsToken},
		{name: "first without datastore", change: func(c *config.Config) { c.DisableEtcd = true }, want: "the first server of a cluster needs both"},
		{name: "first without control plane", change: func(c *config.Config) { c.DisableControl = true }, want: "the first server of a cluster needs both"},
		{name: "without datastore, goes on", change: func(c *config.Config) { c.DisableEtcd = true }, known: joined, remembers: nil},
		{name: "etcd of the operator, first", change: external, bootstrap: true, remembers: made},
		{name: "etcd of the operator, goes on", change: external, known: made},
		{name: "etcd of the operator, joins", change: func(c *config.Config) { external(c); joins(c) }, want: needsToken},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := testServer(t, test.change)
			if test.data {
				s.withData(t)
			}
			if test.removed {
				s.removed(t)
			}
			err := s.enter(t.Context(), test.known)
			if want := strings.ReplaceAll(test.want, "DIR", s.etcdDir()); (err == nil) != (want == "") || err != nil && !strings.HasPrefix(err.Error(), want) {
				t.Errorf("got %v, want %q", err, want)
			}
			if s.bootstrap != test.bootstrap || s.joining != nil {
				t.Errorf("bootstrap %v, joining %v", s.bootstrap, s.joining)
			}
			if remembered, err := agent.Recall(s.cfg); err != nil || !reflect.DeepEqual(remembered, test.remembers) {
				t.Errorf("remembers %+v, %v", remembered, err)
			}
			if moved := s.stale(t); len(moved) > 0 != test.moved || datastore.HasMember(s.etcdDir()) != (test.data && !test.moved) {
				t.Errorf("moved %v, there is data: %v", moved, datastore.HasMember(s.etcdDir()))
			}
			removed, err := datastore.ReadRemoved(s.etcdDir())
			if keeps := test.removed && s.cfg.Server == ""; (removed != nil) != keeps || err != nil {
				t.Errorf("note of the removal: %+v, %v", removed, err)
			}
		})
	}
}

// A note that cannot be read says nothing: the start does not go on as if there were none.
func TestEnterWithDamagedNote(t *testing.T) {
	s := testServer(t, nil)
	write(t, datastore.RemovedFile(s.etcdDir()), "{")
	if err := s.enter(t.Context(), nil); err == nil || !strings.Contains(err.Error(), datastore.RemovedFile(s.etcdDir())) || s.bootstrap {
		t.Errorf("got %v, bootstrap %v", err, s.bootstrap)
	}
}

// joiner is a server that was told of the cluster.
func (c *testCluster) joiner(t *testing.T, change func(*config.Config)) *server {
	t.Helper()
	return testServer(t, func(cfg *config.Config) {
		cfg.Server, cfg.Token = c.URL, c.token.Text()
		if change != nil {
			change(cfg)
		}
	})
}

// A server that joins gets the cluster's settings and keys and becomes a learner. While another one joins it waits, with what it has.
func TestJoin(t *testing.T) {
	const (
		sign   = "sign system:kedge:server:n2 of system:kedge:servers"
		keys   = "keys for system:kedge:server:n2"
		member = "member n2 at https://192.0.2.7:2380 for system:kedge:server:n2"
	)
	for _, test := range []struct {
		name   string
		change func(*config.Config)
		busy   int
		calls  map[string]int
		member bool
	}{
		{"at once", nil, 0, map[string]int{sign: 1, keys: 1, member: 1}, true},
		{"after another", nil, 2, map[string]int{sign: 1, keys: 3, member: 3}, true},
		{"without a datastore member", func(c *config.Config) { c.DisableEtcd = true }, 0, map[string]int{sign: 1, keys: 1}, false},
		{"with the operator's etcd", func(c *config.Config) { c.Datastore.Endpoints = []string{"https://e:2379"} }, 0, map[string]int{sign: 1, keys: 1}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newCluster(t)
			c.settings.ClusterDomain, c.busy = "edge.example", test.busy
			s := c.joiner(t, test.change)
			if err := s.enter(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			if got := c.called(); !maps.Equal(got, test.calls) {
				t.Errorf("the cluster was asked %v", got)
			}
			for name, want := range c.shared() {
				if got, err := os.ReadFile(filepath.Join(s.cfg.PKIDir(), name)); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s is not the cluster's (%v)", name, err)
				}
			}
			if s.cfg.ClusterDomain != "edge.example" || s.bootstrap {
				t.Errorf("domain %s, bootstrap %v", s.cfg.ClusterDomain, s.bootstrap)
			}
			if known, err := agent.Recall(s.cfg); err != nil || known == nil || !known.Joined || known.Cluster.ClusterDomain != "edge.example" {
				t.Errorf("remembers %+v, %v", known, err)
			}
			if (s.joining != nil) != test.member {
				t.Fatalf("joining %+v", s.joining)
			}
			var err error
			if s.pki, err = pki.Ensure(t.Context(), s.pkiConfig()); err != nil || s.pki.CAHash() != c.pki.CAHash() {
				t.Fatalf("keys of its own: %v", err)
			}
			if test.member {
				want := []datastore.Member{{Name: "n1", ID: "1", PeerURLs: []string{"https://192.0.2.1:2380"}}, {ID: "2", PeerURLs: []string{"https://192.0.2.7:2380"}, Learner: true}}
				if got := s.etcdConfig(); !reflect.DeepEqual(got.InitialCluster, want) || got.Bootstrap {
					t.Errorf("initial cluster %+v, bootstrap %v", got.InitialCluster, got.Bootstrap)
				}
			}
		})
	}
}

// Whoever cannot be part of the cluster gets no keys of it, or writes none.
func TestJoinRefused(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*config.Config)
		have   string // in the PKI directory, of another cluster
		want   string
		asked  bool // for keys
	}{
		{name: "another network", change: func(c *config.Config) {
			c.ClusterCIDR, c.Given["cluster-cidr"] = config.Prefixes{netip.MustParsePrefix("10.9.0.0/16")}, "--cluster-cidr"
		}, want: "--cluster-cidr: 10.9.0.0/16 contradicts the cluster, which was made with 10.42.0.0/16"},
		{name: "an address of a pod", change: func(c *config.Config) { c.NodeIP = []netip.Addr{netip.MustParseAddr("10.42.3.4")} },
			want: "default of node-ip: 10.42.3.4 lies inside of cluster-cidr 10.42.0.0/16 (the cluster's cluster-cidr)"},
		{name: "keys of another cluster", have: "client-ca.key", want: "client-ca.key is that of another cluster", asked: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newCluster(t)
			s := c.joiner(t, test.change)
			if test.have != "" {
				write(t, filepath.Join(s.cfg.PKIDir(), test.have), "another cluster's")
			}
			if err := s.enter(t.Context(), nil); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			calls := c.called()
			if (calls["keys for system:kedge:server:n2"] > 0) != test.asked || calls["member n2 at https://192.0.2.7:2380 for system:kedge:server:n2"] > 0 {
				t.Errorf("the cluster was asked %v", calls)
			}
			files, _ := os.ReadDir(s.cfg.PKIDir())
			if known, err := agent.Recall(s.cfg); known != nil || err != nil || len(files) > 1 {
				t.Errorf("remembers %+v, %v; keys %v", known, err, files)
			}
		})
	}
}

// A server whose member was removed takes part again by its keys alone where the cluster still counts on it.
func TestComeBack(t *testing.T) {
	const (
		byKeys  = "member n2 at https://192.0.2.7:2380 for system:kedge:server:n2"
		byToken = "sign system:kedge:server:n2 of system:kedge:servers"
	)
	for _, test := range []struct {
		name   string
		server bool // --server and a token were given
		known  bool // another server is in servers.json
		listed bool // and counts on this one
		busy   int
		want   string
		calls  map[string]int
	}{
		{name: "counted on", known: true, listed: true, calls: map[string]int{byKeys: 1}},
		{name: "counted on, after another", known: true, listed: true, busy: 1, calls: map[string]int{byKeys: 2}},
		{name: "counted on, with a token", server: true, known: true, listed: true, calls: map[string]int{byKeys: 1}},
		{name: "removed for good", known: true, want: "cannot take part again by itself: no other server that is known here counts on it"},
		{name: "removed for good, with a token", server: true, known: true, calls: map[string]int{byToken: 1, byKeys: 1, "keys for system:kedge:server:n2": 1}},
		{name: "no server is known", want: "cannot take part again by itself"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newCluster(t)
			c.busy = test.busy
			if test.listed {
				c.registry["n2"] = `{"address":"192.0.2.7:6443","etcd":true,"controlPlane":true}`
			}
			s := testServer(t, func(cfg *config.Config) {
				if test.server {
					cfg.Server, cfg.Token = c.URL, c.token.Text()
				}
			})
			s.withData(t)
			s.removed(t)
			if err := pki.Import(s.cfg.PKIDir(), c.shared()); err != nil {
				t.Fatal(err)
			}
			if test.known {
				text, err := json.Marshal(map[string]any{"servers": []string{"127.0.0.1:1", c.address()}})
				if err != nil {
					t.Fatal(err)
				}
				write(t, agent.BalancerFile(s.cfg), string(text))
			}
			err := s.enter(t.Context(), &agent.Membership{Cluster: clusterSettings(), Joined: true})
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			if got := c.called(); !maps.Equal(got, test.calls) {
				t.Errorf("the cluster was asked %v", got)
			}
			moved := s.stale(t)
			if back := test.want == ""; (len(moved) == 1) != back || datastore.HasMember(s.etcdDir()) == back || (s.joining != nil) != back {
				t.Errorf("moved %v, there is data: %v, joining %v", moved, datastore.HasMember(s.etcdDir()), s.joining)
			}
			if len(moved) == 1 && !datastore.HasMember(moved[0]) {
				t.Errorf("the old data is not in %s", moved[0])
			}
		})
	}
}
