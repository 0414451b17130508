// SPDX-License-Identifier: Apache-2.0

package server

import (
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/controlplane"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/pki"
)

func TestCheckOptions(t *testing.T) {
	cfg := &config.Config{Role: config.RoleServer,
		DataDir: "/d", KubeletRootDir: "/k", NodeName: "n", BindAddress: netip.MustParseAddr("0.0.0.0"), HTTPSListenPort: 443,
		Cluster: config.Cluster{ClusterDNS: netip.MustParseAddr("10.43.0.10"), ProxyMode: config.ProxyAuto,
			FlannelBackend: config.FlannelHostGW, Disable: []string{config.ComponentCoreDNS}},
		DisableKubeProxy: true,
	}
	o := CheckOptions(cfg)
	if o.DataDir != "/d" || o.KubeletDir != "/k" || o.NodeName != "n" || o.ProxyMode != "none" || o.FlannelBackend != "host-gw" {
		t.Errorf("got %+v", o)
	}
	var ports []string
	for _, p := range o.Ports {
		ports = append(ports, p.String())
	}
	if got := strings.Join(ports, " "); got != "443/tcp 2380/tcp 127.0.0.1:6444/tcp 10250/tcp" {
		t.Errorf("ports %s", got)
	}
}

// Only what operators chose is made known to the cluster; what a cluster made is known to it.
func TestOperatorTokens(t *testing.T) {
	made, err := join.New()
	if err != nil {
		t.Fatal(err)
	}
	own, err := join.Parse("a-text-of-our-own")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "token")
	write(t, file, "\na-text-of-our-own\n")
	want := func(role join.Role) controlplane.OperatorToken {
		return controlplane.OperatorToken{ID: own.ID, Secret: own.Secret, Role: role}
	}
	for _, test := range []struct {
		name  string
		cfg   config.Config
		want  []controlplane.OperatorToken
		wrong string
	}{
		{name: "none"},
		{name: "made by a cluster", cfg: config.Config{Token: made.Text(), AgentToken: made.Bearer()}},
		{name: "own", cfg: config.Config{Token: "a-text-of-our-own"}, want: []controlplane.OperatorToken{want(join.Server)}},
		{name: "own for agents", cfg: config.Config{AgentToken: "a-text-of-our-own"}, want: []controlplane.OperatorToken{want(join.Agent)}},
		{name: "from files", cfg: config.Config{Token: made.Text(), AgentTokenFile: file}, want: []controlplane.OperatorToken{want(join.Agent)}},
		{name: "unusable", cfg: config.Config{Token: "short"}, wrong: "token: the token cannot be used: it has 5 characters"},
		{name: "unusable for agents", cfg: config.Config{AgentToken: "short"}, wrong: "agent-token: the token cannot be used"},
		{name: "missing file", cfg: config.Config{TokenFile: file + ".missing"}, wrong: "token-file: open "},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := (&server{cfg: &test.cfg}).operatorTokens()
			if (err == nil) != (test.wrong == "") || err != nil && !strings.HasPrefix(err.Error(), test.wrong) {
				t.Errorf("got %v, want %q", err, test.wrong)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

// Where the API server keeps its data.
func TestDatastoreConfig(t *testing.T) {
	ensure := func(change func(*config.Config)) *server {
		s := testServer(t, change)
		var err error
		if s.pki, err = pki.Ensure(t.Context(), s.pkiConfig()); err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := ensure(nil)
	d := s.datastoreConfig()
	if !d.Own || !slices.Equal(d.Endpoints, []string{"unix://" + s.cfg.RunDir + "/etcd.sock"}) || d.CAFile+d.CertFile+d.KeyFile != "" {
		t.Errorf("its own member: %+v", d)
	}
	if _, err := d.Peer.ClientConfig(); err != nil || d.Peer.Cert != s.pki.CertFile(pki.EtcdPeer) || d.Peer.CA != s.pki.TrustFile(pki.EtcdCA) {
		t.Errorf("peers: %+v, %v", d.Peer, err)
	}
	s = ensure(func(c *config.Config) { c.DisableEtcd = true })
	d = s.datastoreConfig()
	if !d.Own || !slices.Equal(d.Endpoints, []string{"https://127.0.0.1:2379"}) || d.CAFile != s.pki.TrustFile(pki.EtcdCA) ||
		d.CertFile != s.pki.CertFile(pki.EtcdPeer) || d.KeyFile != s.pki.KeyFile(pki.EtcdPeer) {
		t.Errorf("the members of others: %+v", d)
	}
	external := config.Datastore{Endpoints: []string{"https://e1:2379", "https://e2:2379"}, CAFile: "/ca", CertFile: "/cert", KeyFile: "/key"}
	s = ensure(func(c *config.Config) { c.Datastore = external })
	d = s.datastoreConfig()
	if d.Own || !slices.Equal(d.Endpoints, external.Endpoints) || d.CAFile != "/ca" || d.CertFile != "/cert" || d.KeyFile != "/key" || d.Peer != (datastore.TLSFiles{}) {
		t.Errorf("the operator's: %+v", d)
	}
}

// The datastore listens for servers without a member as long as there are some, and those know all members.
func TestFollowServers(t *testing.T) {
	const (
		n1       = `{"address":"192.0.2.1:6443","peerURL":"https://192.0.2.1:2380","etcd":true,"controlPlane":true}`
		v6       = `{"peerURL":"https://[2001:db8::3]:2380","etcd":true}`
		noMember = `{"address":"192.0.2.4:6443","controlPlane":true}`
		joining  = `{"etcd":true,"controlPlane":true}` // has not entered its address yet
	)
	servers := func(entries ...string) map[string]authority.Server {
		m := map[string]authority.Server{}
		for i, text := range entries {
			s, err := authority.ParseServer(text)
			if err != nil {
				t.Fatal(err)
			}
			m[fmt.Sprint("n", i)] = s
		}
		return m
	}
	t.Run("with a member", func(t *testing.T) {
		s := testServer(t, func(c *config.Config) { c.DisableAgent, c.LBServerPort = true, 0 })
		s.running(t)
		var err error
		if s.pki, err = pki.Ensure(t.Context(), s.pkiConfig()); err != nil {
			t.Fatal(err)
		}
		var said strings.Builder
		s.log = slog.New(slog.NewTextHandler(&said, nil))
		for i, step := range []struct {
			servers map[string]authority.Server
			listens bool
		}{
			{servers(n1), false}, {servers(n1, noMember), true}, {servers(n1, noMember, v6), true}, {servers(n1, v6), false}, {servers(), false},
		} {
			s.followServers(step.servers)
			want := netip.AddrPort{}
			if step.listens {
				want = netip.MustParseAddrPort("192.0.2.7:2379")
			}
			if got := s.etcdConfig().ClientListen; got != want {
				t.Errorf("step %d: it listens on %v, want %v", i, got, want)
			}
		}
		if said.Len() > 0 {
			t.Errorf("it said %s", said.String())
		}
	})
	t.Run("without", func(t *testing.T) {
		s := testServer(t, func(c *config.Config) { c.DisableEtcd = true })
		var err error
		if s.pki, err = pki.Ensure(t.Context(), s.pkiConfig()); err != nil {
			t.Fatal(err)
		}
		if s.datastores, err = s.datastoreBalancer(); err != nil {
			t.Fatal(err)
		}
		var said strings.Builder
		s.log = slog.New(slog.NewTextHandler(&said, nil))
		s.followServers(servers(n1, v6, noMember, joining))
		var got []string
		for _, m := range s.datastores.Servers() {
			got = append(got, m.Address)
		}
		slices.Sort(got)
		if want := []string{"192.0.2.1:2379", "[2001:db8::3]:2379"}; !slices.Equal(got, want) || said.Len() > 0 {
			t.Errorf("members %v, want %v; it said %s", got, want, said.String())
		}
		if s.serveEtcd.Load() {
			t.Error("it wants to restart a datastore that it does not have")
		}
	})
}
