// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Reason says why a connection is allowed or not.
type Reason struct {
	Text string
	// Policies decide: those with a rule that allows the connection, or those that isolate a pod and have none. They are
	// NAMESPACE/NAME, sorted. Without any, no policy has a say.
	Policies []string
}

// String is the reason in a line.
func (r Reason) String() string {
	if len(r.Policies) == 0 {
		return r.Text
	}
	return r.Text + ": " + strings.Join(r.Policies, ", ")
}

// Allowed tells whether from may open a connection to a port of to. Replies always pass.
func (w *World) Allowed(from, to Endpoint, protocol corev1.Protocol, port int32) (bool, Reason) {
	fromPod, toPod := networked(from), networked(to)
	switch {
	case fromPod != nil && toPod != nil && fromPod.Namespace == toPod.Namespace && fromPod.Name == toPod.Name:
		return true, Reason{Text: "a pod reaches itself"}
	case fromPod == nil && from.Node != "" && toPod != nil && from.Node == to.Node:
		return true, Reason{Text: "a node reaches its own pods"}
	}
	var deciding []string
	if fromPod != nil {
		isolating, allowing := w.egress(fromPod, to, protocol, port)
		if len(isolating) > 0 && len(allowing) == 0 {
			return false, newReason("egress is denied", isolating)
		}
		deciding = append(deciding, allowing...)
	}
	// The cluster's DNS is a pod to others, but runs on the nodes: nothing isolates it.
	if toPod != nil && !slices.Contains(w.ClusterDNS, to.Addr) {
		isolating, allowing := w.ingress(toPod, from, protocol, port)
		if len(isolating) > 0 && len(allowing) == 0 {
			return false, newReason("ingress is denied", isolating)
		}
		deciding = append(deciding, allowing...)
	}
	if len(deciding) == 0 {
		return true, Reason{Text: "no policy applies"}
	}
	return true, newReason("allowed", deciding)
}

func newReason(text string, policies []string) Reason {
	slices.Sort(policies)
	return Reason{Text: text, Policies: slices.Compact(policies)}
}

// networked is the pod of an endpoint if it has a network of its own.
func networked(e Endpoint) *corev1.Pod {
	if e.Pod == nil || onHost(e.Pod) || finished(e.Pod) {
		return nil
	}
	return e.Pod
}

// egress lists the policies that isolate a pod for egress, and those of them that allow a connection.
func (w *World) egress(pod *corev1.Pod, to Endpoint, protocol corev1.Protocol, port int32) (isolating, allowing []string) {
	for _, p := range w.Policies {
		if !subject(&p, pod) || !slices.Contains(types(&p), networkingv1.PolicyTypeEgress) {
			continue
		}
		isolating = append(isolating, nameOf(&p))
		for _, rule := range p.Spec.Egress {
			if w.anyPeer(rule.To, p.Namespace, to) && anyPort(rule.Ports, networked(to), protocol, port) {
				allowing = append(allowing, nameOf(&p))
			}
		}
	}
	return isolating, allowing
}

// ingress lists the policies that isolate a pod for ingress, and those of them that allow a connection.
func (w *World) ingress(pod *corev1.Pod, from Endpoint, protocol corev1.Protocol, port int32) (isolating, allowing []string) {
	for _, p := range w.Policies {
		if !subject(&p, pod) || !slices.Contains(types(&p), networkingv1.PolicyTypeIngress) {
			continue
		}
		isolating = append(isolating, nameOf(&p))
		for _, rule := range p.Spec.Ingress {
			if w.anyPeer(rule.From, p.Namespace, from) && anyPort(rule.Ports, pod, protocol, port) {
				allowing = append(allowing, nameOf(&p))
			}
		}
	}
	return isolating, allowing
}

func nameOf(p *networkingv1.NetworkPolicy) string { return p.Namespace + "/" + p.Name }

// subject tells whether a policy is about a pod.
func subject(p *networkingv1.NetworkPolicy, pod *corev1.Pod) bool {
	return p.Namespace == pod.Namespace && matches(&p.Spec.PodSelector, pod.Labels)
}

// types are the directions a policy is about. The API server fills them in; this is how.
func types(p *networkingv1.NetworkPolicy) []networkingv1.PolicyType {
	if len(p.Spec.PolicyTypes) > 0 {
		return p.Spec.PolicyTypes
	}
	if len(p.Spec.Egress) > 0 {
		return []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
	}
	return []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
}

// anyPeer: an empty or missing list is everybody.
func (w *World) anyPeer(peers []networkingv1.NetworkPolicyPeer, namespace string, e Endpoint) bool {
	return len(peers) == 0 || slices.ContainsFunc(peers, func(peer networkingv1.NetworkPolicyPeer) bool {
		return w.peer(peer, namespace, e)
	})
}

func (w *World) peer(peer networkingv1.NetworkPolicyPeer, namespace string, e Endpoint) bool {
	if peer.IPBlock != nil {
		return inBlock(peer.IPBlock, e.Addr)
	}
	pod := networked(e)
	if pod == nil {
		return false
	}
	if peer.NamespaceSelector == nil {
		return peer.PodSelector != nil && pod.Namespace == namespace && matches(peer.PodSelector, pod.Labels)
	}
	labels, exists := w.namespaceLabels(pod.Namespace)
	return exists && matches(peer.NamespaceSelector, labels) && (peer.PodSelector == nil || matches(peer.PodSelector, pod.Labels))
}

func (w *World) namespaceLabels(name string) (map[string]string, bool) {
	for _, ns := range w.Namespaces {
		if ns.Name == name {
			return ns.Labels, true
		}
	}
	return nil, false
}

func inBlock(block *networkingv1.IPBlock, a netip.Addr) bool {
	contains := func(cidr string) bool {
		prefix, err := netip.ParsePrefix(cidr)
		return err == nil && prefix.Contains(a)
	}
	return contains(block.CIDR) && !slices.ContainsFunc(block.Except, contains)
}

// anyPort: an empty or missing list is all ports of all protocols. A name is looked up in the pod that is connected to.
func anyPort(ports []networkingv1.NetworkPolicyPort, to *corev1.Pod, protocol corev1.Protocol, port int32) bool {
	return len(ports) == 0 || slices.ContainsFunc(ports, func(p networkingv1.NetworkPolicyPort) bool {
		wanted := corev1.ProtocolTCP
		if p.Protocol != nil {
			wanted = *p.Protocol
		}
		switch {
		case wanted != protocol:
			return false
		case p.Port == nil:
			return true
		case p.Port.Type == intstr.String:
			return named(to, p.Port.StrVal, protocol, port)
		case p.EndPort != nil:
			return p.Port.IntVal <= port && port <= *p.EndPort
		}
		return p.Port.IntVal == port
	})
}

// named tells whether a pod calls a port by a name. Init containers that run on beside the others have ports, too.
func named(pod *corev1.Pod, name string, protocol corev1.Protocol, port int32) bool {
	if pod == nil {
		return false
	}
	containers := slices.Clone(pod.Spec.Containers)
	for _, c := range pod.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			containers = append(containers, c)
		}
	}
	for _, c := range containers {
		for _, p := range c.Ports {
			has := p.Protocol
			if has == "" {
				has = corev1.ProtocolTCP
			}
			if p.Name == name && has == protocol && p.ContainerPort == port {
				return true
			}
		}
	}
	return false
}

// matches is what label selectors mean: all of their requirements hold. Without any they match everything.
func matches(s *metav1.LabelSelector, labels map[string]string) bool {
	for k, v := range s.MatchLabels {
		if has, ok := labels[k]; !ok || has != v {
			return false
		}
	}
	for _, e := range s.MatchExpressions {
		value, exists := labels[e.Key]
		in := exists && slices.Contains(e.Values, value)
		holds := false
		switch e.Operator {
		case metav1.LabelSelectorOpIn:
			holds = in
		case metav1.LabelSelectorOpNotIn:
			holds = !in
		case metav1.LabelSelectorOpExists:
			holds = exists
		case metav1.LabelSelectorOpDoesNotExist:
			holds = !exists
		}
		if !holds {
			return false
		}
	}
	return true
}

// String names the endpoint.
func (e Endpoint) String() string {
	switch {
	case e.Pod != nil:
		return fmt.Sprintf("%s/%s (%s)", e.Pod.Namespace, e.Pod.Name, e.Addr)
	case e.Node != "":
		return fmt.Sprintf("node %s (%s)", e.Node, e.Addr)
	}
	return e.Addr.String()
}
