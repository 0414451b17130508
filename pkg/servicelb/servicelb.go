// SPDX-License-Identifier: Apache-2.0

// Package servicelb makes Services of type LoadBalancer work without a pod and without anything outside of the cluster.
//
// It has three parts. The [Controller], one in a cluster, writes addresses into the status of Services and says in events what
// stands in the way. The [Node], in the node process of every machine, makes these addresses answer. Without a pool they
// are the nodes' own (ipMode Proxy, so that kube-proxy leaves them alone in each of its modes), and the node part has nftables rules that
// take their ports to the endpoints. With a pool every Service gets an address of its own (ipMode VIP): kube-proxy
// knows how to forward it, and the node part only sees to it that exactly one node answers for it on the network. The
// [APIVIP] does the same for an address of the API servers.
//
// An address is announced by the node that holds a lease, which it renews every second: see election. It is bound to an interface
// with a lifetime of a few seconds and prolonged as long as the lease is: a node process that is killed or hangs leaves no address behind,
// the kernel takes it away.
package servicelb

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

const (
	// Class is the loadBalancerClass of Services that are served here; those without a class are, too.
	Class = "kedge.io/servicelb"
	// LabelNode on a node, with the value "true", restricts serving to the nodes that have it.
	LabelNode = "kedge.io/servicelb"
	// AnnotationIgnore on a Service, with the value "false", leaves the Service to somebody else.
	AnnotationIgnore = "kedge.io/servicelb"
	// AnnotationAddresses on a Service asks for certain addresses of the pool, with commas in between.
	AnnotationAddresses = "kedge.io/loadbalancer-ips"

	// Component is the name in logs, status and events.
	Component = "servicelb"

	labelProxyName = "service.kubernetes.io/service-proxy-name"
)

// ours says whether a Service is to be served.
func ours(svc *corev1.Service) bool {
	return svc.Spec.Type == corev1.ServiceTypeLoadBalancer && svc.DeletionTimestamp == nil &&
		(svc.Spec.LoadBalancerClass == nil || *svc.Spec.LoadBalancerClass == Class) &&
		svc.Annotations[AnnotationIgnore] != "false" && svc.Labels[labelProxyName] == ""
}

// local says whether the client's address is to be kept.
func local(svc *corev1.Service) bool {
	return svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
}

// eligible says whether a node may serve at all. chosen is whether some node has [LabelNode].
func eligible(node *corev1.Node, chosen bool) bool {
	if _, excluded := node.Labels[corev1.LabelNodeExcludeBalancers]; excluded || chosen && node.Labels[LabelNode] != "true" {
		return false
	}
	return slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

func anyChosen(nodes []*corev1.Node) bool {
	return slices.ContainsFunc(nodes, func(n *corev1.Node) bool { return n.Labels[LabelNode] == "true" })
}

// ingress returns the addresses in a Service's status that have a mode.
func ingress(svc *corev1.Service, mode corev1.LoadBalancerIPMode) []netip.Addr {
	var list []netip.Addr
	for _, in := range svc.Status.LoadBalancer.Ingress {
		has := corev1.LoadBalancerIPModeVIP
		if in.IPMode != nil {
			has = *in.IPMode
		}
		if a, err := netip.ParseAddr(in.IP); err == nil && has == mode {
			list = append(list, a.Unmap())
		}
	}
	return list
}

func family(a netip.Addr) corev1.IPFamily {
	if a.Is4() {
		return corev1.IPv4Protocol
	}
	return corev1.IPv6Protocol
}

// addressesOf returns a node's addresses of a type, of both families.
func addressesOf(node *corev1.Node, typ corev1.NodeAddressType) []netip.Addr {
	var list []netip.Addr
	for _, a := range node.Status.Addresses {
		if parsed, err := netip.ParseAddr(a.Address); err == nil && a.Type == typ {
			list = append(list, parsed.Unmap())
		}
	}
	return list
}
