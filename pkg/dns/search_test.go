// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"

	miekg "github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// getaddrinfo asks what the C library asks for a name in a pod of the namespace default, with ndots 5: both types at once, with each
// domain of the search list behind the name, until there is an answer with records.
func (h *harness) getaddrinfo(name string) ([]miekg.RR, error) {
	names := []string{name + ".default.svc.cluster.local", name + ".svc.cluster.local", name + ".cluster.local"}
	if strings.Count(name, ".") < 5 {
		names = append(names, name)
	} else {
		names = append([]string{name}, names...)
	}
	for _, n := range names {
		var both [2]*miekg.Msg
		var asking errgroup.Group
		for i, t := range []uint16{miekg.TypeA, miekg.TypeAAAA} {
			asking.Go(func() (err error) {
				both[i], err = h.query("udp", n, t)
				return err
			})
		}
		if err := asking.Wait(); err != nil {
			return nil, fmt.Errorf("%s: %w", n, err)
		}
		for _, m := range both {
			if m.Rcode != miekg.RcodeSuccess && m.Rcode != miekg.RcodeNameError {
				return nil, fmt.Errorf("%s: %s", n, miekg.RcodeToString[m.Rcode])
			}
		}
		if all := append(both[0].Answer, both[1].Answer...); len(all) > 0 {
			return all, nil
		}
	}
	return nil, nil
}

// TestSearchList: the names that a pod's search list makes of an outside name stay here, and the upstream resolver is asked for the name
// itself once by type, whether it exists or not.
func TestSearchList(t *testing.T) {
	h := start(t, nil)
	api := newAPI(t, h)
	api.add("/api/v1/services", corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "default"},
		Spec: corev1.ServiceSpec{ClusterIP: "10.43.0.7", ClusterIPs: []string{"10.43.0.7"}, Ports: []corev1.ServicePort{{Port: 80}}}})
	upstream := &countingUpstream{asked: map[string]int{}}
	h.upstreams.Store(netip.MustParseAddr("192.0.2.1"), upstream.start(t))
	h.writeResolv("nameserver 192.0.2.1\n")
	h.run()
	eventually(t, "names of the cluster", h.Ready)

	for range 5 {
		for name, want := range map[string]int{"v4.example": 1, "both.www.example": 2, "v6.example": 1, "missing.example": 0, "a.b.c.d.e.missing.example": 0} {
			got, err := h.getaddrinfo(name)
			if err != nil || len(got) != want {
				t.Errorf("%s: %v, %v; want %d records", name, got, err, want)
			}
		}
		for _, name := range []string{"web", "web.default", "web.default.svc.cluster.local"} {
			if got, err := h.getaddrinfo(name); err != nil || len(got) != 1 {
				t.Errorf("%s: %v, %v", name, got, err)
			}
		}
	}
	upstream.mu.Lock()
	defer upstream.mu.Unlock()
	if len(upstream.asked) != 10 { // five names, two types
		t.Errorf("the upstream resolver was asked for %v", upstream.asked)
	}
	for question, n := range upstream.asked {
		if n != 1 || !strings.Contains(question, ".example. ") {
			t.Errorf("the upstream resolver was asked %d times for %s", n, question)
		}
	}
}

// TestClusterNamesOutliveAPI: what is known goes on being answered while the API is away.
func TestClusterNamesOutliveAPI(t *testing.T) {
	h := start(t, nil)
	api := newAPI(t, h)
	api.add("/api/v1/services",
		corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "default"},
			Spec: corev1.ServiceSpec{ClusterIP: "10.43.0.7", ClusterIPs: []string{"10.43.0.7"}, Ports: []corev1.ServicePort{{Port: 80}}}},
		corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "pods", Namespace: "default"},
			Spec: corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone, ClusterIPs: []string{corev1.ClusterIPNone}, Ports: []corev1.ServicePort{{Port: 80}}}})
	api.add("/apis/discovery.k8s.io/v1/endpointslices", discovery.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: "pods-1", Namespace: "default", Labels: map[string]string{discovery.LabelServiceName: "pods"}},
		AddressType: discovery.AddressTypeIPv4, Endpoints: []discovery.Endpoint{{Addresses: []string{"10.42.0.9"}, Hostname: new("db")}},
		Ports: []discovery.EndpointPort{{Name: new(""), Port: new(int32(80)), Protocol: new(corev1.ProtocolTCP)}},
	})
	h.run()
	check := func() {
		t.Helper()
		must(t, h.answers("udp", "web.default.svc.cluster.local", "10.43.0.7"))
		must(t, h.answers("tcp", "pods.default.svc.cluster.local", "10.42.0.9"))
		must(t, h.answers("udp", "db.pods.default.svc.cluster.local", "10.42.0.9"))
		must(t, h.rcode("missing.default.svc.cluster.local", miekg.RcodeNameError))
	}
	eventually(t, "names of the cluster", h.Ready)
	check()
	api.refuse()
	eventually(t, "all watches that ended to be refused", func() error {
		if n := api.refusals(); n != 4 {
			return fmt.Errorf("%d so far", n)
		}
		return nil
	})
	check()
	must(t, h.Ready())
}

// countingUpstream is a resolver that knows names below "example" and counts who was asked for.
type countingUpstream struct {
	mu    sync.Mutex
	asked map[string]int // by name and type
}

func (u *countingUpstream) start(t *testing.T) netip.AddrPort {
	return serveUpstream(t, func(w miekg.ResponseWriter, r *miekg.Msg) {
		q := r.Question[0]
		u.mu.Lock()
		u.asked[q.Name+" "+miekg.TypeToString[q.Qtype]]++
		u.mu.Unlock()
		m := new(miekg.Msg).SetReply(r)
		a, aaaa := q.Name+" 300 IN A 198.51.100.1", q.Name+" 300 IN AAAA 2001:db8::1"
		records := map[string]string{"v4.example. A": a, "both.www.example. A": a, "both.www.example. AAAA": aaaa, "v6.example. AAAA": aaaa}
		if text, ok := records[q.Name+" "+miekg.TypeToString[q.Qtype]]; ok {
			m.Answer = append(m.Answer, parseRR(t, text))
		} else {
			m.Ns = append(m.Ns, parseRR(t, "example. 300 IN SOA ns.example. admin.example. 1 7200 3600 1209600 300"))
			if strings.Contains(q.Name, "missing") {
				m.Rcode = miekg.RcodeNameError
			}
		}
		if err := w.WriteMsg(m); err != nil {
			t.Errorf("upstream: %v", err)
		}
	})
}

func parseRR(t *testing.T, text string) miekg.RR {
	r, err := miekg.NewRR(text)
	if err != nil {
		t.Error(err)
	}
	return r
}

// api is as much of the Kubernetes API as the cluster DNS uses: lists, and watches in which nothing happens.
type api struct {
	mu      sync.Mutex
	items   map[string][]any // by path
	refuses bool
	refused map[string]bool // by path
	server  *httptest.Server
	over    chan struct{} // closed when the API goes away
}

// newAPI starts the API and tells the server of the harness where it is.
func newAPI(t *testing.T, h *harness) *api {
	a := &api{items: map[string][]any{}, refused: map[string]bool{}, over: make(chan struct{})}
	a.add("/api/v1/namespaces", corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}})
	a.server = httptest.NewServer(a)
	t.Cleanup(func() {
		a.refuse()
		a.server.Close()
	})
	c := clientcmdapi.NewConfig()
	c.Clusters["test"] = &clientcmdapi.Cluster{Server: a.server.URL}
	c.Contexts["test"] = &clientcmdapi.Context{Cluster: "test"}
	c.CurrentContext = "test"
	must(t, clientcmd.WriteToFile(*c, h.cfg.Kubeconfig))
	return a
}

func (a *api) add(path string, objects ...any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.items[path] = append(a.items[path], objects...)
}

// refuse ends all watches, and refuses what comes from now on.
func (a *api) refuse() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.refuses {
		a.refuses = true
		close(a.over)
	}
}

// refusals is how many lists were asked for in vain.
func (a *api) refusals() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.refused)
}

// ServeHTTP answers lists, and watches for what comes after a list; clients then do without watches that begin with everything.
func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	items, refuses := append([]any{}, a.items[r.URL.Path]...), a.refuses
	if refuses {
		a.refused[r.URL.Path] = true
	}
	a.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	switch q := r.URL.Query(); {
	case refuses:
		w.WriteHeader(http.StatusServiceUnavailable)
	case q.Get("sendInitialEvents") == "true":
		w.WriteHeader(http.StatusUnprocessableEntity)
		fmt.Fprintln(w, `{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid", "code": 422}`)
	case q.Get("watch") != "":
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		select {
		case <-a.over:
		case <-r.Context().Done():
		}
	default:
		list := map[string]any{"metadata": map[string]string{"resourceVersion": "7"}, "items": items}
		list["kind"], list["apiVersion"] = kindOf(r.URL.Path)
		_ = json.NewEncoder(w).Encode(list) // who asked is gone if this fails
	}
}

// kindOf is the kind of the list at a path.
func kindOf(path string) (kind, version string) {
	switch {
	case strings.HasSuffix(path, "/services"):
		return "ServiceList", "v1"
	case strings.HasSuffix(path, "/namespaces"):
		return "NamespaceList", "v1"
	case strings.HasSuffix(path, "/configmaps"):
		return "ConfigMapList", "v1"
	}
	return "EndpointSliceList", "discovery.k8s.io/v1"
}
