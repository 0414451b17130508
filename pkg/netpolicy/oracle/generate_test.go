// SPDX-License-Identifier: Apache-2.0

package oracle_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/kubernetes/pkg/apis/networking"
	internal "k8s.io/kubernetes/pkg/apis/networking/v1"
	"k8s.io/kubernetes/pkg/apis/networking/validation"

	"github.com/kedge-io/kedge/pkg/netpolicy/oracle"
)

const worlds = 300

func random(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }

// TestGenerate: a seed makes one world, with policies that the API server accepts, and so do its mutations.
func TestGenerate(t *testing.T) {
	for seed := range uint64(worlds) {
		r, again := random(seed), random(seed)
		w, same := oracle.Generate(r), oracle.Generate(again)
		for range 10 {
			change, sameChange := oracle.Mutate(r, w), oracle.Mutate(again, same)
			if !reflect.DeepEqual(change, sameChange) {
				t.Fatalf("seed %d: %+v and %+v", seed, change, sameChange)
			}
		}
		if !reflect.DeepEqual(w, same) {
			t.Fatalf("seed %d makes two worlds", seed)
		}
		if !reflect.DeepEqual(w, w.Clone()) {
			t.Fatalf("seed %d: the copy differs", seed)
		}
		for _, p := range w.Policies {
			p.ResourceVersion = "1"
			internal.SetDefaults_NetworkPolicy(&p)
			var converted networking.NetworkPolicy
			if err := internal.Convert_v1_NetworkPolicy_To_networking_NetworkPolicy(&p, &converted, nil); err != nil {
				t.Fatal(err)
			}
			if errs := validation.ValidateNetworkPolicy(&converted, validation.NetworkPolicyValidationOptions{}); len(errs) > 0 {
				t.Errorf("seed %d: %v: %+v", seed, errs.ToAggregate(), p.Spec)
			}
		}
	}
}

// TestGenerateCovers: what is generated allows and denies for every reason, and neither too rarely.
func TestGenerateCovers(t *testing.T) {
	reasons := map[string]int{}
	for seed := range uint64(worlds / 3) {
		w := oracle.Generate(random(seed))
		each(w, func(from, to oracle.Endpoint, protocol corev1.Protocol, port int32) {
			_, why := w.Allowed(from, to, protocol, port)
			reasons[why.Text]++
		})
	}
	t.Log(reasons)
	total := 0
	for _, n := range reasons {
		total += n
	}
	for _, text := range []string{"a pod reaches itself", "a node reaches its own pods", "egress is denied", "ingress is denied", "allowed", "no policy applies"} {
		if reasons[text] < total/200 {
			t.Errorf("%q: %d of %d", text, reasons[text], total)
		}
	}
}

// each calls f for the connections of a world that one may ask about.
func each(w *oracle.World, f func(from, to oracle.Endpoint, protocol corev1.Protocol, port int32)) {
	var ends []oracle.Endpoint
	for _, p := range w.Pods {
		if p.Spec.HostNetwork || p.Status.Phase != corev1.PodRunning {
			continue
		}
		for _, ip := range p.Status.PodIPs {
			ends = append(ends, w.At(netip.MustParseAddr(ip.IP)))
		}
	}
	for i, a := range w.Others {
		ends = append(ends, oracle.Endpoint{Addr: a, Node: []string{"n1", "n1", "n2", "n2", "", ""}[i]})
	}
	for _, from := range ends {
		for _, to := range append(ends[:len(ends):len(ends)], w.DNS(w.ClusterDNS[0]), w.DNS(w.ClusterDNS[1])) {
			if from.Addr.Is4() != to.Addr.Is4() {
				continue
			}
			for _, protocol := range []corev1.Protocol{tcp, udp, sctp} {
				for _, port := range []int32{1, 53, 54, oracle.Ports[0], oracle.Ports[1]} {
					f(from, to, protocol, port)
				}
			}
		}
	}
}

// TestAnotherWay computes the same in another way: not by asking for each connection whether a rule matches it, but by listing
// for each policy all that it opens, with upstream's own label selectors.
func TestAnotherWay(t *testing.T) {
	for seed := range uint64(worlds / 5) {
		r := random(seed)
		w := oracle.Generate(r)
		for range 2 {
			open := enumerate(t, w)
			each(w, func(from, to oracle.Endpoint, protocol corev1.Protocol, port int32) {
				want := open.allows(from, to, protocol, port)
				if got, why := w.Allowed(from, to, protocol, port); got != want {
					t.Errorf("seed %d: %s to %s %s/%d: %t (%s), the other way %t", seed, from, to, protocol, port, got, why, want)
				}
			})
			if t.Failed() {
				return
			}
			oracle.Mutate(r, w)
		}
	}
}

// opened is what policies open: for each isolated address and direction, what others may use.
type opened struct {
	ingress, egress map[netip.Addr]map[string]bool
	same            map[netip.Addr]string // the pod that has an address
}

func flow(peer netip.Addr, protocol corev1.Protocol, port int32) string {
	return fmt.Sprintf("%s %s %d", peer, protocol, port)
}

func (o *opened) allows(from, to oracle.Endpoint, protocol corev1.Protocol, port int32) bool {
	if pod, ok := o.same[from.Addr]; ok && pod == o.same[to.Addr] {
		return true
	}
	out, isolated := o.egress[from.Addr]
	if isolated && !out[flow(to.Addr, protocol, port)] {
		return false
	}
	in, isolated := o.ingress[to.Addr]
	if _, isPod := o.same[from.Addr]; !isPod && from.Node != "" && from.Node == to.Node {
		return true
	}
	return !isolated || in[flow(from.Addr, protocol, port)]
}

// enumerate lists all flows between the addresses of a world, policy by policy.
func enumerate(t *testing.T, w *oracle.World) *opened {
	o := &opened{map[netip.Addr]map[string]bool{}, map[netip.Addr]map[string]bool{}, map[netip.Addr]string{}}
	pods := map[netip.Addr]*corev1.Pod{}
	for i, p := range w.Pods {
		if p.Spec.HostNetwork || p.Status.Phase != corev1.PodRunning {
			continue
		}
		for _, ip := range p.Status.PodIPs {
			a := netip.MustParseAddr(ip.IP)
			pods[a], o.same[a] = &w.Pods[i], p.Namespace+"/"+p.Name
		}
	}
	all := maps.Clone(pods)
	for _, a := range w.ClusterDNS {
		all[a] = w.DNS(a).Pod
	}
	for _, a := range w.Others {
		all[a] = nil
	}
	for _, p := range w.Policies {
		internal.SetDefaults_NetworkPolicy(&p)
		for subject, pod := range pods {
			if pod.Namespace != p.Namespace || !upstream(t, &p.Spec.PodSelector).Matches(labels.Set(pod.Labels)) {
				continue
			}
			if slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeIngress) {
				flows := isolate(o.ingress, subject)
				for _, rule := range p.Spec.Ingress {
					for from := range chosen(t, w, all, p.Namespace, rule.From) {
						openPorts(flows, from, rule.Ports, pod)
					}
				}
			}
			if slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeEgress) {
				flows := isolate(o.egress, subject)
				for _, rule := range p.Spec.Egress {
					for to := range chosen(t, w, all, p.Namespace, rule.To) {
						openPorts(flows, to, rule.Ports, all[to])
					}
				}
			}
		}
	}
	return o
}

func isolate(m map[netip.Addr]map[string]bool, a netip.Addr) map[string]bool {
	if m[a] == nil {
		m[a] = map[string]bool{}
	}
	return m[a]
}

func upstream(t *testing.T, s *metav1.LabelSelector) labels.Selector {
	t.Helper()
	selector, err := metav1.LabelSelectorAsSelector(s) // of nil it is nothing
	if err != nil {
		t.Fatal(err)
	}
	return selector
}

// chosen are the addresses that belong to any of some peers.
func chosen(t *testing.T, w *oracle.World, all map[netip.Addr]*corev1.Pod, namespace string, peers []networkingv1.NetworkPolicyPeer) map[netip.Addr]bool {
	set := map[netip.Addr]bool{}
	if len(peers) == 0 {
		peers = []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "0.0.0.0/0"}}, {IPBlock: &networkingv1.IPBlock{CIDR: "::/0"}}}
	}
	for _, peer := range peers {
		if peer.IPBlock != nil {
			own := map[netip.Addr]bool{}
			for a := range all {
				own[a] = netip.MustParsePrefix(peer.IPBlock.CIDR).Contains(a)
			}
			for _, e := range peer.IPBlock.Except {
				for a := range all {
					own[a] = own[a] && !netip.MustParsePrefix(e).Contains(a)
				}
			}
			for a, in := range own {
				set[a] = set[a] || in
			}
			continue
		}
		namespaces := map[string]bool{namespace: true}
		if peer.NamespaceSelector != nil {
			clear(namespaces)
			for _, ns := range w.Namespaces {
				namespaces[ns.Name] = upstream(t, peer.NamespaceSelector).Matches(labels.Set(ns.Labels))
			}
		}
		selector := labels.Everything()
		if peer.PodSelector != nil {
			selector = upstream(t, peer.PodSelector)
		}
		for a, pod := range all {
			if pod != nil && namespaces[pod.Namespace] && selector.Matches(labels.Set(pod.Labels)) {
				set[a] = true
			}
		}
	}
	for a, in := range set {
		if !in {
			delete(set, a)
		}
	}
	return set
}

// openPorts opens the ports 0 to 8000 of a rule, which are enough, one by one.
func openPorts(flows map[string]bool, peer netip.Addr, ports []networkingv1.NetworkPolicyPort, server *corev1.Pod) {
	interesting := []int32{1, 53, 54, oracle.Ports[0], oracle.Ports[1]}
	if len(ports) == 0 {
		for _, protocol := range []corev1.Protocol{tcp, udp, sctp} {
			for _, n := range interesting {
				flows[flow(peer, protocol, n)] = true
			}
		}
	}
	for _, p := range ports {
		protocol := tcp
		if p.Protocol != nil {
			protocol = *p.Protocol
		}
		numbers := interesting
		switch {
		case p.Port == nil:
		case p.Port.StrVal != "":
			numbers = nil
			if server != nil {
				for _, c := range server.Spec.Containers[0].Ports {
					if c.Name == p.Port.StrVal && c.Protocol == protocol {
						numbers = append(numbers, c.ContainerPort)
					}
				}
			}
		case p.EndPort != nil:
			numbers = nil
			for n := p.Port.IntVal; n <= *p.EndPort; n++ {
				if slices.Contains(interesting, n) {
					numbers = append(numbers, n)
				}
			}
		default:
			numbers = []int32{p.Port.IntVal}
		}
		for _, n := range numbers {
			flows[flow(peer, protocol, n)] = true
		}
	}
}
