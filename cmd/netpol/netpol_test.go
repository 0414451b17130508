// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kedge-io/kedge/pkg/netpolicy"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		"shop/db:5432":            "shop/db 5432/tcp",
		"shop/db:dns/udp":         "shop/db dns/udp",
		"shop/db:80/SCTP":         "shop/db 80/sctp",
		"10.0.0.1:80":             "10.0.0.1 80/tcp",
		"[fd00::1]:80/udp":        "fd00::1 80/udp",
		"[::ffff:10.0.0.1]:80":    "10.0.0.1 80/tcp",
		"shop/db":                 "",
		"fd00::1":                 "",
		"10.0.0.1:http":           "",
		"shop/db:0":               "",
		"shop/db:65536":           "",
		"shop/db:":                "",
		"shop/db:80/icmp":         "",
		"/db:80":                  "",
		"a/b/c:80":                "",
		"[fd00::1:80":             "",
		"db:80":                   "",
		"fe80::1%eth0:80":         "",
		"":                        "",
		"shop/db:80/tcp/and/more": "",
	} {
		d, err := parseTo(text)
		got := ""
		if err == nil {
			got = fmt.Sprintf("%s %s/%s", d.title(), d.port, d.protocol)
		}
		if got != want {
			t.Errorf("%q: %q (%v), want %q", text, got, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("shop/db:5432/udp")
	f.Add("[fd00::1]:80")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := parseTo(text)
		if err != nil {
			return
		}
		if d.isPod() == d.addr.IsValid() || d.protocol == "" || d.port == "" || d.number == 0 && !d.isPod() {
			t.Errorf("%q: %+v", text, d)
		}
	})
}

func TestTrace(t *testing.T) {
	pod := func(name, node string, addrs ...string) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{
			{Ports: []corev1.ContainerPort{{Name: "sql", ContainerPort: 5432, Protocol: corev1.ProtocolTCP}}},
		}}}
		for _, a := range addrs {
			p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: a})
		}
		return p
	}
	host := pod("host", "n1", "192.0.2.1")
	host.Spec.HostNetwork = true
	api := fake.NewClientset(pod("web", "n1", "10.42.0.2", "fd00::2"), pod("db", "n1", "10.42.0.3"), pod("far", "n2", "10.42.1.2"), pod("six", "n1", "fd00::4"), host, pod("new", "n1"))
	free := &netpolicy.Decision{Allowed: true}
	denied := &netpolicy.Decision{Isolated: true, Policies: []string{"shop/deny", "shop/other"}}
	allowed := &netpolicy.Decision{Isolated: true, Allowed: true, Policies: []string{"shop/allow"}}
	for _, test := range []struct {
		from, to string
		answer   netpolicy.Answer
		remote   *netpolicy.Decision
		want     []string // in the output, and the result last
	}{
		{"shop/web", "shop/db:sql", netpolicy.Answer{Egress: free, Ingress: allowed}, nil, []string{"port 5432/tcp", "egress  allowed: no policy applies", "ingress allowed by shop/allow", "allowed"}},
		{"shop/web", "shop/db:80/udp", netpolicy.Answer{Egress: free, Ingress: denied}, nil, []string{"port 80/udp", "none of the policies that apply allows it: shop/deny, shop/other", "denied"}},
		{"shop/web", "shop/far:80", netpolicy.Answer{Egress: free}, nil, []string{"unknown: node n2 decides this, run the command there", "unknown"}},
		{"shop/web", "shop/far:80", netpolicy.Answer{Egress: free}, denied, []string{"node n2", "denied"}},
		{"shop/web", "shop/far:80", netpolicy.Answer{Egress: free}, free, []string{"node n2", "allowed"}},
		{"shop/web", "shop/far:80", netpolicy.Answer{Egress: denied}, nil, []string{"denied"}},
		{"shop/web", "192.0.2.7:80", netpolicy.Answer{Egress: free}, nil, []string{"ingress allowed: 192.0.2.7 is no pod of node n1", "allowed"}},
		{"192.0.2.7", "shop/db:80", netpolicy.Answer{Ingress: denied}, nil, []string{"denied"}},
		{"shop/host", "shop/db:80", netpolicy.Answer{Ingress: free}, nil, []string{"egress  allowed: no policy applies to a pod with", "allowed"}},
		{"shop/web", "shop/six:80", netpolicy.Answer{Egress: free, Ingress: free}, nil, []string{"fd00::2", "fd00::4", "allowed"}},
		{"shop/db", "shop/six:80", netpolicy.Answer{}, nil, []string{"unknown"}},
		{"shop/web", "shop/new:80", netpolicy.Answer{}, nil, []string{"unknown"}},
		{"shop/web", "shop/none:80", netpolicy.Answer{}, nil, []string{"unknown"}},
		{"shop/web", "shop/db:http", netpolicy.Answer{}, nil, []string{"unknown"}},
		{"shop/web", "shop/db:80", netpolicy.Answer{Egress: free}, nil, []string{"node n1 has no rules for shop/db", "unknown"}},
	} {
		t.Run(test.from+" "+test.to, func(t *testing.T) {
			var out bytes.Buffer
			tr := tracer{out: &out, client: func() (kubernetes.Interface, error) { return api, nil },
				local: func(context.Context, netpolicy.Question) (netpolicy.Answer, error) {
					test.answer.Node = "n1"
					return test.answer, nil
				},
				remote: func(_ context.Context, node string, _ netpolicy.Question) (netpolicy.Answer, error) {
					if test.remote == nil {
						return netpolicy.Answer{}, errors.New("no answer")
					}
					return netpolicy.Answer{Node: node, Ingress: test.remote}, nil
				}}
			ok, err := tr.trace(t.Context(), test.from, test.to)
			result := map[bool]string{true: "allowed", false: "denied"}[ok]
			if err != nil {
				result = "unknown"
			}
			last := len(test.want) - 1
			if result != test.want[last] {
				t.Errorf("%s (%v), want %s\n%s", result, err, test.want[last], &out)
			}
			for _, want := range test.want[:last] {
				if !strings.Contains(out.String(), want) {
					t.Errorf("no %q in\n%s", want, &out)
				}
			}
		})
	}
	tr := tracer{out: &bytes.Buffer{}, local: func(context.Context, netpolicy.Question) (netpolicy.Answer, error) {
		return netpolicy.Answer{}, errors.New("no socket")
	}}
	if _, err := tr.trace(t.Context(), "10.0.0.1", "10.0.0.2:80"); !errors.Is(err, errUndecided) {
		t.Errorf("without a node process: %v", err)
	}
}
