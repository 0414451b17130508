// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestChooseNodeIP(t *testing.T) {
	lo := link{index: 1, name: "lo", kind: "device", addresses: addresses("127.0.0.1", "::1", "10.43.0.10")}
	eth := func(index int, name string, list ...string) link {
		return link{index: index, name: name, kind: "device", up: true, addresses: addresses(list...)}
	}
	of := func(l link, kind string, up bool) link { l.kind, l.up = kind, up; return l }
	for _, test := range []struct {
		name   string
		m      machine
		v6     bool
		iface  string
		want   string // empty: ErrNoNodeAddress
		reason string // part of the reason or the error
	}{
		{name: "default route",
			m:    machine{links: []link{lo, eth(2, "eth0", "192.0.2.1"), eth(3, "eth1", "192.0.2.129")}, routes: []defaultRoute{{link: 3}}},
			want: "192.0.2.129", reason: "address of eth1, which has the default route"},
		{name: "two default routes",
			m:    machine{links: []link{lo, eth(2, "wlan0", "192.0.2.1"), eth(3, "eth1", "192.0.2.129")}, routes: []defaultRoute{{link: 2, metric: 600}, {link: 3, metric: 100}}},
			want: "192.0.2.129", reason: "eth1"},
		{name: "default route with a source address",
			m: machine{links: []link{lo, eth(2, "eth0", "192.0.2.1", "192.0.2.2")},
				routes: []defaultRoute{{link: 2, source: netip.MustParseAddr("192.0.2.2")}}},
			want: "192.0.2.2", reason: "source address of the default route through eth0"},
		{name: "default route through an interface without address of the family",
			m: machine{links: []link{lo, eth(2, "ppp0", "fe80::1"), eth(3, "eth1", "192.0.2.129")},
				routes: []defaultRoute{{link: 2}}},
			want: "192.0.2.129", reason: "address of eth1, the only usable one"},
		{name: "default route of the other family",
			m:    machine{links: []link{lo, eth(2, "eth0", "192.0.2.1", "2001:db8::1")}, routes: []defaultRoute{{link: 2, v6: true}}},
			want: "192.0.2.1", reason: "there is no default route"},
		{name: "IPv6",
			m:  machine{links: []link{lo, eth(2, "eth0", "192.0.2.1", "fe80::1", "2001:db8::1")}, routes: []defaultRoute{{link: 2}, {link: 2, v6: true}}},
			v6: true, want: "2001:db8::1", reason: "eth0"},
		{name: "address of the default route inside of the cluster's network is not passed over",
			m:    machine{links: []link{lo, eth(2, "eth0", "10.42.0.7"), eth(3, "eth1", "192.0.2.1")}, routes: []defaultRoute{{link: 2}}},
			want: "10.42.0.7", reason: "eth0"},
		{name: "no default route",
			m:    machine{links: []link{lo, eth(2, "eth0"), eth(3, "eth1", "192.0.2.129")}},
			want: "192.0.2.129", reason: "address of eth1, the only usable one; there is no default route"},
		{name: "no default route, what an earlier run left",
			m: machine{links: []link{lo, eth(2, "eth0", "192.0.2.1"), of(eth(3, "flannel.1", "10.42.0.0"), "vxlan", true),
				of(eth(4, "veth1234", "10.42.0.1"), "veth", true), of(eth(5, "kube-ipvs0", "10.43.0.1"), "dummy", false)}},
			want: "192.0.2.1", reason: "the only usable one"},
		{name: "no default route, container bridges and an interface that is down",
			m: machine{links: []link{lo, of(eth(2, "docker0", "172.17.0.1"), "bridge", true), of(eth(3, "eth0", "192.0.2.1"), "device", false),
				eth(4, "eth1", "192.0.2.129")}},
			want: "192.0.2.129", reason: "the only usable one"},
		{name: "no default route, several",
			m:    machine{links: []link{lo, of(eth(2, "a0", "100.64.0.9"), "tuntap", true), eth(3, "eth1", "192.0.2.129"), eth(4, "eth0", "192.0.2.1")}},
			want: "192.0.2.1",
			reason: "no default route and several addresses could serve (192.0.2.1 on eth0, 192.0.2.129 on eth1, 100.64.0.9 on a0); " +
				"the first was taken, set node-ip to choose"},
		{name: "named interface",
			m:     machine{links: []link{lo, eth(2, "eth0", "192.0.2.1"), eth(3, "wg0", "198.51.100.1")}, routes: []defaultRoute{{link: 2}}},
			iface: "wg0", want: "198.51.100.1", reason: "wg0, which flannel-iface names"},
		{name: "named interface without address",
			m:     machine{links: []link{lo, eth(2, "eth0", "192.0.2.1"), eth(3, "wg0")}, routes: []defaultRoute{{link: 2}}},
			iface: "wg0", reason: "flannel-iface wg0 has none (this machine has 10.43.0.10 on lo, 192.0.2.1 on eth0)"},
		{name: "nothing", m: machine{links: []link{eth(2, "eth0", "fe80::1")}}, reason: "no address at all; give an interface an address or set node-ip"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, reason, err := test.m.chooseNodeIP(test.v6, test.iface, netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16"))
			if test.want == "" {
				if !errors.Is(err, ErrNoNodeAddress) || !strings.Contains(err.Error(), test.reason) {
					t.Errorf("got %v, %v", got, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.String() != test.want || !strings.Contains(reason, test.reason) {
				t.Errorf("got %v: %s", got, reason)
			}
		})
	}
}

// The machine that runs the test has at least a loopback interface with its address.
func TestThisMachine(t *testing.T) {
	m, err := thisMachine()
	if err != nil {
		t.Fatal(err)
	}
	if m.hostname == "" || m.find("lo") == nil || m.find("lo").up || !m.has(netip.MustParseAddr("127.0.0.1")) {
		t.Errorf("got %+v", m)
	}
}
