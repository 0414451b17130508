// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"math/rand/v2"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// policy makes one that the API server accepts. What is empty or missing comes often: there mistakes are.
func policy(r *rand.Rand, w *World, name string) networkingv1.NetworkPolicy {
	p := networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: networkingv1.SchemeGroupVersion.String(), Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: pick(r, "x", "y", "z"), Name: name},
		Spec:       networkingv1.NetworkPolicySpec{PodSelector: *selector(r, "pod", "role", "extra")},
	}
	switch r.IntN(6) {
	case 0, 1:
		p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	case 2:
		p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}
	case 3, 4:
		p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress, networkingv1.PolicyTypeIngress}
	}
	// Rules of a direction that policyTypes does not name have no effect: they stay in.
	for range pick(r, 0, 1, 1, 1, 2, 3) {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{Ports: ports(r), From: peers(r, w)})
	}
	for range pick(r, 0, 1, 1, 1, 2, 3) {
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{Ports: ports(r), To: peers(r, w)})
	}
	return p
}

func selector(r *rand.Rand, keys ...string) *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	if chance(r, 30) {
		return s
	}
	if chance(r, 60) {
		key := pick(r, keys...)
		s.MatchLabels = map[string]string{key: pick(r, labelValues(key)...)}
	}
	if len(s.MatchLabels) > 0 && chance(r, 70) {
		return s
	}
	key := pick(r, keys...)
	e := metav1.LabelSelectorRequirement{Key: key, Operator: pick(r, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist)}
	if e.Operator == metav1.LabelSelectorOpIn || e.Operator == metav1.LabelSelectorOpNotIn {
		e.Values = labelValues(key)
		if chance(r, 60) {
			e.Values = []string{pick(r, e.Values...)}
		}
	}
	s.MatchExpressions = []metav1.LabelSelectorRequirement{e}
	return s
}

// peers is nil, empty or has one to three.
func peers(r *rand.Rand, w *World) []networkingv1.NetworkPolicyPeer {
	if chance(r, 10) {
		return nil
	}
	list := []networkingv1.NetworkPolicyPeer{}
	for range pick(r, 0, 1, 1, 1, 2, 3) {
		var peer networkingv1.NetworkPolicyPeer
		switch what := r.IntN(20); {
		case what < 5:
			peer.PodSelector = selector(r, "pod", "role", "extra")
		case what < 9:
			peer.NamespaceSelector = selector(r, "ns", "env")
		case what < 13:
			peer.PodSelector, peer.NamespaceSelector = selector(r, "pod", "role", "extra"), selector(r, "ns", "env", corev1.LabelMetadataName)
		case what < 15:
			peer.NamespaceSelector = &metav1.LabelSelector{}
			peer.PodSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"k8s-app": "kube-dns"}}
			if chance(r, 50) {
				peer.NamespaceSelector.MatchLabels = map[string]string{corev1.LabelMetadataName: metav1.NamespaceSystem}
			}
		default:
			peer.IPBlock = block(r, w)
		}
		list = append(list, peer)
	}
	return list
}

// block is around an address that the world has, from the address alone to the whole family, with up to two exceptions around
// others: of the same size as nothing can be, they are smaller.
func block(r *rand.Rand, w *World) *networkingv1.IPBlock {
	addresses := w.addresses()
	prefix := around(pick(r, addresses...), pick(r, 0, 0, 0, 1, 3, 8, 16, 100))
	b := &networkingv1.IPBlock{CIDR: prefix.String()}
	for range pick(r, 0, 0, 1, 1, 2) {
		var inside []netip.Addr
		for _, a := range addresses {
			if prefix.Contains(a) {
				inside = append(inside, a)
			}
		}
		except := around(pick(r, inside...), pick(r, 0, 0, 1, 3, 8))
		if except.Bits() > prefix.Bits() {
			b.Except = append(b.Except, except.String())
		}
	}
	return b
}

// around is the prefix of an address that leaves so many bits open.
func around(a netip.Addr, open int) netip.Prefix {
	return netip.PrefixFrom(a, max(0, a.BitLen()-open)).Masked()
}

func (w *World) addresses() []netip.Addr {
	all := append(w.Others[:len(w.Others):len(w.Others)], w.ClusterDNS...)
	for _, p := range w.Pods {
		for _, ip := range p.Status.PodIPs {
			if a, err := netip.ParseAddr(ip.IP); err == nil {
				all = append(all, a)
			}
		}
	}
	return all
}

// ports is nil, empty or has one to three.
func ports(r *rand.Rand) []networkingv1.NetworkPolicyPort {
	if chance(r, 20) {
		return nil
	}
	list := []networkingv1.NetworkPolicyPort{}
	for range pick(r, 0, 1, 1, 1, 2, 3) {
		var p networkingv1.NetworkPolicyPort
		if chance(r, 70) {
			p.Protocol = new(pick(r, corev1.ProtocolTCP, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolUDP, corev1.ProtocolSCTP))
		}
		switch what := r.IntN(20); {
		case what < 7:
			p.Port = new(intstr.FromInt32(pick(r, Ports[0], Ports[0], Ports[1], 53, 1)))
		case what < 12:
			p.Port = new(intstr.FromString(pick(r, "web", "web", "data", "data", "alt", "dns", "dns-tcp", "nobody-has-it")))
		case what < 17:
			from := pick(r, 1, 53, Ports[0]-1, Ports[0], Ports[1], Ports[1]+1)
			p.Port, p.EndPort = new(intstr.FromInt32(from)), new(pick(r, from, from+1, max(from, Ports[0]), 65535))
		}
		list = append(list, p)
	}
	return list
}
