// SPDX-License-Identifier: Apache-2.0

package oracle_test

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/kedge-io/kedge/pkg/netpolicy/oracle"
)

const (
	tcp, udp, sctp = corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP

	dnsAddress = "10.43.0.10"
	outside    = "198.51.100.7"
)

// fixture is the layout with addresses: x/a is 10.42.0.2, x/b 10.42.1.3, x/c 10.42.0.4, y/a 10.42.1.5, y/b 10.42.0.6 …; and a pod
// on the node's network, one that has finished and whose address x/b has now.
func fixture(t *testing.T) *oracle.World {
	t.Helper()
	w := oracle.Layout("n1", "n2")
	address := func(p *corev1.Pod, ips ...string) {
		p.Status = corev1.PodStatus{Phase: corev1.PodRunning}
		for _, ip := range ips {
			p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
		}
	}
	for i := range w.Pods {
		net := "0"
		if w.Pods[i].Spec.NodeName == "n2" {
			net = "1"
		}
		host := strconv.Itoa(2 + i)
		address(&w.Pods[i], "10.42."+net+"."+host, "fd00:42:0:"+net+"::"+host)
	}
	host := w.Pods[0].DeepCopy()
	host.Name, host.Spec.HostNetwork = "host", true
	address(host, "192.0.2.1", "2001:db8::1")
	done := w.Pods[0].DeepCopy()
	done.Name = "done"
	address(done, "10.42.1.3")
	done.Status.Phase = corev1.PodSucceeded
	w.Pods = append(w.Pods, *host, *done)
	w.ClusterDNS = []netip.Addr{netip.MustParseAddr(dnsAddress)}
	return w
}

// end reads "x/a", "x/a v6", "node n1", or an address.
func end(t *testing.T, w *oracle.World, text string) oracle.Endpoint {
	t.Helper()
	if name, ok := strings.CutPrefix(text, "node "); ok {
		return oracle.Endpoint{Node: name, Addr: netip.MustParseAddr(map[string]string{"n1": "192.0.2.1", "n2": "192.0.2.2"}[name])}
	}
	if a, err := netip.ParseAddr(text); err == nil {
		return w.At(a)
	}
	name, v6 := strings.CutSuffix(text, " v6")
	family := netip.IPv4Unspecified()
	if v6 {
		family = netip.IPv6Unspecified()
	}
	ns, name, _ := strings.Cut(name, "/")
	e := w.PodAt(ns, name, family)
	if e.Pod == nil {
		t.Fatalf("no pod %s", text)
	}
	return e
}

type question struct {
	from, to string
	protocol corev1.Protocol
	port     int32
	allowed  bool
}

func yes(from, to string, protocol corev1.Protocol, port int32) question {
	return question{from, to, protocol, port, true}
}

func no(from, to string, protocol corev1.Protocol, port int32) question {
	return question{from, to, protocol, port, false}
}

func ask(t *testing.T, w *oracle.World, questions ...question) {
	t.Helper()
	for _, q := range questions {
		if got, why := w.Allowed(end(t, w, q.from), end(t, w, q.to), q.protocol, q.port); got != q.allowed {
			t.Errorf("%s to %s %s/%d: %t (%s); want %t", q.from, q.to, q.protocol, q.port, got, why, q.allowed)
		}
	}
}

// TestAllowed has policies p0, p1 … in namespace x unless they say otherwise, and what they mean.
func TestAllowed(t *testing.T) {
	for _, test := range []struct {
		name     string
		policies []string
		ask      []question
	}{
		{"nothing selects", nil, []question{yes("x/a", "y/a", tcp, 1), yes(outside, "y/a", udp, 1), yes("x/a", outside, sctp, 1), yes("x/a", dnsAddress, udp, 53)}},
		{"default deny of ingress", []string{`{spec: {podSelector: {}}}`}, []question{
			no("y/a", "x/a", tcp, 7080), no("x/b", "x/a", udp, 7080), no(outside, "x/a", sctp, 1), no("node n2", "x/a", tcp, 7080),
			yes("x/a", "y/a", tcp, 7080), yes("x/a", dnsAddress, udp, 53), yes("y/a", "z/a", tcp, 1),
		}},
		{"always: the pod itself, its node", []string{`{spec: {podSelector: {}, policyTypes: [Ingress, Egress]}}`}, []question{
			yes("x/a", "x/a", tcp, 7080), yes("node n1", "x/a", tcp, 7080), yes("x/host", "x/a", udp, 1), no("x/a", "node n1", tcp, 1), no("node n2", "x/a", tcp, 7080),
		}},
		{"isolation is per direction", []string{`{spec: {podSelector: {}, policyTypes: [Egress]}}`}, []question{
			no("x/a", "y/a", tcp, 7080), no("x/a", "x/b", tcp, 7080), no("x/a", outside, tcp, 7080), no("x/a", dnsAddress, udp, 53), no("x/a", "node n2", tcp, 22),
			yes("y/a", "x/a", tcp, 7080), yes(outside, "x/a", tcp, 1),
		}},
		{"policyTypes default to both when there is egress", []string{`{spec: {podSelector: {}, egress: [{}]}}`}, []question{
			yes("x/a", "y/a", tcp, 1), no("y/a", "x/a", tcp, 1),
		}},
		{"policyTypes default to ingress without egress", []string{`{spec: {podSelector: {}, ingress: [{}], egress: []}}`}, []question{
			yes("x/a", "y/a", tcp, 1), yes("y/a", "x/a", tcp, 1),
		}},
		{"rules of a direction that policyTypes leave out do nothing", []string{`{spec: {podSelector: {}, policyTypes: [Ingress], egress: [{ports: [{port: 1}]}]}}`}, []question{
			yes("x/a", "y/a", tcp, 2), no("y/a", "x/a", tcp, 2),
		}},
		{"the subject's labels", []string{
			`{spec: {podSelector: {matchLabels: {pod: a}}}}`, `{metadata: {namespace: "y"}, spec: {podSelector: {matchExpressions: [{key: pod, operator: NotIn, values: [a]}]}}}`,
		}, []question{no("z/a", "x/a", tcp, 1), yes("z/a", "x/b", tcp, 1), yes("z/a", "y/a", tcp, 1), no("z/a", "y/b", tcp, 1)}},
		{"expressions", []string{`{spec: {podSelector: {}, ingress: [
			{ports: [{port: 1}], from: [{podSelector: {matchExpressions: [{key: extra, operator: Exists}]}, namespaceSelector: {}}]},
			{ports: [{port: 2}], from: [{podSelector: {matchExpressions: [{key: extra, operator: DoesNotExist}]}, namespaceSelector: {}}]},
			{ports: [{port: 3}], from: [{podSelector: {matchExpressions: [{key: extra, operator: In, values: [""]}]}, namespaceSelector: {}}]},
			{ports: [{port: 4}], from: [{podSelector: {matchExpressions: [{key: extra, operator: NotIn, values: [""]}]}, namespaceSelector: {}}]},
			{ports: [{port: 5}], from: [{podSelector: {matchLabels: {pod: c}, matchExpressions: [{key: extra, operator: Exists}]}, namespaceSelector: {}}]}]}}`,
		}, []question{
			// z/a has no label extra, z/b has "yes", z/c an empty one.
			no("z/a", "x/b", tcp, 1), yes("z/b", "x/b", tcp, 1), yes("z/c", "x/b", tcp, 1),
			yes("z/a", "x/b", tcp, 2), no("z/b", "x/b", tcp, 2), no("z/c", "x/b", tcp, 2),
			no("z/a", "x/b", tcp, 3), no("z/b", "x/b", tcp, 3), yes("z/c", "x/b", tcp, 3),
			yes("z/a", "x/b", tcp, 4), yes("z/b", "x/b", tcp, 4), no("z/c", "x/b", tcp, 4),
			no("z/a", "x/b", tcp, 5), no("z/b", "x/b", tcp, 5), yes("z/c", "x/b", tcp, 5),
		}},
		{"podSelector alone stays in the namespace", []string{`{spec: {podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]}}`}, []question{
			yes("x/b", "x/a", tcp, 1), no("y/b", "x/a", tcp, 1), no("x/c", "x/a", tcp, 1),
		}},
		{"an empty podSelector is all pods of the namespace and nothing else", []string{`{spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}}`}, []question{
			yes("x/b", "x/a", tcp, 1), no("y/b", "x/a", tcp, 1), no(outside, "x/a", tcp, 1), no("node n2", "x/a", tcp, 1),
		}},
		{"namespaceSelector", []string{`{spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: "y"}}}]}]}}`}, []question{
			yes("y/a", "x/a", tcp, 1), yes("y/b", "x/a", tcp, 1), no("x/b", "x/a", tcp, 1), no("z/a", "x/a", tcp, 1),
		}},
		{"an empty namespaceSelector is all pods and nothing else", []string{`{spec: {podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{from: [{namespaceSelector: {}}]}],
			egress: [{to: [{namespaceSelector: {}}]}]}}`}, []question{
			yes("z/a", "x/a", tcp, 1), no(outside, "x/a", tcp, 1), no("node n2", "x/a", tcp, 1), yes("x/a", dnsAddress, udp, 53), no("x/a", "node n2", tcp, 1), no("x/a", outside, tcp, 1),
		}},
		{"both selectors in a peer: and", []string{`{spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: "y"}}, podSelector: {matchLabels: {pod: b}}}]}]}}`}, []question{
			yes("y/b", "x/a", tcp, 1), no("y/a", "x/a", tcp, 1), no("x/b", "x/a", tcp, 1),
		}},
		{"two peers: or", []string{`{spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: "y"}}}, {podSelector: {matchLabels: {pod: b}}}]}]}}`}, []question{
			yes("y/a", "x/a", tcp, 1), yes("x/b", "x/a", tcp, 1), no("z/b", "x/a", tcp, 1), no("x/c", "x/a", tcp, 1),
		}},
		{"empty lists are everything", []string{`{spec: {podSelector: {}, ingress: [{from: [], ports: []}]}}`, `{spec: {podSelector: {}, policyTypes: [Egress], egress: [{to: [], ports: [{port: 1}]}]}}`},
			[]question{yes(outside, "x/a", sctp, 9), yes("x/a", outside, tcp, 1), no("x/a", outside, udp, 1)}},
		{"ipBlock", []string{`{spec: {podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{from: [{ipBlock: {cidr: 198.51.100.0/24}}]}],
			egress: [{to: [{ipBlock: {cidr: 10.42.0.0/16, except: [10.42.0.0/24, 10.42.1.5/32]}}]}]}}`}, []question{
			yes(outside, "x/a", tcp, 1), no("198.51.101.1", "x/a", tcp, 1), no("y/b", "x/a", tcp, 1),
			yes("x/b", "y/c", tcp, 1), no("x/b", "y/a", tcp, 1), no("x/b", "y/b", tcp, 1), no("x/b", outside, tcp, 1), no("x/b", dnsAddress, udp, 53),
		}},
		{"what one peer excepts another may allow", []string{`{spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.42.0.0/16]}}, {podSelector: {}}]}]}}`}, []question{
			yes("x/b", "x/a", tcp, 1), no("y/b", "x/a", tcp, 1), yes("192.0.2.2", "x/a", tcp, 1),
		}},
		{"ipBlock is of one family", []string{`{spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: "::/0", except: ["fd00:42:0:1::/64"]}}]}]}}`}, []question{
			yes("y/b v6", "x/a v6", tcp, 1), no("y/a v6", "x/a v6", tcp, 1), no("y/b", "x/a", tcp, 1),
		}},
		{"ports", []string{`{spec: {podSelector: {}, ingress: [{ports: [{port: 5}, {protocol: UDP, port: 6}, {protocol: SCTP}, {port: 10, endPort: 12}]}]}}`}, []question{
			yes("y/a", "x/a", tcp, 5), no("y/a", "x/a", udp, 5), yes("y/a", "x/a", udp, 6), no("y/a", "x/a", tcp, 6),
			yes("y/a", "x/a", sctp, 6), no("y/a", "x/a", tcp, 9), yes("y/a", "x/a", tcp, 10), yes("y/a", "x/a", tcp, 11), yes("y/a", "x/a", tcp, 12), no("y/a", "x/a", tcp, 13),
		}},
		{"a protocol only", []string{`{spec: {podSelector: {}, ingress: [{ports: [{protocol: UDP}]}]}}`}, []question{yes("y/a", "x/a", udp, 9), no("y/a", "x/a", tcp, 9)}},
		{"an empty port is TCP", []string{`{spec: {podSelector: {}, ingress: [{ports: [{}]}]}}`}, []question{yes("y/a", "x/a", tcp, 9), no("y/a", "x/a", udp, 9), no("y/a", "x/a", sctp, 9)}},
		{"names of ports, by the pod that is connected to", []string{
			`{spec: {podSelector: {}, ingress: [{ports: [{port: web}]}]}}`,
			`{metadata: {namespace: "y"}, spec: {podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: data}, {port: data, protocol: UDP}]}]}}`,
		}, []question{
			yes("z/a", "x/a", tcp, 7080), no("z/a", "x/a", tcp, 7081), no("z/a", "x/b", tcp, 7080), yes("z/a", "x/b", tcp, 7081), no("z/a", "x/a", udp, 7080),
			yes("y/a", "z/a", udp, 7080), no("y/a", "z/a", udp, 7081), no("y/a", "z/b", udp, 7080), yes("y/a", "z/b", udp, 7081), no("y/a", "z/a", tcp, 7080),
			yes("y/a", "z/c", tcp, 7081), no("y/a", "z/c", udp, 7080), no("y/a", outside, tcp, 7080), no("y/a", "node n1", udp, 7080),
		}},
		{"policies add up", []string{
			`{spec: {podSelector: {}}}`, `{spec: {podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{podSelector: {}}], ports: [{port: 1}]}]}}`,
			`{spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: "y"}}}], ports: [{port: 2}]}]}}`,
		}, []question{yes("x/b", "x/a", tcp, 1), no("x/b", "x/a", tcp, 2), yes("y/b", "x/a", tcp, 2), no("y/b", "x/a", tcp, 1), no("x/a", "x/b", tcp, 1), yes("y/b", "x/c", tcp, 2)}},
		{"both sides have to agree", []string{
			`{spec: {podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {ns: "y"}}}]}]}}`,
			`{metadata: {namespace: "y"}, spec: {podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: z}}}]}]}}`,
		}, []question{yes("x/a", "y/b", tcp, 1), no("x/a", "y/a", tcp, 1), yes("z/a", "y/a", tcp, 1), no("x/a", "z/a", tcp, 1)}},
		{"pods on the node's network are no pods", []string{
			`{spec: {podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {}}]}], egress: [{to: [{namespaceSelector: {}}]}]}}`,
		}, []question{yes("x/host", "y/a", tcp, 1), yes("y/a", "x/host", tcp, 1), no("x/host", "x/b", tcp, 1), yes("x/host", "x/a", tcp, 1), no("x/b", "x/host", tcp, 1)}},
		{"a finished pod gives its labels to nobody", []string{`{spec: {podSelector: {matchLabels: {pod: a}}}}`,
			`{metadata: {namespace: "y"}, spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {pod: a}}}]}]}}`,
		}, []question{yes("z/a", "10.42.1.3", tcp, 1), no("10.42.1.3", "y/a", tcp, 1), no("x/done", "y/a", tcp, 1)}},
		{"the cluster's DNS", []string{
			`{spec: {podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}},
				podSelector: {matchLabels: {k8s-app: kube-dns}}}], ports: [{port: 53, protocol: UDP}]}]}}`,
			`{spec: {podSelector: {matchLabels: {pod: b}}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}, podSelector: {matchLabels: {k8s-app: kube-dns}}}], ports: [{port: dns-tcp}]}]}}`,
			`{spec: {podSelector: {matchLabels: {pod: c}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {k8s-app: kube-dns}}}]}]}}`,
			`{metadata: {namespace: "y"}, spec: {podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 10.43.0.0/16}}]}]}}`,
			`{metadata: {namespace: kube-system}, spec: {podSelector: {}}}`,
		}, []question{
			yes("x/a", dnsAddress, udp, 53), no("x/a", dnsAddress, tcp, 53), no("x/b", dnsAddress, udp, 53), yes("x/b", dnsAddress, tcp, 53), no("x/c", dnsAddress, udp, 53),
			yes("y/a", dnsAddress, udp, 53), yes("z/a", dnsAddress, tcp, 53), yes("node n1", dnsAddress, udp, 53),
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := fixture(t)
			for i, text := range test.policies {
				p := networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "x"}}
				if err := yaml.UnmarshalStrict([]byte(text), &p); err != nil {
					t.Fatal(err)
				}
				p.Name = "p" + strconv.Itoa(i)
				w.Policies = append(w.Policies, p)
			}
			ask(t, w, test.ask...)
		})
	}
}

// TestReason names the policies that decide.
func TestReason(t *testing.T) {
	w := fixture(t)
	for _, name := range []string{"q", "p"} {
		w.Policies = append(w.Policies, networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: name}})
	}
	w.Policies = append(w.Policies, networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "y", Name: "open"},
		Spec:       networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{{}}},
	})
	for _, test := range []struct {
		from, to, text string
		policies       []string
	}{
		{"y/a", "x/a", "ingress is denied: x/p, x/q", []string{"x/p", "x/q"}},
		{"x/a", "y/a", "allowed: y/open", []string{"y/open"}},
		{"x/a", "z/a", "no policy applies", nil},
	} {
		if _, why := w.Allowed(end(t, w, test.from), end(t, w, test.to), tcp, 1); why.String() != test.text || !slices.Equal(why.Policies, test.policies) {
			t.Errorf("%s to %s: %q %v", test.from, test.to, why, why.Policies)
		}
	}
}
