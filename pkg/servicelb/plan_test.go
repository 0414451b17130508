// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/kedge-io/kedge/pkg/config"
)

// service makes a Service of type LoadBalancer in namespace ns. Later ones are younger.
func service(name string, age int, change ...func(*corev1.Service)) *corev1.Service {
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name), CreationTimestamp: metav1.NewTime(time.Unix(int64(age), 0))},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports: []corev1.ServicePort{{Protocol: corev1.ProtocolTCP, Port: 80}}},
	}
	for _, c := range change {
		c(svc)
	}
	return svc
}

func ports(list ...int32) func(*corev1.Service) {
	return func(svc *corev1.Service) {
		svc.Spec.Ports = nil
		for _, p := range list {
			svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Protocol: corev1.ProtocolTCP, Port: p})
		}
	}
}

func families(list ...corev1.IPFamily) func(*corev1.Service) {
	return func(svc *corev1.Service) { svc.Spec.IPFamilies = list }
}

func policyLocal(svc *corev1.Service) {
	svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
}

func asking(addresses string) func(*corev1.Service) {
	return func(svc *corev1.Service) { svc.Annotations = map[string]string{AnnotationAddresses: addresses} }
}

func having(mode corev1.LoadBalancerIPMode, addresses ...string) func(*corev1.Service) {
	return func(svc *corev1.Service) {
		for _, a := range addresses {
			svc.Status.LoadBalancer.Ingress = append(svc.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a, IPMode: &mode})
		}
	}
}

func nodeWith(name string, ready bool, labels map[string]string, addresses ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}}
	for _, a := range addresses {
		typ := corev1.NodeInternalIP
		if external, ok := strings.CutPrefix(a, "ext:"); ok {
			a, typ = external, corev1.NodeExternalIP
		}
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: typ, Address: a})
	}
	return n
}

func pool(t testing.TB, texts ...string) Pool {
	t.Helper()
	var p Pool
	for _, text := range texts {
		var r config.AddressRange
		must(t, r.UnmarshalText([]byte(text)))
		p = append(p, r)
	}
	return p
}

// outcome writes a verdict as text: its addresses, or the reason and message.
func outcome(v verdict) string {
	if v.reason != "" {
		return v.reason + ": " + v.message
	}
	return strings.Join(texts(v.ingress), " ")
}

func TestNodeAddresses(t *testing.T) {
	serve := map[string]string{LabelNode: "true"}
	nodes := []*corev1.Node{
		nodeWith("b", true, nil, "192.0.2.2", "fd00::2"),
		nodeWith("a", true, nil, "192.0.2.1", "ext:198.51.100.1", "fd00::1"),
		nodeWith("down", false, nil, "192.0.2.3"),
		nodeWith("excluded", true, map[string]string{corev1.LabelNodeExcludeBalancers: ""}, "192.0.2.4"),
	}
	tests := map[string]struct {
		svc   *corev1.Service
		nodes []*corev1.Node
		want  string
	}{
		"external addresses first":      {service("s", 1), nodes, "198.51.100.1 192.0.2.2"},
		"in the order of the families":  {service("s", 1, families(corev1.IPv6Protocol, corev1.IPv4Protocol)), nodes, "fd00::1 fd00::2 198.51.100.1 192.0.2.2"},
		"local: where endpoints are":    {service("s", 1, policyLocal), nodes, "192.0.2.2"},
		"labelled nodes only":           {service("s", 1), append(slices.Clone(nodes), nodeWith("l", true, serve, "192.0.2.5")), "192.0.2.5"},
		"a labelled node that is down":  {service("s", 1), append(slices.Clone(nodes), nodeWith("l", false, serve, "192.0.2.5")), ""},
		"another's class":               {service("s", 1, func(s *corev1.Service) { s.Spec.LoadBalancerClass = new("x/y") }), nodes, "-"},
		"our class":                     {service("s", 1, func(s *corev1.Service) { s.Spec.LoadBalancerClass = new(Class) }), nodes, "198.51.100.1 192.0.2.2"},
		"left to somebody else":         {service("s", 1, func(s *corev1.Service) { s.Annotations = map[string]string{AnnotationIgnore: "false"} }), nodes, "-"},
		"no LoadBalancer":               {service("s", 1, func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeNodePort }), nodes, "-"},
		"SSH":                           {service("s", 1, ports(80, 22)), nodes, "PortConflict: port 22/TCP of the nodes is taken by SSH; this Service gets addresses when the port becomes free"},
		"the API's port":                {service("s", 1, ports(6443)), nodes, "PortConflict: port 6443/TCP of the nodes is taken by the API server; this Service gets addresses when the port becomes free"},
		"a NodePort of its own is fine": {service("s", 1, func(s *corev1.Service) { s.Spec.Ports[0].Port, s.Spec.Ports[0].NodePort = 30080, 30080 }), nodes, "198.51.100.1 192.0.2.2"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			w := world{services: []*corev1.Service{test.svc}, nodes: test.nodes, reserved: reservedPorts(6443, 6444),
				serves: func(_ *corev1.Service, node string) bool { return node == "b" }}
			got := "-"
			if v, ok := w.plan()[nameOf(test.svc)]; ok {
				got = outcome(v)
				if slices.ContainsFunc(v.ingress, func(in corev1.LoadBalancerIngress) bool { return *in.IPMode != corev1.LoadBalancerIPModeProxy }) {
					t.Error("an address of a node without ipMode Proxy")
				}
			}
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestConflicts(t *testing.T) {
	nodes := []*corev1.Node{nodeWith("n", true, nil, "192.0.2.1", "fd00::1")}
	taken := func(port, who string) string {
		return "PortConflict: port " + port + " of the nodes is taken by " + who + "; this Service gets addresses when the port becomes free"
	}
	udp := func(s *corev1.Service) { s.Spec.Ports[0].Protocol = corev1.ProtocolUDP }
	nodePort := service("np", 9, func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeNodePort; s.Spec.Ports[0].NodePort = 30080 })
	w := world{nodes: nodes, services: []*corev1.Service{
		service("young", 3, ports(81, 80)), service("b", 1), service("a", 1, ports(443)), service("same-age", 1, ports(443)), service("udp", 4, udp),
		service("v6", 5, families(corev1.IPv6Protocol)), service("np-hit", 2, ports(30080)), nodePort, service("gets-81", 6, ports(81)),
	}}
	verdicts := w.plan()
	for name, want := range map[string]string{
		"b": "192.0.2.1", "a": "192.0.2.1", "udp": "192.0.2.1", "v6": "fd00::1", "gets-81": "192.0.2.1",
		"young":    taken("80/TCP", "Service ns/b, which is older"),
		"same-age": taken("443/TCP", "Service ns/a, which is older"),
		"np-hit":   taken("30080/TCP", "the NodePort of Service ns/np"),
	} {
		if got := outcome(verdicts[types.NamespacedName{Namespace: "ns", Name: name}]); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

func TestPool(t *testing.T) {
	dual := families(corev1.IPv4Protocol, corev1.IPv6Protocol)
	policy := func(p corev1.IPFamilyPolicy) func(*corev1.Service) {
		return func(s *corev1.Service) { s.Spec.IPFamilyPolicy = &p }
	}
	vip := corev1.LoadBalancerIPModeVIP
	tests := map[string]struct {
		pool     []string
		services []*corev1.Service
		want     map[string]string
	}{
		"in the order of age, until none is left": {[]string{"192.0.2.10-192.0.2.11"}, []*corev1.Service{service("c", 3), service("a", 1), service("b", 2)},
			map[string]string{"a": "192.0.2.10", "b": "192.0.2.11", "c": "NoAddress: no free IPv4 address in the pool (192.0.2.10-192.0.2.11)"}},
		"what they have they keep": {[]string{"192.0.2.10-192.0.2.12"}, []*corev1.Service{service("old", 1), service("young", 2, having(vip, "192.0.2.10"))},
			map[string]string{"old": "192.0.2.11", "young": "192.0.2.10"}},
		"not what another one has": {[]string{"192.0.2.10-192.0.2.12"}, []*corev1.Service{service("old", 1, having(vip, "192.0.2.10")), service("young", 2, having(vip, "192.0.2.10"))},
			map[string]string{"old": "192.0.2.10", "young": "192.0.2.11"}},
		"not what is in the pool no more": {[]string{"192.0.2.12"}, []*corev1.Service{service("s", 1, having(vip, "192.0.2.10"))}, map[string]string{"s": "192.0.2.12"}},
		"nor nodes' addresses":            {[]string{"192.0.2.12"}, []*corev1.Service{service("s", 1, having(corev1.LoadBalancerIPModeProxy, "192.0.2.12", "192.0.2.3"))}, map[string]string{"s": "192.0.2.12"}},
		"who asks comes before who does not": {[]string{"192.0.2.10-192.0.2.11"}, []*corev1.Service{service("old", 1), service("asks", 2, asking("192.0.2.10"))},
			map[string]string{"old": "192.0.2.11", "asks": "192.0.2.10"}},
		"asked for what another has": {[]string{"192.0.2.10-192.0.2.11"}, []*corev1.Service{service("old", 1, having(vip, "192.0.2.10")), service("asks", 2, asking("192.0.2.10"))},
			map[string]string{"asks": "AddressNotUsable: 192.0.2.10 belongs to Service ns/old"}},
		"asked for another than it has": {[]string{"192.0.2.10-192.0.2.11"}, []*corev1.Service{service("s", 1, having(vip, "192.0.2.10"), asking("192.0.2.11"))}, map[string]string{"s": "192.0.2.11"}},
		"asked in spec":                 {[]string{"192.0.2.10/31"}, []*corev1.Service{service("s", 1, func(s *corev1.Service) { s.Spec.LoadBalancerIP = "192.0.2.11" })}, map[string]string{"s": "192.0.2.11"}},
		"asked for an address elsewhere": {[]string{"192.0.2.10"}, []*corev1.Service{service("s", 1, asking("192.0.2.99"))},
			map[string]string{"s": "AddressNotUsable: 192.0.2.99 is not in the pool (192.0.2.10)"}},
		"asked for nonsense":   {[]string{"192.0.2.10"}, []*corev1.Service{service("s", 1, asking("x"))}, map[string]string{"s": `AddressNotUsable: "x" is no address`}},
		"two families":         {[]string{"192.0.2.10", "fd00::10/124"}, []*corev1.Service{service("s", 1, dual)}, map[string]string{"s": "192.0.2.10 fd00::10"}},
		"IPv6 first":           {[]string{"192.0.2.10", "fd00::10/124"}, []*corev1.Service{service("s", 1, families(corev1.IPv6Protocol, corev1.IPv4Protocol), asking("192.0.2.10"))}, map[string]string{"s": "fd00::10 192.0.2.10"}},
		"content with one":     {[]string{"192.0.2.10"}, []*corev1.Service{service("s", 1, dual, policy(corev1.IPFamilyPolicyPreferDualStack))}, map[string]string{"s": "192.0.2.10"}},
		"not content with one": {[]string{"192.0.2.10"}, []*corev1.Service{service("s", 1, dual, policy(corev1.IPFamilyPolicyRequireDualStack))}, map[string]string{"s": "NoAddress: no free IPv6 address in the pool (192.0.2.10)"}},
		"no port conflicts":    {[]string{"192.0.2.10-192.0.2.11"}, []*corev1.Service{service("a", 1, ports(6443)), service("b", 2, ports(6443))}, map[string]string{"a": "192.0.2.10", "b": "192.0.2.11"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			verdicts := world{services: test.services, pool: pool(t, test.pool...), reserved: reservedPorts(6443, 6444)}.plan()
			for name, want := range test.want {
				if got := outcome(verdicts[types.NamespacedName{Namespace: "ns", Name: name}]); got != want {
					t.Errorf("%s: got %q, want %q", name, got, want)
				}
			}
		})
	}
}

func TestGroups(t *testing.T) {
	vip := corev1.LoadBalancerIPModeVIP
	own := nodeWith("n", true, nil, "192.0.2.1")
	services := []*corev1.Service{
		service("a", 1, having(vip, "192.0.2.10")), service("b", 1, having(vip, "192.0.2.11")),
		service("local", 1, policyLocal, having(vip, "192.0.2.12")), service("proxy", 1, having(corev1.LoadBalancerIPModeProxy, "192.0.2.13")),
	}
	endpoints := sliceOn("n", "10.42.1.2")
	got := groupsOn(own, []*corev1.Node{own}, services, endpoints)
	if len(got) != 2 || !slices.Equal(got[leaseName], []netip.Addr{addr("192.0.2.10"), addr("192.0.2.11")}) || !slices.Equal(got[leaseName+"-local"], []netip.Addr{addr("192.0.2.12")}) {
		t.Errorf("groups: %v", got)
	}
	if got := groupsOn(own, []*corev1.Node{own}, services, sliceOn("m", "10.42.2.2")); len(got) != 1 {
		t.Errorf("groups without a local endpoint: %v", got)
	}
	chosen := nodeWith("m", true, map[string]string{LabelNode: "true"})
	if got := groupsOn(own, []*corev1.Node{own, chosen}, services, endpoints); len(got) != 0 {
		t.Errorf("groups of a node that was not chosen: %v", got)
	}
}

func TestAnyFloating(t *testing.T) {
	vip := corev1.LoadBalancerIPModeVIP
	foreign := service("c", 1, having(vip, "192.0.2.10"))
	foreign.Spec.LoadBalancerClass = new("example.org/other")
	proxied := service("a", 1, having(corev1.LoadBalancerIPModeProxy, "192.0.2.1"))
	if anyFloating([]*corev1.Service{proxied, foreign}) {
		t.Error("nothing floats here")
	}
	if !anyFloating([]*corev1.Service{proxied, service("b", 1, having(vip, "192.0.2.10"))}) {
		t.Error("an address of the pool is not seen")
	}
}
