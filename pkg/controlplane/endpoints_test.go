// SPDX-License-Identifier: Apache-2.0

//lint:file-ignore SA1019 upstream's adapter takes Endpoints, and writes the EndpointSlice as well

package controlplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/util/cert"
	"k8s.io/kubernetes/pkg/controlplane/reconcilers"

	"github.com/kedge-io/kedge/pkg/apilb"
	"github.com/kedge-io/kedge/pkg/pki"
)

func httpsPort(port int32) []corev1.EndpointPort {
	return []corev1.EndpointPort{{Name: "https", Port: port, Protocol: corev1.ProtocolTCP}}
}

func subset(port int32, ips ...string) corev1.EndpointSubset {
	s := corev1.EndpointSubset{Ports: httpsPort(port)}
	for _, ip := range ips {
		s.Addresses = append(s.Addresses, corev1.EndpointAddress{IP: ip})
	}
	return s
}

// serviceAPI is an API that has these endpoints of the kubernetes Service; without subsets it has none.
func serviceAPI(subsets ...corev1.EndpointSubset) *fake.Clientset {
	if subsets == nil {
		return fake.NewClientset()
	}
	return fake.NewClientset(&corev1.Endpoints{Subsets: subsets, ObjectMeta: metav1.ObjectMeta{Name: "kubernetes", Namespace: "default",
		Labels: map[string]string{discoveryv1.LabelSkipMirror: "true"}}})
}

func reconcilerOf(client *fake.Clientset) *endpointReconciler {
	return &endpointReconciler{adapter: adapterOf(client)}
}

func adapterOf(client *fake.Clientset) reconcilers.EndpointsAdapter {
	return reconcilers.NewEndpointsAdapter(client.CoreV1(), client.DiscoveryV1())
}

// endpoints describes the object and its slice, which have to say the same.
func endpoints(t *testing.T, client *fake.Clientset) string {
	t.Helper()
	e, err := client.CoreV1().Endpoints("default").Get(t.Context(), "kubernetes", metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return "none"
	}
	if err != nil {
		t.Fatal(err)
	}
	var parts []string
	for _, s := range e.Subsets {
		var ips []string
		for _, a := range s.Addresses {
			ips = append(ips, a.IP)
		}
		for _, a := range s.NotReadyAddresses {
			ips = append(ips, "not "+a.IP)
		}
		parts = append(parts, fmt.Sprintf("%s at %d", strings.Join(ips, ","), s.Ports[0].Port))
	}
	text := strings.Join(parts, " and ")
	if e.Labels[discoveryv1.LabelSkipMirror] != "true" {
		text += " for the mirroring controller"
	}
	if slice := sliceOf(t, client); slice != "" && slice != text {
		text += ", but the slice has " + slice
	}
	return text
}

func sliceOf(t *testing.T, client *fake.Clientset) string {
	t.Helper()
	s, err := client.DiscoveryV1().EndpointSlices("default").Get(t.Context(), "kubernetes", metav1.GetOptions{})
	if err != nil || len(s.Ports) == 0 {
		return ""
	}
	var ips []string
	for _, e := range s.Endpoints {
		ips = append(ips, e.Addresses...)
	}
	return fmt.Sprintf("%s at %d", strings.Join(ips, ","), *s.Ports[0].Port)
}

func writes(client *fake.Clientset) (verbs []string) {
	for _, a := range client.Actions() {
		if v := a.GetVerb(); v != "get" {
			verbs = append(verbs, v+" "+a.GetResource().Resource)
		}
	}
	return verbs
}

// A server adds its address and leaves those of the others alone; what is as it has to be costs no write.
func TestReconcileEndpoints(t *testing.T) {
	labelless := serviceAPI(subset(6443, "192.0.2.1"))
	if _, err := labelless.CoreV1().Endpoints("default").Patch(t.Context(), "kubernetes", "application/merge-patch+json", []byte(`{"metadata":{"labels":null}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	twoPorts := subset(6443, "192.0.2.1")
	twoPorts.Ports = append(twoPorts.Ports, corev1.EndpointPort{Name: "other", Port: 1})
	notReady := subset(6443, "192.0.2.1")
	notReady.NotReadyAddresses = []corev1.EndpointAddress{{IP: "192.0.2.2"}}
	for _, test := range []struct {
		name   string
		client *fake.Clientset
		ip     string
		want   string
		silent bool // nothing but the slice is written, and that once
	}{
		{name: "the first", client: serviceAPI(), want: "192.0.2.1 at 6443"},
		{name: "it is there", client: serviceAPI(subset(6443, "192.0.2.1")), want: "192.0.2.1 at 6443", silent: true},
		{name: "beside others", client: serviceAPI(subset(6443, "192.0.2.3", "192.0.2.0")), want: "192.0.2.0,192.0.2.1,192.0.2.3 at 6443"},
		{name: "among others in any order", client: serviceAPI(subset(6443, "192.0.2.3", "192.0.2.1")), want: "192.0.2.3,192.0.2.1 at 6443", silent: true},
		{name: "IPv6", client: serviceAPI(subset(6443, "2001:db8::1")), ip: "2001:db8::2", want: "2001:db8::1,2001:db8::2 at 6443"},
		{name: "another port", client: serviceAPI(subset(443, "192.0.2.1", "192.0.2.2")), want: "192.0.2.1,192.0.2.2 at 6443"},
		{name: "further ports", client: serviceAPI(twoPorts), want: "192.0.2.1 at 6443"},
		{name: "two subsets", client: serviceAPI(subset(443, "192.0.2.1"), subset(6443, "192.0.2.2", "192.0.2.1")), want: "192.0.2.1,192.0.2.2 at 6443"},
		{name: "an address twice", client: serviceAPI(subset(6443, "192.0.2.1", "192.0.2.2", "192.0.2.1")), want: "192.0.2.1,192.0.2.2 at 6443"},
		{name: "an address twice and its own missing", client: serviceAPI(subset(6443, "192.0.2.2", "192.0.2.2")), want: "192.0.2.1,192.0.2.2 at 6443"},
		{name: "addresses that are not ready", client: serviceAPI(notReady), want: "192.0.2.1 at 6443"},
		{name: "no addresses", client: serviceAPI([]corev1.EndpointSubset{}...), want: "192.0.2.1 at 6443"},
		{name: "without the label", client: labelless, want: "192.0.2.1 at 6443"},
	} {
		t.Run(test.name, func(t *testing.T) {
			ip := "192.0.2.1"
			if test.ip != "" {
				ip = test.ip
			}
			test.client.ClearActions()
			r := reconcilerOf(test.client)
			if err := r.ReconcileEndpoints("kubernetes", net.ParseIP(ip), httpsPort(6443), true); err != nil {
				t.Fatal(err)
			}
			done := writes(test.client)
			if test.silent && !slices.Equal(done, []string{"create endpointslices"}) {
				t.Errorf("it wrote %v", done)
			}
			if got := endpoints(t, test.client); sortIPs(got) != sortIPs(test.want) || sliceOf(t, test.client) == "" {
				t.Errorf("got %s, want %s", got, test.want)
			}
			test.client.ClearActions()
			if err := r.ReconcileEndpoints("kubernetes", net.ParseIP(ip), httpsPort(6443), true); err != nil {
				t.Fatal(err)
			}
			if again := writes(test.client); again != nil {
				t.Errorf("the second time it wrote %v", again)
			}
		})
	}
}

// sortIPs brings the addresses of a description into one order.
func sortIPs(text string) string {
	ips, rest, _ := strings.Cut(text, " ")
	list := strings.Split(ips, ",")
	slices.Sort(list)
	return strings.Join(list, ",") + " " + rest
}

func TestRemoveEndpoints(t *testing.T) {
	for _, test := range []struct {
		name   string
		client *fake.Clientset
		want   string
		writes int // of the endpoints
	}{
		{"its own", serviceAPI(subset(6443, "192.0.2.1", "192.0.2.2")), "192.0.2.2 at 6443", 1},
		{"in every subset", serviceAPI(subset(6443, "192.0.2.1", "192.0.2.2"), subset(443, "192.0.2.1")), "192.0.2.2 at 6443", 1},
		{"the only one", serviceAPI(subset(6443, "192.0.2.1")), "", 1},
		{"it is not there", serviceAPI(subset(6443, "192.0.2.2")), "192.0.2.2 at 6443", 0},
		{"no endpoints", serviceAPI(), "none", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := reconcilerOf(test.client)
			r.StopReconciling()
			if err := r.RemoveEndpoints("kubernetes", net.ParseIP("192.0.2.1"), httpsPort(6443)); err != nil {
				t.Fatal(err)
			}
			if got := endpoints(t, test.client); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
			test.client.ClearActions()
			// It is stopped: nothing brings the address back.
			if err := r.ReconcileEndpoints("kubernetes", net.ParseIP("192.0.2.1"), httpsPort(6443), true); err != nil || len(test.client.Actions()) > 0 {
				t.Errorf("after the stop: %v, %v", err, test.client.Actions())
			}
		})
	}
}

// Two servers that write at the same time both end up in the list.
func TestEndpointsConflict(t *testing.T) {
	client := serviceAPI(subset(6443, "192.0.2.2"))
	conflicts, come := 0, 0
	client.PrependReactor("update", "endpoints", func(clienttesting.Action) (bool, runtime.Object, error) {
		if conflicts++; conflicts > 2 {
			return false, nil, nil
		}
		// Meanwhile another one has come.
		resource := schema.GroupVersionResource{Version: "v1", Resource: "endpoints"}
		object, err := client.Tracker().Get(resource, "default", "kubernetes")
		if err == nil {
			e := object.(*corev1.Endpoints).DeepCopy()
			come++
			e.Subsets[0].Addresses = append(e.Subsets[0].Addresses, corev1.EndpointAddress{IP: fmt.Sprint("192.0.2.1", come)})
			err = client.Tracker().Update(resource, e, "default")
		}
		if err != nil {
			t.Error(err)
		}
		return true, nil, apierrors.NewConflict(schema.GroupResource{Resource: "endpoints"}, "kubernetes", errors.New("it has changed"))
	})
	r := reconcilerOf(client)
	if err := r.ReconcileEndpoints("kubernetes", net.ParseIP("192.0.2.1"), httpsPort(6443), true); err != nil {
		t.Fatal(err)
	}
	if got := sortIPs(endpoints(t, client)); got != "192.0.2.1,192.0.2.11,192.0.2.12,192.0.2.2 at 6443" {
		t.Errorf("added: %s", got)
	}
	conflicts = 1 // one more, by the one that has come
	if err := r.RemoveEndpoints("kubernetes", net.ParseIP("192.0.2.2"), nil); err != nil {
		t.Fatal(err)
	}
	if got := sortIPs(endpoints(t, client)); got != "192.0.2.1,192.0.2.11,192.0.2.12,192.0.2.13 at 6443" {
		t.Errorf("removed: %s", got)
	}
	broken := errors.New("etcdserver: request timed out")
	client.PrependReactor("get", "endpoints", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, broken })
	if err := r.ReconcileEndpoints("kubernetes", net.ParseIP("192.0.2.1"), httpsPort(6443), true); !errors.Is(err, broken) {
		t.Errorf("an API that fails: %v", err)
	}
	if err := r.RemoveEndpoints("kubernetes", net.ParseIP("192.0.2.1"), nil); !errors.Is(err, broken) {
		t.Errorf("an API that fails: %v", err)
	}
}

// probed are servers that answer or do not, and how often they were asked.
type probed struct {
	down  map[string]bool
	asked map[string]int
}

func (p *probed) probe(_ context.Context, address string) error {
	p.asked[address]++
	if p.down[address] {
		return errors.New("no answer")
	}
	return nil
}

func dropper(t *testing.T, client *fake.Clientset, down ...string) (*deadDropper, *probed) {
	p := &probed{down: map[string]bool{}, asked: map[string]int{}}
	for _, address := range down {
		p.down[address] = true
	}
	return &deadDropper{adapter: adapterOf(client), probe: p.probe, own: "192.0.2.1", log: slog.New(slog.NewTextHandler(t.Output(), nil)), failures: map[string]int{}}, p
}

func TestDropDead(t *testing.T) {
	portless := subset(6443, "192.0.2.1", "192.0.2.2")
	portless.Ports = nil
	for _, test := range []struct {
		name   string
		client *fake.Clientset
		down   []string
		want   []string // after each look
	}{
		{"all answer", serviceAPI(subset(6443, "192.0.2.1", "192.0.2.2")), nil, []string{"192.0.2.1,192.0.2.2 at 6443"}},
		{"one is dead", serviceAPI(subset(443, "192.0.2.1", "192.0.2.2", "192.0.2.3")), []string{"192.0.2.2:443"},
			[]string{"192.0.2.1,192.0.2.2,192.0.2.3 at 443", "192.0.2.1,192.0.2.2,192.0.2.3 at 443", "192.0.2.1,192.0.2.3 at 443", "192.0.2.1,192.0.2.3 at 443"}},
		{"all others are dead", serviceAPI(subset(6443, "192.0.2.1", "192.0.2.2", "192.0.2.3")), []string{"192.0.2.2:6443", "192.0.2.3:6443"},
			[]string{"192.0.2.1,192.0.2.2,192.0.2.3 at 6443", "192.0.2.1,192.0.2.2,192.0.2.3 at 6443", "192.0.2.1 at 6443"}},
		{"its own is not its business", serviceAPI(subset(6443, "192.0.2.1", "192.0.2.2")), []string{"192.0.2.1:6443"},
			[]string{"192.0.2.1,192.0.2.2 at 6443", "192.0.2.1,192.0.2.2 at 6443", "192.0.2.1,192.0.2.2 at 6443", "192.0.2.1,192.0.2.2 at 6443"}},
		{"the only one is dead", serviceAPI(subset(6443, "192.0.2.2")), []string{"192.0.2.2:6443"},
			[]string{"192.0.2.2 at 6443", "192.0.2.2 at 6443", "192.0.2.2 at 6443", "192.0.2.2 at 6443"}},
		{"IPv6", serviceAPI(subset(6443, "192.0.2.1", "2001:db8::2")), []string{"[2001:db8::2]:6443"},
			[]string{"192.0.2.1,2001:db8::2 at 6443", "192.0.2.1,2001:db8::2 at 6443", "192.0.2.1 at 6443"}},
		{"no endpoints", serviceAPI(), nil, []string{"none", "none"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			d, _ := dropper(t, test.client, test.down...)
			for i, want := range test.want {
				d.look(t.Context())
				if got := endpoints(t, test.client); got != want {
					t.Errorf("after %d looks: %s, want %s", i+1, got, want)
				}
			}
		})
	}
	t.Run("no port", func(t *testing.T) { // it is repaired by somebody else
		client := serviceAPI(portless)
		d, p := dropper(t, client)
		for range 2 * deadAfter {
			d.look(t.Context())
		}
		if len(p.asked) > 0 || len(writes(client)) > 0 {
			t.Errorf("asked %v, wrote %v", p.asked, writes(client))
		}
	})
}

// Three failures in a row are a death, and one that has come back is judged anew.
func TestDropDeadCounts(t *testing.T) {
	client := serviceAPI(subset(6443, "192.0.2.1", "192.0.2.2"))
	d, p := dropper(t, client)
	const two, address = "192.0.2.1,192.0.2.2 at 6443", "192.0.2.2:6443"
	for i, step := range []struct {
		down, back bool
		want       string
	}{
		{true, false, two}, {true, false, two}, {false, false, two}, {true, false, two}, {true, false, two}, {true, false, "192.0.2.1 at 6443"},
		{true, true, two}, {true, false, two}, {true, false, "192.0.2.1 at 6443"},
	} {
		p.down[address] = step.down
		if step.back {
			if err := reconcilerOf(client).ReconcileEndpoints("kubernetes", net.ParseIP("192.0.2.2"), httpsPort(6443), true); err != nil {
				t.Fatal(err)
			}
		}
		d.look(t.Context())
		if got := endpoints(t, client); got != step.want {
			t.Errorf("step %d: %s, want %s", i, got, step.want)
		}
	}
}

// A removal that fails is tried again at the next look; one that was cut off by the end of the process is left to the others.
func TestDropDeadFails(t *testing.T) {
	client := serviceAPI(subset(6443, "192.0.2.1", "192.0.2.2"))
	fail := true
	client.PrependReactor("update", "endpoints", func(clienttesting.Action) (bool, runtime.Object, error) {
		return fail, nil, errors.New("etcdserver: request timed out")
	})
	d, _ := dropper(t, client, "192.0.2.2:6443")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for range 2 * deadAfter {
		d.look(ended)
	}
	if got := writes(client); got != nil {
		t.Errorf("after the end it wrote %v", got)
	}
	clear(d.failures)
	for range deadAfter {
		d.look(t.Context())
	}
	fail = false
	if got := endpoints(t, client); got != "192.0.2.1,192.0.2.2 at 6443" {
		t.Errorf("got %s", got)
	}
	d.look(t.Context())
	if got := endpoints(t, client); got != "192.0.2.1 at 6443" {
		t.Errorf("got %s", got)
	}
}

// With real sockets: nobody listens at the address of the dead one, and one with another cluster's certificate is dead, too.
func TestDropDeadProbes(t *testing.T) {
	serve := func(address string) (*httptest.Server, string) {
		p, err := pki.Ensure(t.Context(), pki.Config{Dir: t.TempDir(), NodeName: "n1", NodeIPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		pair, err := tls.LoadX509KeyPair(p.CertFile(pki.APIServer), p.KeyFile(pki.APIServer))
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		s.Listener.Close()
		s.Listener, s.TLS = l, &tls.Config{Certificates: []tls.Certificate{pair}}
		s.Config.ErrorLog = log.New(t.Output(), "", 0)
		s.StartTLS()
		t.Cleanup(s.Close)
		return s, p.CertFile(pki.ServerCA)
	}
	good, ca := serve("127.0.0.2:0")
	port := netip.MustParseAddrPort(good.Listener.Addr().String()).Port()
	serve(fmt.Sprint("127.0.0.3:", port))
	client := serviceAPI(subset(int32(port), "127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"))
	d, _ := dropper(t, client)
	d.own, d.probe = "127.0.0.1", apilb.HTTPSProbe(func() (*x509.CertPool, error) { return cert.NewPool(ca) })
	for range deadAfter {
		d.look(t.Context())
	}
	if got, want := endpoints(t, client), fmt.Sprint("127.0.0.1,127.0.0.2 at ", port); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// A dead server leaves the list within a few seconds.
func TestDropDeadTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := serviceAPI(subset(1, "127.0.0.1", "127.0.0.4")) // nobody listens on port 1
		p := &plane{cfg: testConfig(t), client: client, log: slog.New(slog.NewTextHandler(t.Output(), nil))}
		p.cfg.AdvertiseAddress = netip.MustParseAddr("127.0.0.1")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); p.dropDead(ctx) }()
		start := time.Now()
		for endpoints(t, client) != "127.0.0.1 at 1" && time.Since(start) < time.Minute {
			time.Sleep(100 * time.Millisecond)
		}
		if took := time.Since(start); took > 7*time.Second || took < 5*time.Second {
			t.Errorf("it took %v", took)
		}
		cancel()
		<-done
	})
}
