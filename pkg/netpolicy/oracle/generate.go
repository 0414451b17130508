// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"fmt"
	"math/rand/v2"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Ports are those that every pod of [Layout] listens on, with TCP and with UDP.
var Ports = [...]int32{7080, 7081}

// Layout is nine pods, a, b and c in the namespaces x, y and z, on nodes in turn. They have labels to select by, and names for their
// ports that mean different numbers, or another protocol, from pod to pod. They have no addresses yet.
func Layout(nodes ...string) *World {
	w := &World{}
	for i, ns := range []string{"x", "y", "z"} {
		labels := map[string]string{"ns": ns, corev1.LabelMetadataName: ns}
		if ns != "z" {
			labels["env"] = "prod"
		}
		w.Namespaces = append(w.Namespaces, corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns, Labels: labels}})
		for j, name := range []string{"a", "b", "c"} {
			w.Pods = append(w.Pods, corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: podLabels(i, j)},
				Spec: corev1.PodSpec{
					NodeName:   nodes[(i+j)%len(nodes)],
					Containers: []corev1.Container{{Name: "server", Ports: containerPorts(j)}},
				},
			})
		}
	}
	w.Namespaces = append(w.Namespaces, corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: metav1.NamespaceSystem, Labels: map[string]string{corev1.LabelMetadataName: metav1.NamespaceSystem},
	}})
	return w
}

// podLabels: one that tells the pods of a namespace apart, one that crosses namespaces, one that is there or not and may be empty.
func podLabels(i, j int) map[string]string {
	labels := map[string]string{"pod": string(rune('a' + j)), "role": [...]string{"front", "back"}[(i+j)%2]}
	switch (i + 2*j) % 3 {
	case 0:
		labels["extra"] = ""
	case 1:
		labels["extra"] = "yes"
	}
	return labels
}

func containerPorts(j int) []corev1.ContainerPort {
	tcp, udp := corev1.ProtocolTCP, corev1.ProtocolUDP
	one, two := Ports[0], Ports[1]
	return [][]corev1.ContainerPort{
		{{Name: "web", Protocol: tcp, ContainerPort: one}, {Name: "data", Protocol: udp, ContainerPort: one}, {Name: "alt", Protocol: tcp, ContainerPort: two}},
		{{Name: "web", Protocol: tcp, ContainerPort: two}, {Name: "data", Protocol: udp, ContainerPort: two}, {Name: "alt", Protocol: udp, ContainerPort: one}},
		{{Name: "web", Protocol: tcp, ContainerPort: one}, {Name: "data", Protocol: tcp, ContainerPort: two}},
	}[j]
}

// Generate makes a world out of [Layout] with addresses, some pods that policies must not take for pods, and policies. What it
// makes depends on the state of r alone.
func Generate(r *rand.Rand) *World {
	nodes := []string{"n1", "n2"}
	w := Layout(nodes...)
	for i := range w.Pods {
		p := &w.Pods[i]
		p.Status.Phase = corev1.PodRunning
		node := 0
		if p.Spec.NodeName != nodes[0] {
			node = 1
		}
		setAddress(p, fmt.Sprintf("10.42.%d.%d", node, 2+i), fmt.Sprintf("fd00:42:0:%d::%x", node, 2+i))
	}
	strange := func(name string, change func(p *corev1.Pod)) {
		p := w.Pods[r.IntN(9)].DeepCopy()
		p.Name = name
		change(p)
		w.Pods = append(w.Pods, *p)
	}
	strange("host", func(p *corev1.Pod) {
		p.Spec.HostNetwork = true
		setAddress(p, "192.0.2.1", "2001:db8::1")
	})
	strange("finished", func(p *corev1.Pod) { // its address is another's now
		p.Status.Phase = pick(r, corev1.PodSucceeded, corev1.PodFailed)
		p.Status.PodIPs = w.Pods[r.IntN(9)].Status.PodIPs
	})
	strange("pending", func(p *corev1.Pod) {
		p.Status = corev1.PodStatus{Phase: corev1.PodPending}
	})
	for _, a := range []string{"192.0.2.1", "2001:db8::1", "192.0.2.2", "2001:db8::2", "198.51.100.7", "2001:db8:51::7"} {
		w.Others = append(w.Others, netip.MustParseAddr(a))
	}
	w.ClusterDNS = []netip.Addr{netip.MustParseAddr("10.43.0.10"), netip.MustParseAddr("fd00:43::a")}
	w.Policies = Policies(r, w)
	return w
}

func setAddress(p *corev1.Pod, addresses ...string) {
	p.Status.PodIP, p.Status.PodIPs = addresses[0], nil
	for _, a := range addresses {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: a})
	}
}

// Policies makes two to seven policies for a world, whose pods should have their addresses.
func Policies(r *rand.Rand, w *World) []networkingv1.NetworkPolicy {
	var policies []networkingv1.NetworkPolicy
	for i := range 2 + r.IntN(6) {
		policies = append(policies, policy(r, w, fmt.Sprintf("p%d", i)))
	}
	return policies
}

// Change is what [Mutate] did to a world: one object is new, different or gone.
type Change struct {
	Text string
	// One of these is set.
	Set       *networkingv1.NetworkPolicy
	Delete    *networkingv1.NetworkPolicy
	Pod       *corev1.Pod
	Namespace *corev1.Namespace
}

// Mutate changes one thing in a world, as users do: a policy, or labels of a pod or a namespace.
func Mutate(r *rand.Rand, w *World) Change {
	n := len(w.Policies)
	switch what := r.IntN(10); {
	case what < 2 || n == 0:
		p := policy(r, w, fmt.Sprintf("m%d", r.Uint32()))
		w.Policies = append(w.Policies, p)
		return Change{Text: "new policy " + nameOf(&p), Set: p.DeepCopy()}
	case what < 4 || n > 8:
		i := r.IntN(n)
		p := w.Policies[i]
		w.Policies = append(w.Policies[:i:i], w.Policies[i+1:]...)
		return Change{Text: "no policy " + nameOf(&p), Delete: &p}
	case what < 7:
		i := r.IntN(n)
		p := policy(r, w, w.Policies[i].Name)
		p.Namespace = w.Policies[i].Namespace
		w.Policies[i] = p
		return Change{Text: "another policy " + nameOf(&p), Set: p.DeepCopy()}
	case what < 9:
		p := &w.Pods[r.IntN(len(w.Pods))]
		p.Labels = relabel(r, p.Labels, "role", "extra")
		return Change{Text: fmt.Sprintf("pod %s/%s has %v", p.Namespace, p.Name, p.Labels), Pod: p.DeepCopy()}
	}
	ns := &w.Namespaces[r.IntN(3)]
	ns.Labels = relabel(r, ns.Labels, "env")
	return Change{Text: fmt.Sprintf("namespace %s has %v", ns.Name, ns.Labels), Namespace: ns.DeepCopy()}
}

// relabel gives one of some keys another value, or takes it away.
func relabel(r *rand.Rand, labels map[string]string, keys ...string) map[string]string {
	changed := map[string]string{}
	for k, v := range labels {
		changed[k] = v
	}
	key := pick(r, keys...)
	was, had := changed[key]
	values := labelValues(key)
	if v := pick(r, values...); had && r.IntN(3) == 0 {
		delete(changed, key)
	} else if had && v == was {
		changed[key] = values[0]
		if was == values[0] {
			changed[key] = values[1]
		}
	} else {
		changed[key] = v
	}
	return changed
}

// labelValues are the values that occur; the first two differ.
func labelValues(key string) []string {
	switch key {
	case "ns":
		return []string{"x", "y", "z"}
	case "pod":
		return []string{"a", "b", "c"}
	case "role":
		return []string{"front", "back"}
	case "env":
		return []string{"prod", "test"}
	}
	return []string{"yes", ""}
}

func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

// chance is true in p of 100 cases.
func chance(r *rand.Rand, p int) bool { return r.IntN(100) < p }
