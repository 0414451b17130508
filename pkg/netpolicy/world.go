// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// findPodCIDRs looks this node's ranges up, once it has some. Pods come later than they do.
func (c *Controller) findPodCIDRs(ctx context.Context) error {
	if len(c.podCIDRs) > 0 {
		return nil
	}
	node, err := c.cfg.Client.CoreV1().Nodes().Get(ctx, c.cfg.NodeName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return waiting("for the node to be registered")
	}
	if err != nil {
		return err
	}
	var cidrs []netip.Prefix
	for _, text := range node.Spec.PodCIDRs {
		cidr, err := netip.ParsePrefix(text)
		if err != nil {
			return err
		}
		cidrs = append(cidrs, cidr)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.podCIDRs = cidrs
	return nil
}

// world gathers what rules are made from. c.mu is held.
func (c *Controller) world() world {
	w := world{families: c.families(), podCIDRs: c.podCIDRs, namespaces: map[string]labels.Set{}}
	for _, o := range c.watch.policies.GetStore().List() {
		w.policies = append(w.policies, o.(*networkingv1.NetworkPolicy))
	}
	c.localPods(&w)
	if cluster := c.watch.cluster; cluster != nil {
		for _, o := range cluster.namespaces.GetStore().List() {
			n := o.(*corev1.Namespace)
			w.namespaces[n.Name] = n.Labels
		}
		for _, o := range cluster.pods.GetStore().List() {
			if p := o.(*corev1.Pod); p.Spec.NodeName != c.cfg.NodeName && counts(p) {
				w.pods = append(w.pods, podOf(identify(p), addresses(p), false))
			}
		}
	}
	if len(c.cfg.ClusterDNS) > 0 {
		w.pods = append(w.pods, c.dnsPod())
	}
	return w
}

// localPods adds this node's: those that were announced with the addresses that they were announced with, and those that are known from the
// API only, from before there were announcements.
func (c *Controller) localPods(w *world) {
	store := c.watch.local.GetStore()
	announced, taken := map[string]bool{}, map[netip.Addr]bool{}
	for _, r := range c.records {
		p := c.watched(r)
		if p != nil {
			announced[r.Namespace+"/"+r.Name] = true
			r.Identity = new(identify(p))
		}
		for _, a := range r.Addresses {
			taken[a] = true
		}
		if r.Identity == nil {
			continue // nobody knows which policies apply: its addresses stay unknown, and closed
		}
		w.known = append(w.known, r.Addresses...)
		if p == nil || counts(p) {
			w.pods = append(w.pods, podOf(*r.Identity, r.Addresses, true))
		}
	}
	for _, o := range store.List() {
		p := o.(*corev1.Pod)
		if announced[p.Namespace+"/"+p.Name] || !counts(p) {
			continue
		}
		if addrs := slices.DeleteFunc(addresses(p), func(a netip.Addr) bool { return taken[a] }); len(addrs) > 0 {
			w.known = append(w.known, addrs...)
			w.pods = append(w.pods, podOf(identify(p), addrs, true))
		}
	}
}

// watched gives the pod of an announcement as the API has it, nil if it has none or another of the same name.
func (c *Controller) watched(r *record) *corev1.Pod {
	o, ok, err := c.watch.local.GetStore().GetByKey(r.Namespace + "/" + r.Name)
	if err != nil || !ok {
		return nil
	}
	p := o.(*corev1.Pod)
	if r.UID != "" && r.UID != string(p.UID) && r.UID != p.Annotations[mirrorAnnotation] {
		return nil
	}
	return p
}

// counts tells whether policies can apply to a pod, as their subject or as a peer.
func counts(p *corev1.Pod) bool { return !p.Spec.HostNetwork && !finished(p) }

// identity is what policies look at besides addresses.
type identity struct {
	Namespace string      `json:"namespace"`
	Name      string      `json:"name"`
	Labels    labels.Set  `json:"labels,omitempty"`
	Ports     []namedPort `json:"ports,omitempty"`
}

func identify(p *corev1.Pod) identity {
	i := identity{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels}
	for _, container := range p.Spec.Containers {
		for _, port := range container.Ports {
			i.Ports = append(i.Ports, namedPort{port.Name, protocolOf(&port.Protocol), uint16(port.ContainerPort)})
		}
	}
	return i
}

func podOf(i identity, addrs []netip.Addr, local bool) pod {
	return pod{namespace: i.Namespace, name: i.Name, labels: i.Labels, ports: i.Ports, addrs: addrs, local: local}
}

func addresses(p *corev1.Pod) (addrs []netip.Addr) {
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			addrs = append(addrs, a.Unmap())
		}
	}
	return addrs
}

// dnsPod stands for the cluster's DNS, which the node itself answers: policies allow it by the names that the pods have elsewhere.
func (c *Controller) dnsPod() pod {
	return pod{
		namespace: metav1.NamespaceSystem, name: "kube-dns", labels: labels.Set{"k8s-app": "kube-dns"}, addrs: c.cfg.ClusterDNS,
		ports: []namedPort{{"dns", "udp", 53}, {"dns-tcp", "tcp", 53}, {"metrics", "tcp", 9153}},
	}
}
