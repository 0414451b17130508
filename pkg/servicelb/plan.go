// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
)

// Reasons of the events on Services.
const (
	reasonPortConflict = "PortConflict"
	reasonNoAddress    = "NoAddress"
	reasonUnusable     = "AddressNotUsable"
)

// world is all that decides about the addresses of Services.
type world struct {
	services []*corev1.Service
	nodes    []*corev1.Node
	// serves says whether a node has an endpoint of a Service that would answer.
	serves   func(svc *corev1.Service, node string) bool
	pool     Pool
	reserved map[portKey]string
}

// verdict over a Service: its addresses, or why it has none.
type verdict struct {
	ingress         []corev1.LoadBalancerIngress
	reason, message string
}

type portKey struct {
	protocol corev1.Protocol
	port     int32
}

type claim struct {
	family corev1.IPFamily
	portKey
}

func nameOf(svc *corev1.Service) types.NamespacedName {
	return types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}
}

// plan decides about all Services that are ours.
func (w world) plan() map[types.NamespacedName]verdict {
	list := slices.DeleteFunc(slices.Clone(w.services), func(svc *corev1.Service) bool { return !ours(svc) })
	slices.SortFunc(list, func(a, b *corev1.Service) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(nameOf(a).String(), nameOf(b).String()))
	})
	if len(w.pool) > 0 {
		return w.fromPool(list)
	}
	return w.fromNodes(list)
}

// fromNodes gives every Service the addresses of nodes, unless one that is older has one of its ports.
func (w world) fromNodes(list []*corev1.Service) map[types.NamespacedName]verdict {
	chosen := anyChosen(w.nodes)
	nodes := slices.DeleteFunc(slices.Clone(w.nodes), func(n *corev1.Node) bool { return !eligible(n, chosen) })
	slices.SortFunc(nodes, func(a, b *corev1.Node) int { return strings.Compare(a.Name, b.Name) })
	nodePorts := w.nodePorts()
	taken := map[claim]string{}
	verdicts := map[types.NamespacedName]verdict{}
	for _, svc := range list {
		claims := claimsOf(svc)
		if who, what := w.conflict(svc, claims, taken, nodePorts); who != "" {
			verdicts[nameOf(svc)] = verdict{reason: reasonPortConflict, message: fmt.Sprintf(
				"port %d/%s of the nodes is taken by %s; this Service gets addresses when the port becomes free", what.port, what.protocol, who)}
			continue
		}
		for _, c := range claims {
			taken[c] = "Service " + nameOf(svc).String() + ", which is older"
		}
		verdicts[nameOf(svc)] = w.onNodes(svc, nodes)
	}
	return verdicts
}

func (w world) onNodes(svc *corev1.Service, nodes []*corev1.Node) verdict {
	var v verdict
	for _, f := range svc.Spec.IPFamilies {
		for _, n := range nodes {
			if local(svc) && !w.serves(svc, n.Name) {
				continue
			}
			other := func(a netip.Addr) bool { return family(a) != f }
			addrs := slices.DeleteFunc(addressesOf(n, corev1.NodeExternalIP), other)
			if len(addrs) == 0 {
				addrs = slices.DeleteFunc(addressesOf(n, corev1.NodeInternalIP), other)
			}
			for _, a := range addrs {
				v.ingress = append(v.ingress, corev1.LoadBalancerIngress{IP: a.String(), IPMode: new(corev1.LoadBalancerIPModeProxy)})
			}
		}
	}
	return v
}

func claimsOf(svc *corev1.Service) []claim {
	var list []claim
	for _, p := range svc.Spec.Ports {
		for _, f := range svc.Spec.IPFamilies {
			list = append(list, claim{f, portKey{p.Protocol, p.Port}})
		}
	}
	return list
}

// conflict says who has a port that a Service wants.
func (w world) conflict(svc *corev1.Service, claims []claim, taken map[claim]string, nodePorts map[portKey]types.NamespacedName) (string, portKey) {
	for _, c := range claims {
		if who := w.reserved[c.portKey]; who != "" {
			return who, c.portKey
		}
		if owner, ok := nodePorts[c.portKey]; ok && owner != nameOf(svc) {
			return "the NodePort of Service " + owner.String(), c.portKey
		}
		if who := taken[c]; who != "" {
			return who, c.portKey
		}
	}
	return "", portKey{}
}

func (w world) nodePorts() map[portKey]types.NamespacedName {
	all := map[portKey]types.NamespacedName{}
	for _, svc := range w.services {
		for _, p := range svc.Spec.Ports {
			if p.NodePort != 0 {
				all[portKey{p.Protocol, p.NodePort}] = nameOf(svc)
			}
		}
	}
	return all
}

// fromPool gives every Service addresses of its own. What it has already it keeps; then come those that ask for certain ones.
func (w world) fromPool(list []*corev1.Service) map[types.NamespacedName]verdict {
	a := allocation{pool: w.pool, owner: map[netip.Addr]types.NamespacedName{}, has: map[types.NamespacedName][]netip.Addr{}}
	for _, svc := range list {
		a.keep(svc)
	}
	verdicts := map[types.NamespacedName]verdict{}
	asks := func(svc *corev1.Service) bool { return len(asked(svc)) > 0 }
	for _, first := range []bool{true, false} {
		for _, svc := range list {
			if asks(svc) == first {
				verdicts[nameOf(svc)] = a.give(svc)
			}
		}
	}
	return verdicts
}

// asked are the addresses that a Service wants, as they are written.
func asked(svc *corev1.Service) []string {
	text := cmp.Or(svc.Annotations[AnnotationAddresses], svc.Spec.LoadBalancerIP)
	return strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' })
}

type allocation struct {
	pool  Pool
	owner map[netip.Addr]types.NamespacedName
	has   map[types.NamespacedName][]netip.Addr
}

func (a *allocation) used(addr netip.Addr) bool { _, used := a.owner[addr]; return used }

func (a *allocation) take(svc *corev1.Service, addr netip.Addr) {
	a.owner[addr] = nameOf(svc)
	a.has[nameOf(svc)] = append(a.has[nameOf(svc)], addr)
}

// keep lets a Service keep the addresses in its status, if it may still have them and does not want others.
func (a *allocation) keep(svc *corev1.Service) {
	want := asked(svc)
	for _, addr := range ingress(svc, corev1.LoadBalancerIPModeVIP) {
		isWanted := len(want) == 0 || slices.Contains(want, addr.String())
		another := slices.ContainsFunc(a.has[nameOf(svc)], func(h netip.Addr) bool { return h.Is4() == addr.Is4() })
		if a.pool.Contains(addr) && slices.Contains(svc.Spec.IPFamilies, family(addr)) && isWanted && !another && !a.used(addr) {
			a.take(svc, addr)
		}
	}
}

// give completes what a Service has.
func (a *allocation) give(svc *corev1.Service) verdict {
	for _, text := range asked(svc) {
		addr, err := netip.ParseAddr(text)
		owner := a.owner[addr]
		switch {
		case err != nil:
			return verdict{reason: reasonUnusable, message: fmt.Sprintf("%q is no address", text)}
		case owner == nameOf(svc):
			continue
		case !a.pool.Contains(addr):
			return verdict{reason: reasonUnusable, message: fmt.Sprintf("%s is not in the pool (%s)", addr, a.pool)}
		case !slices.Contains(svc.Spec.IPFamilies, family(addr)):
			return verdict{reason: reasonUnusable, message: fmt.Sprintf("%s is not of the Service's address family", addr)}
		case a.used(addr):
			return verdict{reason: reasonUnusable, message: fmt.Sprintf("%s belongs to Service %s", addr, owner)}
		}
		a.take(svc, addr)
	}
	for _, f := range svc.Spec.IPFamilies {
		if slices.ContainsFunc(a.has[nameOf(svc)], func(h netip.Addr) bool { return family(h) == f }) {
			continue
		}
		// A Service that prefers two families is content with the one that the pool has.
		if !a.pool.has(f) && len(svc.Spec.IPFamilies) > 1 && ptr.Deref(svc.Spec.IPFamilyPolicy, "") != corev1.IPFamilyPolicyRequireDualStack {
			continue
		}
		addr, ok := a.pool.free(f, a.used)
		if !ok {
			return verdict{reason: reasonNoAddress, message: fmt.Sprintf("no free %s address in the pool (%s)", f, a.pool)}
		}
		a.take(svc, addr)
	}
	var v verdict
	for _, f := range svc.Spec.IPFamilies {
		for _, addr := range a.has[nameOf(svc)] {
			if family(addr) == f {
				v.ingress = append(v.ingress, corev1.LoadBalancerIngress{IP: addr.String(), IPMode: new(corev1.LoadBalancerIPModeVIP)})
			}
		}
	}
	return v
}
