// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// udpFlows is a filter for connection tracking entries that lead somewhere else than the rules would now: UDP has no end, and a client
// that goes on sending keeps its entry alive. Endpoints by the original destination's port.
type udpFlows struct {
	addresses []netip.Addr
	endpoints map[uint16][]netip.AddrPort
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (f udpFlows) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	endpoints, ok := f.endpoints[flow.Forward.DstPort]
	to, _ := netip.AddrFromSlice(flow.Forward.DstIP)
	if flow.Forward.Protocol != unix.IPPROTO_UDP || !ok || !slices.Contains(f.addresses, to.Unmap()) {
		return false
	}
	from, _ := netip.AddrFromSlice(flow.Reverse.SrcIP)
	return !slices.Contains(endpoints, netip.AddrPortFrom(from.Unmap(), flow.Reverse.SrcPort))
}

// cleanUDP removes the entries of UDP ports whose endpoints are others than before.
func cleanUDP(before, now served) error {
	var errs []error
	for f, netfilter := range map[corev1.IPFamily]netlink.InetFamily{corev1.IPv4Protocol: unix.AF_INET, corev1.IPv6Protocol: unix.AF_INET6} {
		old, current := udpEndpoints(before, f), udpEndpoints(now, f)
		changed := udpFlows{slices.Concat(before.of(f), now.of(f)), map[uint16][]netip.AddrPort{}}
		for port := range old {
			if _, still := current[port]; !still {
				changed.endpoints[port] = nil
			}
		}
		for port, endpoints := range current {
			if had, ok := old[port]; !ok || !slices.Equal(had, endpoints) {
				changed.endpoints[port] = endpoints
			}
		}
		if len(changed.endpoints) == 0 {
			continue
		}
		if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, netfilter, changed); err != nil {
			errs = append(errs, fmt.Errorf("connection tracking entries of UDP ports: %w", err))
		}
	}
	return errors.Join(errs...)
}

func udpEndpoints(s served, f corev1.IPFamily) map[uint16][]netip.AddrPort {
	ports := map[uint16][]netip.AddrPort{}
	for _, one := range s.frontends {
		if one.protocol == "udp" && one.family == f {
			ports[one.port] = slices.Concat(one.inside, one.outside)
		}
	}
	return ports
}
