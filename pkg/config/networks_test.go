// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func prefixes(t *testing.T, text string) Prefixes {
	t.Helper()
	var p Prefixes
	if err := p.UnmarshalText([]byte(text)); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPrefixes(t *testing.T) {
	for _, text := range []string{"", "10.42.0.0/16", "10.42.0.0/16,fd42::/56"} {
		b, err := json.Marshal(prefixes(t, text))
		var back Prefixes
		if err == nil {
			err = json.Unmarshal(b, &back)
		}
		if err != nil || string(b) != `"`+text+`"` || back.String() != text {
			t.Errorf("%q became %s and %q: %v", text, b, back, err)
		}
	}
	for _, text := range []string{"10.42.0.0", "10.42.0.1/16", ",", "10.42.0.0/16,"} {
		if err := new(Prefixes).UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q was accepted", text)
		}
	}
}

func TestAddressRange(t *testing.T) {
	for text, want := range map[string]string{
		"192.168.1.240-192.168.1.250": "192.168.1.240-192.168.1.250", "192.168.1.16/28": "192.168.1.16-192.168.1.31", "192.168.1.9": "192.168.1.9",
		"192.168.1.9/32": "192.168.1.9", "2001:db8::10-2001:db8::20": "2001:db8::10-2001:db8::20", "192.168.1.1 - 192.168.1.2": "192.168.1.1-192.168.1.2",
	} {
		if r, err := parseAddressRange(text); err != nil || r.String() != want {
			t.Errorf("%q became %v: %v", text, r, err)
		}
	}
	for _, text := range []string{"", "-", "a-b", "127.0.0.1", "192.168.1.2-192.168.1.1", "192.168.1.1-2001:db8::1", "::ffff:10.0.0.0/120"} {
		if r, err := parseAddressRange(text); err == nil {
			t.Errorf("%q became %v", text, r)
		}
	}
}

func FuzzAddressRange(f *testing.F) {
	f.Add("192.168.1.240-192.168.1.250")
	f.Add("fd00::/64")
	f.Fuzz(func(t *testing.T, text string) {
		r, err := parseAddressRange(text)
		if err != nil {
			return
		}
		if again, err := parseAddressRange(r.String()); err != nil || again != r || !r.Contains(r.First) || !r.Contains(r.Last) {
			t.Errorf("%q became %v and %v: %v", text, r, again, err)
		}
	})
}

func TestChooseNodeIPs(t *testing.T) {
	eth := func(index int, name string, addresses ...string) link {
		l := link{index: index, name: name, kind: "device", up: true}
		for _, a := range addresses {
			l.addresses = append(l.addresses, netip.MustParseAddr(a))
		}
		return l
	}
	m := machine{
		links: []link{eth(2, "eth0", "192.0.2.7"), eth(3, "eth1", "192.0.2.129", "2001:db8::129"), eth(4, "eth2", "2001:db8::1")},
		// The default routes of the families lead through different interfaces.
		routes:   []defaultRoute{{link: 3}, {link: 4, v6: true}},
		sourceTo: func(string) (netip.Addr, error) { return netip.MustParseAddr("2001:db8::1"), nil },
	}
	for _, test := range []struct {
		name, cidr, server, iface, want string
		certain                         bool
	}{
		{"one family", "10.42.0.0/16", "", "", "192.0.2.129", true},
		{"both on one interface", "10.42.0.0/16,fd42::/56", "", "", "192.0.2.129 2001:db8::129", true},
		{"IPv6 first", "fd42::/56,10.42.0.0/16", "", "", "2001:db8::1 192.0.2.129", true},
		{"given interface", "10.42.0.0/16,fd42::/56", "", "eth0", "192.0.2.7", true}, // and an error
		{"a joiner that does not know the cluster", "10.42.0.0/16", "https://[2001:db8::5]:6443", "", "2001:db8::1", false},
		{"a joiner that does", "10.42.0.0/16,fd42::/56", "https://[2001:db8::5]:6443", "", "192.0.2.129 2001:db8::129", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := &Config{Server: test.server, FlannelIface: test.iface, Cluster: Cluster{ClusterCIDR: prefixes(t, test.cidr)}}
			list, _, err := s.chooseNodeIPs(m, test.certain)
			if got := strings.Trim(fmt.Sprint(list), "[]"); got != test.want {
				t.Errorf("got %s: %v", got, err)
			}
			if failed := err != nil; failed != (test.iface != "") {
				t.Errorf("error %v", err)
			}
		})
	}
}
