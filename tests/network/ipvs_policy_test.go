// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kedge-io/kedge/tests/cluster"
)

// balancers are two Services on the addresses of nodes: of both pods of the pair, and of the pod on one node, which keeps its clients'
// addresses. Another one is a ClusterIP of that pod only.
const balancers = `
apiVersion: v1
kind: Service
metadata: {name: both}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 82, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: kept}
spec: {type: LoadBalancer, externalTrafficPolicy: Local, selector: {at: %[1]s}, ports: [{port: 83, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: other}
spec: {selector: {at: %[2]s}, ports: [{port: 80, targetPort: 8080}]}
`

// checkBalancers has LoadBalancer services answer on the addresses of two nodes; the pair's pod on the first one is that of "kept".
func checkBalancers(t *testing.T, s *cluster.Session, c *cluster.Cluster, ips map[string]string, names ...string) {
	t.Helper()
	const addresses = "jsonpath={.status.loadBalancer.ingress[*].ip}"
	s.Becomes(ips[names[0]], "get", "service", "kept", "-o", addresses)
	for _, name := range names {
		url := "http://" + net.JoinHostPort(ips[name], "82") + "/"
		answeredBy(t, s, url+" from outside", names, func() (string, error) {
			var all strings.Builder
			for range 8 {
				out, err := get(s.Within(minute), url)
				if err != nil {
					return "", err
				}
				all.WriteString(out)
			}
			return all.String(), nil
		})
		for _, from := range names {
			answeredBy(t, s, url+" from the pod "+from, names, func() (string, error) {
				return box(s, from, "for i in 1 2 3 4 5 6 7 8; do timeout 3 wget -q -O- "+url+"; done")
			})
		}
	}
	kept := "http://" + net.JoinHostPort(ips[names[0]], "83") + "/"
	s.Eventually("the Service that keeps its clients' addresses", func() error {
		out, err := get(s.Within(minute), kept)
		if err == nil && !strings.HasPrefix(out, names[0]+" "+c.Bed.Gateway()+":") {
			err = fmt.Errorf("%q; want %s, which sees %s", out, names[0], c.Bed.Gateway())
		}
		return err
	})
	if out, err := get(s.Within(minute), "http://"+net.JoinHostPort(ips[names[1]], "83")+"/"); err == nil {
		t.Errorf("a node without an endpoint answers: %q", out)
	}
	for _, from := range names {
		answeredBy(t, s, kept+" from the pod "+from, names[:1], func() (string, error) { return box(s, from, "timeout 3 wget -q -O- "+kept) })
	}
}

// checkPool gives the cluster a pool, from which only the guest serves: in mode ipvs every node has the addresses of all Services on a
// device of its own, and the one that announces them has them on its network card, too.
func checkPool(t *testing.T, s *cluster.Session, c *cluster.Cluster, g *guest, other string) {
	t.Helper()
	s.Kubectl("label", "node", g.Name(), "kedge.io/servicelb=true")
	address := func(n string) string { return strings.TrimSuffix(c.Bed.Gateway(), "1") + n }
	restart(t, c.Servers[0].Node, "--servicelb-pool", address("230")+"-"+address("239"))
	var both, kept string
	s.Eventually("addresses of the pool", func() error {
		both, kept = strings.Join(field(s, "service/both", ".status.loadBalancer.ingress[*].ip"), ""), strings.Join(field(s, "service/kept", ".status.loadBalancer.ingress[*].ip"), "")
		if !strings.HasPrefix(both, address("23")) || !strings.HasPrefix(kept, address("23")) {
			return fmt.Errorf("%q, %q", both, kept)
		}
		return nil
	})
	names := []string{g.Name(), other}
	url := "http://" + both + ":82/"
	s.EventuallyWithin(2*minute, url+" from outside", func() error { _, err := get(s.Within(minute), url); return err })
	for _, from := range names {
		answeredBy(t, s, url+" from the pod "+from, names, func() (string, error) {
			return box(s, from, "for i in 1 2 3 4 5 6 7 8; do timeout 3 wget -q -O- "+url+"; done")
		})
	}
	s.Eventually("the Service that keeps its clients' addresses", func() error {
		out, err := get(s.Within(minute), "http://"+kept+":83/")
		if err == nil && !strings.HasPrefix(out, g.Name()+" "+c.Bed.Gateway()+":") {
			err = fmt.Errorf("%q; want %s, which sees %s", out, g.Name(), c.Bed.Gateway())
		}
		return err
	})
	if have := strings.Join(strings.Fields(g.virtualServers(t)), " "); !strings.Contains(have, "TCP "+both+":82 rr") {
		t.Errorf("no virtual server for %s:82:\n%s", both, have)
	}
	if have := g.do(t, "ip -o addr show dev eth0"); !strings.Contains(have, " "+both+"/") || !strings.Contains(have, " "+kept+"/") {
		t.Errorf("%s and %s are not on the network card: %s", both, kept, have)
	}
}

// newcomer is a pod that tries targets from its first moment on. Its arguments: name, node, targets, more containers.
const newcomer = `
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {role: newcomer}}
spec:
  nodeName: %[2]s
  terminationGracePeriodSeconds: 0
  containers:
  - {name: server, image: "kedge.test/server:1", env: [{name: WATCH, value: "%[3]s"}, {name: EVERY, value: 20ms}, {name: TIMEOUT, value: 1s}]}
%[4]s
`

// restrict is the policy of the test, whose spec is its argument.
const restrict = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: restrict}
spec: %s
`

// attempt is something that a pod of a session, or "outside", tries to reach.
type attempt struct {
	from, url string
	want      bool
}

// obeyed applies a policy and waits until all attempts end as they should.
func obeyed(s *cluster.Session, spec string, attempts ...attempt) {
	s.Apply(restrict, spec)
	s.EventuallyWithin(2*minute, "the policy "+spec, func() error {
		lines := map[string][]string{}
		for _, a := range attempts {
			lines[a.from] = append(lines[a.from], a.url)
		}
		var mu sync.Mutex
		got := map[attempt]bool{}
		var all errgroup.Group
		for from, urls := range lines {
			all.Go(func() error {
				reached, err := reaches(s, from, urls)
				mu.Lock()
				defer mu.Unlock()
				for i, yes := range reached {
					got[attempt{from: from, url: urls[i]}] = yes
				}
				return err
			})
		}
		if err := all.Wait(); err != nil {
			return err
		}
		for _, a := range attempts {
			if got[attempt{from: a.from, url: a.url}] != a.want {
				return fmt.Errorf("%s to %s: %v, want %v", a.from, a.url, !a.want, a.want)
			}
		}
		return nil
	})
}

// reaches tries all URLs at once, or "dns", from a pod or from outside.
func reaches(s *cluster.Session, from string, urls []string) ([]bool, error) {
	reached := make([]bool, len(urls))
	if from == "outside" {
		for i, url := range urls {
			_, err := get(s.Within(minute), url)
			reached[i] = err == nil
		}
		return reached, nil
	}
	out, err := box(s, from, "i=0; for u in "+strings.Join(urls, " ")+"; do (if [ $u = dns ]; then timeout 4 nslookup kubernetes.default.svc.cluster.local; "+
		"else timeout 4 wget -q -O- $u; fi >/dev/null 2>&1 && echo $i) & i=$((i+1)); done; wait")
	for _, word := range strings.Fields(out) {
		if i, err := strconv.Atoi(word); err == nil && i < len(reached) {
			reached[i] = true
		}
	}
	return reached, err
}

// checkPolicies has policies of the pair's pod on a node enforced, whoever comes: another pod of the node, which goes through kube-proxy
// there, the pair's pod on the other node, and a client outside.
func checkPolicies(t *testing.T, s *cluster.Session, c *cluster.Cluster, nodeIP, node, other string) {
	t.Helper()
	ip := func(pod string) string { return field(s, "pod/"+pod, ".status.podIP")[0] }
	cluster4 := func(service string) string { return field(s, "service/"+service, ".spec.clusterIP")[0] }
	own, others := "http://"+ip(node)+":8080/", "http://"+ip(other)+":8080/"
	kept, outside := "http://"+cluster4("kept")+":83/", "http://"+nodeIP+":83/"
	service := "http://" + cluster4("other") + "/"

	s.Apply(newcomer, "second", node, "connect "+ip(other)+":8080", `  - {name: box, image: "kedge.test/busybox:1", command: [sleep, "100000"]}`)
	s.EventuallyWithin(6*minute, "the second pod", func() error {
		_, err := s.Try("wait", "--for=condition=Ready", "--timeout=10s", "pod/second")
		return err
	})
	second := "http://" + ip("second") + ":8080/"
	const subject = `podSelector: {matchLabels: {at: %s}}`
	of := func(rules string) string { return "{" + fmt.Sprintf(subject, node) + ", " + rules + "}" }
	obeyed(s, of(`policyTypes: [Ingress]`), attempt{other, own, false}, attempt{other, kept, false}, attempt{"second", own, false},
		attempt{"second", kept, false}, attempt{"second", service, true}, attempt{"outside", outside, false})
	obeyed(s, of(`ingress: [{from: [{podSelector: {matchLabels: {role: newcomer}}}]}]`), attempt{other, own, false}, attempt{other, kept, false},
		attempt{"second", own, true}, attempt{"second", kept, true}, attempt{"outside", outside, false})
	obeyed(s, of(fmt.Sprintf(`ingress: [{from: [{ipBlock: {cidr: %s/32}}, {podSelector: {matchLabels: {at: %s}}}]}]`, c.Bed.Gateway(), other)),
		attempt{other, own, true}, attempt{other, kept, true}, attempt{"second", kept, false}, attempt{"outside", outside, true})
	obeyed(s, of(`policyTypes: [Egress]`), attempt{node, others, false}, attempt{node, service, false}, attempt{node, second, false},
		attempt{node, "dns", false}, attempt{other, own, true})
	obeyed(s, of(`egress: [{to: [{podSelector: {matchLabels: {at: `+other+`}}}]}, {to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}},
		podSelector: {matchLabels: {k8s-app: kube-dns}}}], ports: [{port: 53, protocol: UDP}, {port: 53}]}], policyTypes: [Egress]`),
		attempt{node, others, true}, attempt{node, service, true}, attempt{node, second, false}, attempt{node, "dns", true})

	// The first moments of a pod.
	obeyed(s, `{podSelector: {matchLabels: {role: newcomer}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {at: `+other+`}}}]}]}`,
		attempt{"second", others, true}, attempt{"second", own, false})
	allowed := []string{ip(other) + ":8080", cluster4("other") + ":80"}
	s.Apply(newcomer, "third", node, "connect "+strings.Join(append(allowed, ip(node)+":8080", cluster4("kept")+":83"), ";connect "), "")
	var watched []struct {
		Target    string
		Tries, OK int
		FirstOK   time.Time
		FirstBad  time.Time
		Error     string
	}
	s.EventuallyWithin(6*minute, "the third pod to have tried", func() error {
		addr, err := s.Try("get", "pod", "third", "-o", "jsonpath={.status.podIP}")
		if err != nil || addr == "" {
			return fmt.Errorf("it has the address %q, %w", addr, err)
		}
		out, err := box(s, other, "timeout 5 wget -q -O- http://"+addr+":8080/watch")
		if err == nil {
			err = json.Unmarshal([]byte(out), &watched)
		}
		if err != nil || len(watched) != 4 {
			return fmt.Errorf("%q, %w", out, err)
		}
		for _, w := range watched {
			if w.Tries < 3 {
				return fmt.Errorf("%+v", watched)
			}
		}
		return nil
	})
	for _, w := range watched {
		may := strings.HasSuffix(w.Target, allowed[0]) || strings.HasSuffix(w.Target, allowed[1])
		if may != (w.OK > 0) || may && !w.FirstBad.IsZero() && w.FirstBad.Before(w.FirstOK) {
			t.Errorf("a new pod, which may %v: %+v", may, w)
		}
	}
	s.Kubectl("delete", "networkpolicy", "restrict")
	s.Kubectl("delete", "pod", "second", "third", "--wait=false")
	cluster.EventuallyWithin(t, minute, "everything to be open again", func(context.Context) error {
		_, err := box(s, node, "timeout 3 wget -q -O- "+others)
		return err
	})
}
