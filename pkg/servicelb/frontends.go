// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
)

// frontend is one port of a Service that a node serves on its addresses of one family.
type frontend struct {
	service  types.NamespacedName
	family   corev1.IPFamily
	protocol string // as nftables calls it
	port     uint16
	// inside are the endpoints for pods and the node itself, outside those for everybody else.
	inside, outside []netip.AddrPort
	// keep says that clients' addresses are kept (externalTrafficPolicy Local).
	keep bool
	// affinity is how many seconds a client stays with an endpoint; 0: not at all.
	affinity int32
	// sources are the clients that are let in; none: all.
	sources []netip.Prefix
}

func (f frontend) name() string {
	return fmt.Sprintf("%s/%s/%s/%s/%d", ipKeyword(f.family), f.service.Namespace, f.service.Name, f.protocol, f.port)
}

func ipKeyword(f corev1.IPFamily) string {
	if f == corev1.IPv4Protocol {
		return "ip"
	}
	return "ip6"
}

// served is everything a node serves: what goes to its addresses, and which of these take part.
type served struct {
	addresses []netip.Addr
	frontends []frontend
}

func (s served) of(f corev1.IPFamily) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(s.addresses), func(a netip.Addr) bool { return family(a) != f })
}

// frontendsOn says what a node has to serve: the Services whose status has one of its addresses.
func frontendsOn(node *corev1.Node, services []*corev1.Service, slicesOf func(*corev1.Service) []*discoveryv1.EndpointSlice) served {
	s := served{addresses: slices.Concat(addressesOf(node, corev1.NodeInternalIP), addressesOf(node, corev1.NodeExternalIP))}
	slices.SortFunc(s.addresses, netip.Addr.Compare)
	s.addresses = slices.Compact(s.addresses)
	for _, svc := range services {
		if !ours(svc) {
			continue
		}
		has := ingress(svc, corev1.LoadBalancerIPModeProxy)
		for _, f := range svc.Spec.IPFamilies {
			here := func(a netip.Addr) bool { return family(a) == f && slices.Contains(s.addresses, a) }
			if slices.ContainsFunc(has, here) {
				s.frontends = append(s.frontends, frontendsOf(svc, f, slicesOf(svc), node)...)
			}
		}
	}
	slices.SortFunc(s.frontends, func(a, b frontend) int { return strings.Compare(a.name(), b.name()) })
	return s
}

func frontendsOf(svc *corev1.Service, f corev1.IPFamily, list []*discoveryv1.EndpointSlice, node *corev1.Node) []frontend {
	sources := sourcesOf(svc, f)
	var all []frontend
	for _, p := range svc.Spec.Ports {
		one := frontend{
			service: nameOf(svc), family: f, protocol: strings.ToLower(string(p.Protocol)), port: uint16(p.Port), keep: local(svc), sources: sources,
		}
		if svc.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
			one.affinity = corev1.DefaultClientIPServiceAffinitySeconds
			if c := svc.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil {
				one.affinity = cmp.Or(ptr.Deref(c.ClientIP.TimeoutSeconds, 0), one.affinity)
			}
		}
		var here []netip.AddrPort
		one.inside, here = usable(endpointsOf(list, f, p, node.Name), node.Name, node.Labels[corev1.LabelTopologyZone])
		if one.outside = one.inside; one.keep {
			one.outside = here
		}
		all = append(all, one)
	}
	return all
}

// sourcesOf gives the clients of a family that a Service lets in, as networks that do not overlap. As in kube-proxy a family of which no
// network is named is not restricted.
func sourcesOf(svc *corev1.Service, f corev1.IPFamily) []netip.Prefix {
	var all []netip.Prefix
	for _, text := range svc.Spec.LoadBalancerSourceRanges {
		if p, err := netip.ParsePrefix(strings.TrimSpace(text)); err == nil && family(p.Addr()) == f {
			all = append(all, p.Masked())
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare) // by address, the larger network first
	var kept []netip.Prefix
	for _, p := range all {
		if p.Bits() == 0 {
			return nil
		}
		if n := len(kept); n == 0 || !kept[n-1].Overlaps(p) {
			kept = append(kept, p)
		}
	}
	return kept
}
