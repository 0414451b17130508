// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"net"
	"net/netip"
	"testing"
)

func TestPolicy(t *testing.T) {
	own := ownAddress(t)
	// The prefix has the node's own address in it, as a pod network has its gateways.
	around := netip.PrefixFrom(own, own.BitLen()-4).Masked()
	pods := func() []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), around} }
	policy := Policy{Pods: pods, HostPort: func(p uint16) bool { return p == 9443 }}
	for target, want := range map[netip.AddrPort]bool{
		netip.MustParseAddrPort("127.0.0.1:10250"):       true,
		netip.MustParseAddrPort("[::1]:10250"):           true,
		netip.MustParseAddrPort("127.0.0.1:9443"):        false,
		netip.MustParseAddrPort("127.0.0.1:22"):          false,
		netip.MustParseAddrPort("127.0.0.53:53"):         false,
		netip.MustParseAddrPort("[::ffff:127.0.0.1]:22"): false,
		netip.MustParseAddrPort("0.0.0.0:10250"):         false,
		netip.MustParseAddrPort("[::]:10250"):            false,
		netip.AddrPortFrom(own, 10250):                   true,
		netip.AddrPortFrom(own, 9443):                    true,
		netip.AddrPortFrom(own, 22):                      false,
		netip.MustParseAddrPort("10.42.7.7:22"):          true,
		netip.MustParseAddrPort("[::ffff:10.42.7.7]:22"): true,
		netip.MustParseAddrPort("10.43.0.1:443"):         false,
		netip.MustParseAddrPort("169.254.169.254:80"):    false,
		netip.MustParseAddrPort("8.8.8.8:53"):            false,
		netip.MustParseAddrPort("198.51.100.1:10250"):    false,
		netip.AddrPortFrom(netip.Addr{}, 10250):          false,
	} {
		if got := policy.Allow(target); got != want {
			t.Errorf("%s: %v", target, got)
		}
	}
	bare := Policy{}
	if !bare.Allow(netip.AddrPortFrom(own, KubeletPort)) || bare.Allow(netip.AddrPortFrom(own, 9443)) || bare.Allow(netip.MustParseAddrPort("10.42.7.7:22")) {
		t.Error("an empty policy is about the kubelet only")
	}
}

// ownAddress is one of this machine's that is not of the loopback network.
func ownAddress(t *testing.T) netip.Addr {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok && !ip.IsLoopback() {
				return ip.Unmap()
			}
		}
	}
	t.Skip("this machine has only the loopback network")
	return netip.Addr{}
}
