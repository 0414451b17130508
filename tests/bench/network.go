// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// trait is something of a path through the network.
type trait struct {
	ask        string // of netload
	name, text string
	value      func(answer) float64
}

func traits() []trait {
	p50 := func(a answer) float64 { return float64(a.P50.Nanoseconds()) / 1e3 }
	p99 := func(a answer) float64 { return float64(a.P99.Nanoseconds()) / 1e3 }
	return []trait{
		{"throughput", "throughput", "throughput (more is better)", func(a answer) float64 { return a.PerSecond * 8 / 1e9 }},
		{"requests", "request p50", "request, median", p50},
		{"requests", "request p99", "request, p99", p99},
		{"connections", "connection p50", "new connection, median", p50},
		{"connections", "connection p99", "new connection, p99", p99},
	}
}

// networkFigures: the bare path between the machines in units, what is built on it as a ratio to that.
func networkFigures() []figure {
	var list []figure
	for _, t := range traits() {
		unit := "µs"
		if t.name == "throughput" {
			unit = "Gbit/s"
		}
		list = append(list, figure{"bare " + t.name, "machine to machine: " + t.text, unit})
	}
	for _, mode := range proxyModes() {
		for _, path := range []string{"pod", "service"} {
			for _, t := range traits() {
				list = append(list, figure{mode + " " + path + " " + t.name, "pod to " + path + " (" + mode + ") / machine to machine: " + t.text, ""})
			}
		}
	}
	return list
}

// traffic measures the bare path between the machines, and those of pods on it.
func (n *netbed) traffic(ctx context.Context, o options, rec *recorder) error {
	svc, err := n.service(ctx, "target", map[string]string{"app": n.serverPod.Labels["app"]})
	if err != nil {
		return err
	}
	// Asked for by the node, not by the pod: what is sent before the rules are there leaves the node untranslated, and the kernel would go
	// on with that for two minutes when a port of the client is used again.
	if _, err := await(ctx, n.bare, svc, true); err != nil {
		return err
	}
	paths := []route{
		{n.mode + " pod", n.client, at(n.serverPod.Status.PodIP)},
		{n.mode + " service", n.client, svc},
	}
	for range rounds {
		for _, ask := range []string{"throughput", "requests", "connections"} {
			// One after the other, so that all meet the same weather.
			bare, err := route{"bare", n.bare, at(n.first.machine().IP())}.measure(ctx, o, ask)
			if err != nil {
				return err
			}
			for trait, v := range bare {
				rec.add("bare "+trait, v)
			}
			for _, p := range paths {
				values, err := p.measure(ctx, o, ask)
				if err != nil {
					return err
				}
				for trait, v := range values {
					rec.add(p.name+" "+trait, v/bare[trait])
				}
			}
		}
	}
	return nil
}

// route is a way through the network.
type route struct {
	name string
	from *prober
	to   string
}

// measure returns the traits that a load has.
func (r route) measure(ctx context.Context, o options, ask string) (map[string]float64, error) {
	a, err := r.from.ask(ctx, ask, r.to, span(o.span))
	if err != nil {
		return nil, err
	}
	values := map[string]float64{}
	for _, t := range traits() {
		if t.ask == ask {
			values[t.name] = t.value(a)
		}
	}
	return values, nil
}

// service makes a Service and returns its address with port.
func (n *netbed) service(ctx context.Context, name string, selector map[string]string) (string, error) {
	s, err := n.api.CoreV1().Services(metav1.NamespaceDefault).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.ServiceSpec{Selector: selector, Ports: []corev1.ServicePort{{Port: loadPort}}},
	}, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	return at(s.Spec.ClusterIP), nil
}
