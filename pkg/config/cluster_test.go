// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// testCluster is what a server without options makes, changed as a test needs it.
func testCluster(change func(*Cluster)) Cluster {
	c := Cluster{
		ClusterCIDR: Prefixes{netip.MustParsePrefix("10.42.0.0/16")}, ServiceCIDR: Prefixes{netip.MustParsePrefix("10.43.0.0/16")},
		ClusterDNS: netip.MustParseAddr("10.43.0.10"), ClusterDomain: "cluster.local",
		ServiceNodePortRange: PortRange{First: 30000, Last: 32767}, FlannelBackend: FlannelVXLAN, ProxyMode: ProxyAuto,
	}
	if change != nil {
		change(&c)
	}
	return c
}

func ipv6(c *Cluster) {
	c.ClusterCIDR, c.ServiceCIDR = Prefixes{netip.MustParsePrefix("fd00:42::/56")}, Prefixes{netip.MustParsePrefix("fd00:43::/112")}
	c.ClusterDNS = netip.MustParseAddr("fd00:43::a")
}

// A joining machine takes the cluster's settings, but for its proxy mode.
func TestAdopt(t *testing.T) {
	other := testCluster(func(c *Cluster) {
		c.ClusterCIDR, c.ServiceCIDR = Prefixes{netip.MustParsePrefix("10.200.0.0/16")}, Prefixes{netip.MustParsePrefix("10.201.0.0/16")}
		c.ClusterDNS, c.ClusterDomain = netip.MustParseAddr("10.201.0.10"), "edge.example"
		c.ServiceNodePortRange = PortRange{First: 1000, Last: 2000}
		c.FlannelBackend, c.ProxyMode, c.Disable = FlannelHostGW, ProxyNFTables, []string{ComponentCoreDNS}
	})
	for _, test := range []struct {
		name    string
		in      input
		cluster Cluster
		mode    ProxyMode
	}{
		{"everything is another", input{}, other, ProxyNFTables},
		{"an agent", input{role: RoleAgent}, other, ProxyNFTables},
		{"the proxy mode may differ", input{args: []string{"--proxy-mode=iptables"}}, other, ProxyIPTables},
		{"the default mode, given", input{args: []string{"--proxy-mode=auto"}}, other, ProxyAuto},
		{"the same values given", input{args: []string{"--cluster-cidr=10.200.0.0/16", "--service-cidr=10.201.0.0/16", "--cluster-domain=edge.example",
			"--service-node-port-range=1000-2000", "--flannel-backend=host-gw", "--disable=coredns"}}, other, ProxyNFTables},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, err := test.in.run(t, testMachine)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.adopt(test.cluster, nil, noLook); err != nil {
				t.Fatal(err)
			}
			want := test.cluster
			want.ProxyMode = test.mode
			if !reflect.DeepEqual(s.Cluster, want) {
				t.Errorf("got %+v, want %+v", s.Cluster, want)
			}
		})
	}
}

// noLook is for what must not depend on the machine.
func noLook() (machine, error) { return machine{}, errors.New("looked at the machine") }

func TestAdoptRefuses(t *testing.T) {
	flags := func(args ...string) input { return input{args: args} }
	for _, test := range []struct {
		name    string
		in      input
		cluster Cluster
		want    []string // a line each
	}{
		{"pods", flags("--cluster-cidr=10.9.0.0/16"), testCluster(nil), []string{
			"--cluster-cidr: 10.9.0.0/16 contradicts the cluster, which was made with 10.42.0.0/16; leave it out, every node takes it from the cluster"}},
		{"several, each with its source", input{env: []string{"KEDGE_CLUSTER_DOMAIN=a.example"}, args: []string{"--flannel-backend=host-gw", "--cluster-dns=10.43.0.53"},
			files: map[string]string{"config.yaml": "debug: true\nservice-node-port-range: 1-2\n"}}, testCluster(nil), []string{
			"--cluster-dns: 10.43.0.53 contradicts the cluster, which was made with 10.43.0.10",
			"KEDGE_CLUSTER_DOMAIN: a.example contradicts the cluster, which was made with cluster.local",
			"config.yaml:2: service-node-port-range: 1-2 contradicts the cluster, which was made with 30000-32767",
			"--flannel-backend: host-gw contradicts the cluster, which was made with vxlan"}},
		{"a component that the cluster has", flags("--disable=coredns"), testCluster(nil), []string{
			"--disable: coredns contradicts the cluster, which was made with nothing"}},
		{"floating addresses", flags("--servicelb-pool=198.51.100.8,198.51.100.5-198.51.100.6", "--api-vip=198.51.100.9"),
			testCluster(func(c *Cluster) { c.APIVIP = []netip.Addr{netip.MustParseAddr("198.51.100.7")} }), []string{
				"--servicelb-pool: 198.51.100.5-198.51.100.6,198.51.100.8 contradicts the cluster, which was made with nothing",
				"--api-vip: 198.51.100.9 contradicts the cluster, which was made with 198.51.100.7"}},
		{"node in the pods' network", input{role: RoleAgent}, testCluster(func(c *Cluster) { c.ClusterCIDR = Prefixes{netip.MustParsePrefix("192.0.0.0/16")} }), []string{
			"default of node-ip: 192.0.2.7 lies inside of cluster-cidr 192.0.0.0/16 (the cluster's cluster-cidr); give this node another address with node-ip"}},
		{"node in the services' network", input{role: RoleAgent, args: []string{"--node-ip=198.51.100.7"}},
			testCluster(func(c *Cluster) { c.ServiceCIDR = Prefixes{netip.MustParsePrefix("198.51.100.0/24")} }), []string{
				"--node-ip: 198.51.100.7 lies inside of service-cidr 198.51.100.0/24 (the cluster's service-cidr); give this node another address"}},
		{"advertised address in the pods' network", flags("--advertise-address=203.0.113.9"),
			testCluster(func(c *Cluster) { c.ClusterCIDR = Prefixes{netip.MustParsePrefix("203.0.113.0/24")} }), []string{
				"--advertise-address: 203.0.113.9 lies inside of cluster-cidr 203.0.113.0/24 (the cluster's cluster-cidr)"}},
		{"given address of the other family", input{role: RoleAgent, args: []string{"--node-ip=192.0.2.7"}}, testCluster(ipv6), []string{
			"--node-ip: 192.0.2.7 is not of the first address family of cluster-cidr fd00:42::/56 (the cluster's cluster-cidr)"}},
		{"no settings at all", flags(), Cluster{}, []string{"settings are incomplete: there is no "}},
		{"no domain", flags(), testCluster(func(c *Cluster) { c.ClusterDomain = "" }), []string{"settings are incomplete: there is no cluster-domain"}},
		{"no services", flags(), testCluster(func(c *Cluster) { c.ServiceCIDR = nil }), []string{"settings are incomplete: there is no service-cidr"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, err := test.in.run(t, testMachine)
			if err != nil {
				t.Fatal(err)
			}
			err = s.adopt(test.cluster, nil, testMachine)
			if err == nil {
				t.Fatalf("accepted: %+v", s)
			}
			lines := strings.Split(err.Error(), "\n")
			if len(lines) != len(test.want) {
				t.Errorf("%d lines instead of %d:\n%v", len(lines), len(test.want), err)
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error does not say %q:\n%v", want, err)
				}
			}
		})
	}
}

// What was chosen by the family of the default network is chosen anew in a cluster of the other one.
func TestAdoptOtherFamily(t *testing.T) {
	for _, test := range []struct {
		name                  string
		in                    input
		node, bind, advertise string
	}{
		{"server", input{}, "2001:db8::7", "::", "2001:db8::7"},
		{"agent that starts again without --server", input{role: RoleAgent}, "2001:db8::7", "::", "2001:db8::7"},
		{"given addresses stay", input{args: []string{"--server=h", "--node-ip=2001:db8::7", "--bind-address=2001:db8::7"}}, "2001:db8::7", "2001:db8::7", "2001:db8::7"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, err := test.in.run(t, testMachine)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.adopt(testCluster(ipv6), nil, testMachine); err != nil {
				t.Fatal(err)
			}
			if len(s.NodeIP) != 1 || s.NodeIP[0].String() != test.node || s.BindAddress.String() != test.bind || s.AdvertiseAddress.String() != test.advertise {
				t.Errorf("node %v, bind %v, advertise %v", s.NodeIP, s.BindAddress, s.AdvertiseAddress)
			}
		})
	}
}

// Until a joining machine knows the cluster's networks, the defaults say nothing about its address.
func TestJoinerKnowsNoNetworks(t *testing.T) {
	look := func() (machine, error) {
		m, err := testMachine()
		m.links[1].addresses = addresses("10.42.0.7")
		return m, err
	}
	if _, err := (input{}).run(t, look); err == nil || !strings.Contains(err.Error(), "10.42.0.7 lies inside of cluster-cidr") {
		t.Errorf("a server that makes the cluster: %v", err)
	}
	for name, in := range map[string]input{
		"agent":          {role: RoleAgent},
		"joining server": {args: []string{"--server=192.0.2.1"}},
	} {
		s, err := in.run(t, look)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := s.adopt(testCluster(nil), nil, noLook); err == nil || !strings.Contains(err.Error(), "10.42.0.7 lies inside of cluster-cidr") {
			t.Errorf("%s in a cluster whose pods have that network: %v", name, err)
		}
	}
	in := input{args: []string{"--server=192.0.2.1", "--cluster-cidr=10.42.0.0/17"}}
	if _, err := in.run(t, look); err == nil || !strings.Contains(err.Error(), "10.42.0.7 lies inside of cluster-cidr 10.42.0.0/17") {
		t.Errorf("a joining server that was told the network: %v", err)
	}
}

func TestAdoptAgain(t *testing.T) {
	const pool, vip = "servicelb-pool", "api-vip"
	cluster := testCluster(func(c *Cluster) {
		c.ServiceLBPool = []AddressRange{{netip.MustParseAddr("198.51.100.5"), netip.MustParseAddr("198.51.100.6")}}
		c.APIVIP = []netip.Addr{netip.MustParseAddr("198.51.100.9")}
	})
	const clusterPool, clusterVIP = "198.51.100.5-198.51.100.6", "198.51.100.9"
	for name, test := range map[string]struct {
		args            []string
		asked           map[string]string
		changes, others []string
		pool, vip       string
		err             string
	}{
		"nothing given":            {pool: clusterPool, vip: clusterVIP},
		"as at the last start":     {args: []string{"--servicelb-pool=" + clusterPool}, asked: map[string]string{pool: clusterPool}, pool: clusterPool, vip: clusterVIP},
		"another value":            {args: []string{"--servicelb-pool=198.51.100.16/28"}, asked: map[string]string{pool: clusterPool}, changes: []string{pool}, pool: "198.51.100.16-198.51.100.31", vip: clusterVIP},
		"given for the first time": {args: []string{"--api-vip=198.51.100.7"}, changes: []string{vip}, pool: clusterPool, vip: "198.51.100.7"},
		"not given any more":       {asked: map[string]string{pool: clusterPool, vip: clusterVIP}, changes: []string{pool, vip}, pool: "nothing", vip: "nothing"},
		"changed elsewhere":        {args: []string{"--servicelb-pool=198.51.100.1"}, asked: map[string]string{pool: "198.51.100.1"}, others: []string{pool}, pool: clusterPool, vip: clusterVIP},
		"of an earlier version":    {args: []string{"--servicelb-pool=" + clusterPool}, changes: []string{pool}, pool: clusterPool, vip: clusterVIP},
		"does not fit":             {args: []string{"--api-vip=198.51.100.5"}, err: "--api-vip: 198.51.100.5 is in servicelb-pool"},
		"still a contradiction":    {args: []string{"--cluster-cidr=10.9.0.0/16"}, err: "--cluster-cidr: 10.9.0.0/16 contradicts the cluster"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := input{args: append(test.args, "--node-ip=192.0.2.7")}.run(t, testMachine)
			if err != nil {
				t.Fatal(err)
			}
			changes, others, err := s.AdoptAgain(cluster, test.asked)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error %v, want %q", err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(changes, test.changes) || !slices.Equal(others, test.others) || text(s.ServiceLBPool) != test.pool || text(s.APIVIP) != test.vip {
				t.Errorf("changes %v, others %v, %s, %s", changes, others, text(s.ServiceLBPool), text(s.APIVIP))
			}
			made := cluster
			made.Change(s.Cluster, changes)
			if got := s.Changed(made); len(got) > 0 {
				t.Errorf("after the change the cluster differs in %v", got)
			}
		})
	}
}
