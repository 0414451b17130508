// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// listener is a socket of a process of this machine that waits for clients.
type listener struct {
	protocol string
	address  netip.AddrPort
}

// listeners asks the kernel for the sockets of the network namespace.
func listeners() ([]listener, error) {
	var all []listener
	for protocol, ask := range map[string]func(uint8) ([]*netlink.Socket, error){"tcp": netlink.SocketDiagTCP, "udp": netlink.SocketDiagUDP} {
		for _, f := range []uint8{unix.AF_INET, unix.AF_INET6} {
			sockets, err := ask(f)
			if err != nil {
				return nil, fmt.Errorf("%s sockets: %w", protocol, err)
			}
			for _, s := range sockets {
				if a, ok := netip.AddrFromSlice(s.ID.Source); ok && s.ID.DestinationPort == 0 {
					all = append(all, listener{protocol, netip.AddrPortFrom(a.Unmap(), s.ID.SourcePort)})
				}
			}
		}
	}
	return all, nil
}

// eclipsed returns a listener that gets no packets from outside any more because of a frontend.
func (f frontend) eclipsed(all []listener, own []netip.Addr) (string, bool) {
	for _, l := range all {
		a := l.address.Addr()
		// A socket of IPv6's unspecified address gets IPv4 as well.
		if l.protocol == f.protocol && l.address.Port() == f.port && (slices.Contains(own, a) || a.IsUnspecified() && (a.Is6() || family(a) == f.family)) {
			return fmt.Sprintf("%s/%s", l.address, l.protocol), true
		}
	}
	return "", false
}

// hides says whether a pod has a host port that gets no packets from outside any more because of a frontend.
func (f frontend) hides(p *corev1.Pod) bool {
	if p.Spec.HostNetwork || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return false
	}
	return slices.ContainsFunc(slices.Concat(p.Spec.InitContainers, p.Spec.Containers), func(c corev1.Container) bool {
		return slices.ContainsFunc(c.Ports, func(port corev1.ContainerPort) bool {
			at, err := netip.ParseAddr(port.HostIP)
			return port.HostPort == int32(f.port) && strings.EqualFold(cmp.Or(string(port.Protocol), "tcp"), f.protocol) &&
				(err != nil || at.IsUnspecified() || family(at.Unmap()) == f.family && !at.IsLoopback())
		})
	})
}
