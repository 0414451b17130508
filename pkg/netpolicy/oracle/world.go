// SPDX-License-Identifier: Apache-2.0

// Package oracle says what NetworkPolicies of networking.k8s.io/v1 mean, written down from the comments in the API and nothing
// else, slowly and so that one sees that it is right. Tests compare with it what really happens to packets; it shares no code
// with what enforces policies.
//
// A [World] is all that decides. [World.Allowed] asks about one connection, between [Endpoint]s.
package oracle

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// World is the part of a cluster that policies are about.
type World struct {
	Namespaces []corev1.Namespace
	Pods       []corev1.Pod
	Policies   []networkingv1.NetworkPolicy
	// ClusterDNS are the addresses at which every node itself answers for the cluster's DNS. To policies they are a pod as CoreDNS
	// has them elsewhere: in kube-system, labelled k8s-app=kube-dns, with the ports dns and dns-tcp.
	ClusterDNS []netip.Addr
	// Others are addresses that belong to no pod, of nodes and outside of the cluster. Only the generator looks at them.
	Others []netip.Addr
}

// Endpoint is one end of a connection: a pod, a node, or what is outside of the cluster.
type Endpoint struct {
	// Pod is nil for what is no pod.
	Pod *corev1.Pod
	// Node is the machine: of a pod the one where it runs, empty outside of the cluster.
	Node string
	// Addr is the address as it is before the source is translated and after the destination is.
	Addr netip.Addr
}

// PodAt is the pod of a namespace at its address in the family of the other end, or at its first one if that is zero. It is the
// zero Endpoint when there is no such pod, or it has no such address.
func (w *World) PodAt(namespace, name string, other netip.Addr) Endpoint {
	for i, p := range w.Pods {
		if p.Namespace != namespace || p.Name != name {
			continue
		}
		for _, ip := range p.Status.PodIPs {
			if a, err := netip.ParseAddr(ip.IP); err == nil && (!other.IsValid() || a.Is4() == other.Is4()) {
				return Endpoint{Pod: &w.Pods[i], Node: p.Spec.NodeName, Addr: a}
			}
		}
	}
	return Endpoint{}
}

// At is who has an address: the cluster's DNS, a pod, or nobody that the world knows.
func (w *World) At(a netip.Addr) Endpoint {
	if slices.Contains(w.ClusterDNS, a) {
		return w.DNS(a)
	}
	for i, p := range w.Pods {
		if onHost(&p) || finished(&p) {
			continue // the node has the address, or somebody else has it now
		}
		for _, ip := range p.Status.PodIPs {
			if has, err := netip.ParseAddr(ip.IP); err == nil && has == a {
				return Endpoint{Pod: &w.Pods[i], Node: p.Spec.NodeName, Addr: a}
			}
		}
	}
	return Endpoint{Addr: a}
}

// DNS is the cluster's DNS at one of its addresses.
func (w *World) DNS(a netip.Addr) Endpoint {
	return Endpoint{Addr: a, Pod: &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: "kube-dns", Labels: map[string]string{"k8s-app": "kube-dns"}},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Ports: []corev1.ContainerPort{
			{Name: "dns", Protocol: corev1.ProtocolUDP, ContainerPort: 53}, {Name: "dns-tcp", Protocol: corev1.ProtocolTCP, ContainerPort: 53},
		}}}},
	}}
}

// Clone copies the world, all the way down.
func (w *World) Clone() *World {
	c := &World{
		slices.Clone(w.Namespaces), slices.Clone(w.Pods), slices.Clone(w.Policies), slices.Clone(w.ClusterDNS), slices.Clone(w.Others),
	}
	for i := range c.Namespaces {
		w.Namespaces[i].DeepCopyInto(&c.Namespaces[i])
	}
	for i := range c.Pods {
		w.Pods[i].DeepCopyInto(&c.Pods[i])
	}
	for i := range c.Policies {
		w.Policies[i].DeepCopyInto(&c.Policies[i])
	}
	return c
}

// onHost: the pod's address is the node's, policies do not know it as a pod.
func onHost(p *corev1.Pod) bool { return p.Spec.HostNetwork }

// finished: the pod has no network any more, its address may be another's.
func finished(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}
