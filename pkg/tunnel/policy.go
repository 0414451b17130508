// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"net"
	"net/netip"
	"slices"
)

// Policy says what a node dials for an API server: its kubelet and pods. A server that somebody has broken into must not make
// the nodes' networks its own.
type Policy struct {
	// Pods gives the prefixes of pod addresses: the cluster's, as a node dials other nodes' pods, too, for a server that has no pod
	// network.
	Pods func() []netip.Prefix
	// HostPort says whether a port at the node's own addresses is that of a pod in the node's network. Nil: none is.
	HostPort func(port uint16) bool
}

// Allow decides. It fits ClientConfig.Allow.
func (p Policy) Allow(target netip.AddrPort) bool {
	addr := target.Addr().Unmap()
	own, err := isOwn(addr)
	switch {
	case err != nil:
		return false
	case own:
		// Before the prefixes: the node has addresses within them, at which everything that listens on it answers.
		return target.Port() == KubeletPort || !addr.IsLoopback() && p.HostPort != nil && p.HostPort(target.Port())
	case p.Pods == nil:
		return false
	}
	return slices.ContainsFunc(p.Pods(), func(prefix netip.Prefix) bool { return prefix.Contains(addr) })
}

// isOwn says whether this machine has the address.
func isOwn(addr netip.Addr) (bool, error) {
	if addr.IsLoopback() {
		return true, nil
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(own, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		if !ok {
			return false
		}
		ip, ok := netip.AddrFromSlice(n.IP)
		return ok && ip.Unmap() == addr
	}), nil
}
