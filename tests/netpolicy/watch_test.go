// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/kedge-io/kedge/pkg/netpolicy/oracle"
	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// watched is what a test server says about something that it tries again and again; see there.
type watched struct {
	Target            string
	Tries, OK         int
	FirstOK, LastOK   time.Time
	FirstBad, LastBad time.Time
	Streak, Worst     int
	Error             string
}

// visitor is what a test server says about who came to its ports.
type visitor struct {
	First, Last time.Time
	Count       int
}

// ask calls the API of a prober.
func (s *site) ask(ctx context.Context, p prober, method, path, body string, into any) error {
	args := append(strings.Fields(probeFlags), "--unix-socket", p.dir+"/sock", "-X", method, "--data-binary", "@-", "http://probe"+path)
	out, err := p.machine.ExecInput(ctx, strings.NewReader(body), args...)
	if err != nil {
		return fmt.Errorf("%s %s of %s: %w", method, path, p.name, err)
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		return fmt.Errorf("%s %s of %s: %w: %s", method, path, p.name, err, out)
	}
	return nil
}

func (s *site) prober(t *testing.T, name string) prober {
	t.Helper()
	for _, p := range s.probers {
		if p.name == name {
			return p
		}
	}
	t.Fatalf("there is no %s", name)
	return prober{}
}

// watch lets a prober try targets until the test ends.
func (s *site) watch(t *testing.T, p prober, every, timeout time.Duration, targets ...string) {
	t.Helper()
	path := fmt.Sprintf("/watch?every=%s&timeout=%s", every, timeout)
	if err := s.ask(cluster.Within(t, minute), p, "POST", path, strings.Join(targets, "\n"), new(any)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), minute)
		defer cancel()
		_ = s.ask(ctx, p, "DELETE", "/watch", "", new(any)) // the pod may be gone
	})
}

// watches is how that goes, by target.
func (s *site) watches(ctx context.Context, p prober) (map[string]watched, error) {
	var list []watched
	if err := s.ask(ctx, p, "GET", "/watch", "", &list); err != nil {
		return nil, err
	}
	m := map[string]watched{}
	for _, w := range list {
		m[w.Target] = w
	}
	return m, nil
}

// forget lets a prober forget who came.
func (s *site) forget(t *testing.T, p prober) {
	t.Helper()
	if err := s.ask(cluster.Within(t, minute), p, "DELETE", "/seen", "", new(any)); err != nil {
		t.Fatal(err)
	}
}

// visitors are who came, as "tcp 10.42.0.2".
func (s *site) visitors(t *testing.T, p prober) map[string]visitor {
	t.Helper()
	m := map[string]visitor{}
	if err := s.ask(cluster.Within(t, minute), p, "GET", "/seen", "", &m); err != nil {
		t.Fatal(err)
	}
	return m
}

// find is the target of a pod, by TCP or UDP, at its own address or at that of its Service.
func (s *site) find(t *testing.T, pod, kind string, service bool) target {
	t.Helper()
	for _, to := range s.targets {
		if to.name == pod && to.kind == kind && to.service() == service && to.port == oracle.Ports[0] {
			return to
		}
	}
	t.Fatalf("there is no target %s %s", kind, pod)
	return target{}
}

// addressesOf are the targets that are a pod, by TCP and UDP at all of its own addresses, as text.
func (s *site) addressesOf(pod string) []string {
	var lines []string
	for _, to := range s.targets {
		if to.name == pod && !to.service() && to.addr.Port() == uint16(oracle.Ports[0]) {
			lines = append(lines, to.kind+" "+to.addr.String())
		}
	}
	return lines
}

// policy reads the spec of a policy.
func policy(t *testing.T, namespace, name, spec string) networkingv1.NetworkPolicy {
	t.Helper()
	p := networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: networkingv1.SchemeGroupVersion.String(), Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
	}
	if err := yaml.UnmarshalStrict([]byte(spec), &p.Spec); err != nil {
		t.Fatal(err)
	}
	return p
}

// with is the base with policies.
func (s *site) with(policies ...networkingv1.NetworkPolicy) *oracle.World {
	w := s.base.Clone()
	w.Policies = policies
	return w
}

// newcomers is the namespace of pods that come and go.
const newcomers = "newcomers"

// newcomer starts a pod that tries targets from its first moment on, every 5 ms.
func (s *site) newcomer(t *testing.T, name, node, role string, targets ...string) prober {
	t.Helper()
	p := corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: newcomers, Name: name, Labels: map[string]string{"role": role}},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "server"}}},
	}
	err := s.applyPod(cluster.Within(t, minute), p, corev1.EnvVar{Name: "WATCH", Value: strings.Join(targets, ";")},
		corev1.EnvVar{Name: "EVERY", Value: "5ms"}, corev1.EnvVar{Name: "TIMEOUT", Value: "200ms"})
	if err != nil {
		t.Fatal(err)
	}
	return prober{name: newcomers + "/" + name, pod: &p, node: node, machine: s.machine(node), dir: socketDir(&p)}
}

// newcomersNamespace makes the namespace, with policies, and removes it when the test ends.
func (s *site) newcomersNamespace(t *testing.T, policies ...networkingv1.NetworkPolicy) {
	t.Helper()
	w := s.now.Clone()
	w.Namespaces = append(w.Namespaces, corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: newcomers, Labels: map[string]string{"ns": newcomers}}})
	w.Policies = append(w.Policies, policies...)
	if err := s.become(cluster.Within(t, minute), w); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), minute)
		defer cancel()
		if err := s.client.CoreV1().Namespaces().Delete(ctx, newcomers, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		gone := func(ctx context.Context) error {
			if _, err := s.client.CoreV1().Namespaces().Get(ctx, newcomers, metav1.GetOptions{}); err == nil {
				return fmt.Errorf("it is there")
			}
			return nil
		}
		if err := testbed.Wait(ctx, "the namespace to be gone", gone); err != nil {
			t.Error(err)
		}
		s.now.Namespaces = slices.DeleteFunc(s.now.Namespaces, func(ns corev1.Namespace) bool { return ns.Name == newcomers })
		s.now.Policies = slices.DeleteFunc(s.now.Policies, func(p networkingv1.NetworkPolicy) bool { return p.Namespace == newcomers })
	})
}

// waitReady waits until a pod is ready in its present container, and returns its addresses.
func (s *site) waitReady(t *testing.T, p prober) []netip.Addr {
	t.Helper()
	var addrs []netip.Addr
	cluster.Eventually(t, p.name+" to be ready", func(ctx context.Context) error {
		got, err := s.client.CoreV1().Pods(p.pod.Namespace).Get(ctx, p.pod.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if !ready(got) {
			return fmt.Errorf("it is %s: %+v", got.Status.Phase, got.Status.ContainerStatuses)
		}
		addrs = nil
		for _, ip := range got.Status.PodIPs {
			addrs = append(addrs, netip.MustParseAddr(ip.IP))
		}
		return nil
	})
	return addrs
}

// tried waits until a prober has tried everything it watches for a while.
func (s *site) tried(t *testing.T, p prober, n int) map[string]watched {
	t.Helper()
	var m map[string]watched
	cluster.Eventually(t, fmt.Sprintf("%s to try %d times", p.name, n), func(ctx context.Context) error {
		var err error
		if m, err = s.watches(ctx, p); err != nil {
			return err
		}
		if len(m) == 0 {
			return fmt.Errorf("it tries nothing")
		}
		for _, w := range m {
			if w.Tries < n {
				return fmt.Errorf("%+v", w)
			}
		}
		return nil
	})
	return m
}
