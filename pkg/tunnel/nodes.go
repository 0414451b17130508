// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"cmp"
	"net"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// target is what an address is, and how it is reached.
type target struct {
	node   string // whose it is; empty for an address that is no node's
	pod    bool   // a pod's, not the node's own
	direct string // what to dial from here
	inside string // what the node has to dial
	rivals []string
}

// locate finds out what an address is. A host is an IP address or a node's name, as the API server calls kubelets.
func (s *Server) locate(addr string) (target, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return target{}, err
	}
	other := target{direct: addr}
	nodes, err := s.cfg.Nodes.List(labels.Everything())
	if err != nil {
		return other, nil
	}
	ip, _ := netip.ParseAddr(host)
	ip = ip.Unmap()
	if owners := filter(nodes, func(n *corev1.Node) bool { return isNode(n, host, ip) }); len(owners) > 0 {
		owner, rivals := s.choose(owners)
		inside, direct := insideAddress(owner, ip), host
		if !ip.IsValid() {
			direct = directAddress(owner, host)
		}
		return target{node: owner.Name, direct: net.JoinHostPort(direct, port), inside: net.JoinHostPort(inside, port), rivals: rivals}, nil
	}
	if owners := filter(nodes, func(n *corev1.Node) bool { return hasPod(n, ip) }); len(owners) > 0 {
		owner, rivals := s.choose(owners)
		return target{node: owner.Name, pod: true, direct: addr, inside: net.JoinHostPort(ip.String(), port), rivals: rivals}, nil
	}
	return other, nil
}

func filter(nodes []*corev1.Node, want func(*corev1.Node) bool) []*corev1.Node {
	var found []*corev1.Node
	for _, n := range nodes {
		if want(n) {
			found = append(found, n)
		}
	}
	return found
}

// isNode says whether a node has that name or address.
func isNode(n *corev1.Node, host string, ip netip.Addr) bool {
	if !ip.IsValid() && strings.EqualFold(n.Name, host) {
		return true
	}
	return slices.ContainsFunc(n.Status.Addresses, func(a corev1.NodeAddress) bool {
		if !ip.IsValid() {
			return strings.EqualFold(a.Address, host)
		}
		have, err := netip.ParseAddr(a.Address)
		return err == nil && have.Unmap() == ip
	})
}

// hasPod says whether a node gives out that address to its pods.
func hasPod(n *corev1.Node, ip netip.Addr) bool {
	if !ip.IsValid() {
		return false
	}
	return slices.ContainsFunc(append([]string{n.Spec.PodCIDR}, n.Spec.PodCIDRs...), func(cidr string) bool {
		prefix, err := netip.ParsePrefix(cidr)
		return err == nil && prefix.Contains(ip)
	})
}

// choose takes one of several nodes with the same address: that which has a tunnel, else the newest, as the others may be the same
// machine under earlier names. Rivals are further ones that have a tunnel, too: machines in different networks.
func (s *Server) choose(owners []*corev1.Node) (*corev1.Node, []string) {
	if len(owners) == 1 {
		return owners[0], nil
	}
	open := s.Sessions()
	slices.SortFunc(owners, func(a, b *corev1.Node) int { // not the lister's slice
		if x, y := slices.Contains(open, a.Name), slices.Contains(open, b.Name); x != y {
			if x {
				return -1
			}
			return 1
		}
		return cmp.Or(b.CreationTimestamp.Compare(a.CreationTimestamp.Time), strings.Compare(a.Name, b.Name))
	})
	var rivals []string
	for _, n := range owners[1:] {
		if slices.Contains(open, n.Name) {
			rivals = append(rivals, n.Name)
		}
	}
	return owners[0], rivals
}

// insideAddress is what a node dials to reach itself. Its external address may be its router's, and a name anything.
func insideAddress(n *corev1.Node, ip netip.Addr) string {
	internal := addressesOf(n, corev1.NodeInternalIP)
	switch {
	case slices.Contains(internal, ip):
		return ip.String()
	case len(internal) > 0:
		return internal[0].String()
	case ip.IsValid():
		return ip.String()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1}).String()
}

// directAddress is where a node is that was asked for by name. Names of nodes are in no DNS.
func directAddress(n *corev1.Node, host string) string {
	for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		if addrs := addressesOf(n, kind); len(addrs) > 0 {
			return addrs[0].String()
		}
	}
	return host
}

func addressesOf(n *corev1.Node, kind corev1.NodeAddressType) []netip.Addr {
	var addrs []netip.Addr
	for _, a := range n.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == kind {
			addrs = append(addrs, ip.Unmap())
		}
	}
	return addrs
}
