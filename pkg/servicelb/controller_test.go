// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
)

// startController runs a controller until the test ends.
func startController(t *testing.T, p Pool, objects ...runtime.Object) *fake.Clientset {
	t.Helper()
	client := fake.NewClientset(objects...)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- NewController(ControllerConfig{Client: client, Pool: func() Pool { return p }, APIPort: 6443, BalancerPort: 6444}, testLog(t)).Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return client
}

// becomes waits until a Service has these addresses.
func becomes(t *testing.T, client *fake.Clientset, name string, want ...string) {
	t.Helper()
	eventually(t, "addresses of "+name, func() error {
		svc, err := client.CoreV1().Services("ns").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if got := texts(svc.Status.LoadBalancer.Ingress); !slices.Equal(got, append([]string{}, want...)) {
			return fmt.Errorf("%v, want %v", got, want)
		}
		return nil
	})
}

func update(t *testing.T, client *fake.Clientset, name string, change func(*corev1.Service)) {
	t.Helper()
	svc, err := client.CoreV1().Services("ns").Get(t.Context(), name, metav1.GetOptions{})
	must(t, err)
	change(svc)
	_, err = client.CoreV1().Services("ns").Update(t.Context(), svc, metav1.UpdateOptions{})
	must(t, err)
}

func TestControllerOnNodes(t *testing.T) {
	slice := sliceOn("n2", "10.42.2.2")(nil)[0]
	slice.ObjectMeta = metav1.ObjectMeta{Namespace: "ns", Name: "local-1", Labels: map[string]string{discoveryv1.LabelServiceName: "local"}}
	client := startController(t, nil, nodeWith("n1", true, nil, "192.0.2.1"), nodeWith("n2", true, nil, "192.0.2.2"),
		service("web", 1), service("local", 2, policyLocal, ports(81)), service("later", 3), slice)
	becomes(t, client, "web", "192.0.2.1", "192.0.2.2")
	becomes(t, client, "local", "192.0.2.2")
	eventually(t, "an event about the conflict", func() error {
		events, err := client.CoreV1().Events("ns").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if e.InvolvedObject.Name == "later" && e.Reason == reasonPortConflict && strings.Contains(e.Message, "Service ns/web") {
				return nil
			}
		}
		return fmt.Errorf("there are %d others", len(events.Items))
	})
	must(t, client.CoreV1().Nodes().Delete(t.Context(), "n1", metav1.DeleteOptions{}))
	becomes(t, client, "web", "192.0.2.2")
	becomes(t, client, "later")

	// The older one gives the port up by being something else, and loses its status.
	update(t, client, "web", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeClusterIP })
	becomes(t, client, "web")
	becomes(t, client, "later", "192.0.2.2")
	update(t, client, "later", func(s *corev1.Service) { s.Annotations = map[string]string{AnnotationIgnore: "false"} })
	becomes(t, client, "later")
	if leases := leaseNames(t, client); len(leases) > 0 {
		t.Errorf("leases without a pool: %v", leases)
	}
}

func leaseNames(t *testing.T, client *fake.Clientset) []string {
	t.Helper()
	list, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).List(t.Context(), metav1.ListOptions{})
	must(t, err)
	var names []string
	for _, l := range list.Items {
		names = append(names, l.Name)
	}
	slices.Sort(names)
	return names
}

func TestControllerWithPool(t *testing.T) {
	other := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: "kedge"}}
	client := startController(t, pool(t, "192.0.2.10-192.0.2.11"), service("web", 1), other)
	becomes(t, client, "web", "192.0.2.10")
	_, err := client.CoreV1().Services("ns").Create(t.Context(), service("local", 2, policyLocal), metav1.CreateOptions{})
	must(t, err)
	becomes(t, client, "local", "192.0.2.11")
	role, err := client.RbacV1().Roles(metav1.NamespaceSystem).Get(t.Context(), roleName, metav1.GetOptions{})
	must(t, err)
	want := []string{leaseName, leaseName + "-local"}
	if got := role.Rules[0].ResourceNames; !slices.Equal(got, want) || len(role.Rules) != 1 {
		t.Errorf("nodes may write the leases %v, want %v", got, want)
	}
	if got := leaseNames(t, client); !slices.Equal(got, append([]string{"kedge"}, want...)) {
		t.Errorf("leases: %v", got)
	}
	for _, name := range []string{"web", "local"} {
		must(t, client.CoreV1().Services("ns").Delete(t.Context(), name, metav1.DeleteOptions{}))
	}
	eventually(t, "the leases and the role to go", func() error {
		if got := leaseNames(t, client); !slices.Equal(got, []string{"kedge"}) {
			return fmt.Errorf("%v", got)
		}
		if _, err := client.RbacV1().Roles(metav1.NamespaceSystem).Get(t.Context(), roleName, metav1.GetOptions{}); err == nil {
			return fmt.Errorf("the role is there")
		}
		return nil
	})
}

// TestControllerChangesPool: addresses follow the pool, and without one they are those of nodes.
func TestControllerChangesPool(t *testing.T) {
	var current atomic.Pointer[Pool]
	changed := make(chan struct{}, 1)
	set := func(p Pool) {
		current.Store(&p)
		changed <- struct{}{}
	}
	set(pool(t, "192.0.2.10"))
	client := fake.NewClientset(service("web", 1), nodeWith("n", true, nil, "192.0.2.1"))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- NewController(ControllerConfig{Client: client, Pool: func() Pool { return *current.Load() }, PoolChanged: changed, APIPort: 6443, BalancerPort: 6444}, testLog(t)).Run(ctx)
	}()
	becomes(t, client, "web", "192.0.2.10")
	set(pool(t, "192.0.2.20-192.0.2.21"))
	becomes(t, client, "web", "192.0.2.20")
	set(pool(t, "192.0.2.19-192.0.2.21")) // what it has it keeps
	set(nil)
	becomes(t, client, "web", "192.0.2.1")
	eventually(t, "the leases to go", func() error {
		if got := leaseNames(t, client); len(got) > 0 {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	set(pool(t, "192.0.2.20"))
	becomes(t, client, "web", "192.0.2.20")
	cancel()
	must(t, <-done)
}
