// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kedge-io/kedge/tests/netns"
)

func TestParseClaims(t *testing.T) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 7}
	probe := arpPacket(1, addr("0.0.0.0"), mac)
	for name, test := range map[string]struct {
		parse  func([]byte) (netip.Addr, net.HardwareAddr)
		packet []byte
		want   string
	}{
		"request":             {arpClaim, arpPacket(1, addr("192.0.2.7"), mac), "192.0.2.7"},
		"reply":               {arpClaim, arpPacket(2, addr("192.0.2.7"), mac), "192.0.2.7"},
		"probe":               {arpClaim, probe, ""},
		"cut off":             {arpClaim, arpPacket(2, addr("192.0.2.7"), mac)[:27], ""},
		"other protocol":      {arpClaim, append([]byte{0, 1, 0x86, 0xdd}, make([]byte, 40)...), ""},
		"advertisement":       {naClaim, naPacket(addr("fd00::7"), mac), "fd00::7"},
		"without address":     {naClaim, naPacket(addr("fd00::7"), mac)[:24], ""},
		"option first":        {naClaim, slices.Concat(naPacket(addr("fd00::7"), mac)[:24], []byte{14, 1, 0, 0, 0, 0, 0, 0, 2, 1}, mac), "fd00::7"},
		"option too long":     {naClaim, slices.Concat(naPacket(addr("fd00::7"), mac)[:24], []byte{14, 200, 0, 0, 0, 0, 0, 0}), ""},
		"option of no length": {naClaim, slices.Concat(naPacket(addr("fd00::7"), mac)[:24], []byte{2, 0, 0, 0, 0, 0, 0, 0}), ""},
		"solicitation":        {naClaim, append([]byte{135}, make([]byte, 40)...), ""},
	} {
		got, who := test.parse(test.packet)
		if test.want == "" && got.IsValid() || test.want != "" && (got.String() != test.want || !slices.Equal(who, mac)) {
			t.Errorf("%s: %v at %v, want %q", name, got, who, test.want)
		}
	}
}

func FuzzClaims(f *testing.F) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 7}
	f.Add(arpPacket(2, addr("192.0.2.7"), mac))
	f.Add(naPacket(addr("fd00::7"), mac))
	f.Fuzz(func(t *testing.T, p []byte) {
		for _, parse := range []func([]byte) (netip.Addr, net.HardwareAddr){arpClaim, naClaim} {
			if a, who := parse(p); a.IsValid() && (a.Is4() && a.IsUnspecified() || len(who) != 6) {
				t.Errorf("%v at %v", a, who)
			}
		}
	})
}

// TestYield: a node whose leases nobody renews keeps their addresses until another machine announces them.
func TestYield(t *testing.T) {
	s := newSite(t)
	vip4, vip6 := addr("192.0.2.200"), addr("fd00:9::200")
	f := newFloater(fake.NewClientset(), "n", netip.Addr{}, testLog(t), nil)
	f.keep = true
	long := time.Now().Add(-time.Hour)
	for name, a := range map[string]netip.Addr{"four": vip4, "six": vip6} {
		f.groups[name] = &group{addresses: []netip.Addr{a}, election: &election{log: testLog(t), identity: "n", changed: f.apply, keep: true, renewed: long}}
	}
	f.apply()
	t.Cleanup(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.groups = nil
		f.listen(false)
	})
	for _, vip := range []netip.Addr{vip4, vip6} {
		if !bound(t, vip) {
			t.Errorf("%s is not kept", vip)
		}
	}
	// The node's own announcements are not another machine's; there were two of each by now.
	f.apply()
	for _, vip := range []netip.Addr{vip4, vip6} {
		if !bound(t, vip) {
			t.Fatalf("%s was given up without need", vip)
		}
		eventually(t, vip.String()+" to be given up", func() error {
			err := s.outside.do(func() error {
				link, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				// It has the address, as the node that has taken over: the source of an advertisement has to be there.
				if err := netlink.AddrReplace(link, mortal(vip, leaseDuration)); err != nil {
					return err
				}
				return announce(vip, link.Attrs())
			})
			if err == nil && bound(t, vip) {
				err = errors.New("it is bound")
			}
			return err
		})
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.listening != nil {
		t.Error("it listens on, for nothing")
	}
}

func TestClaimsEnd(t *testing.T) {
	netns.NeedNode(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- claims(ctx, func(netip.Addr, string) {}) }()
	cancel()
	<-done
}
