// SPDX-License-Identifier: Apache-2.0

// Package network tests what carries the packets of pods: flannel's backends, kube-proxy's modes, two address families, CNI plugins,
// and that nothing of it is left where it is not wanted any more.
package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/tests/cluster"
)

const minute = time.Minute

// cleanupVariable makes this program, run in a machine, remove what Kedge left in its network.
const cleanupVariable = "KEDGE_TEST_CLEANUP_NETWORK"

func TestMain(m *testing.M) {
	if os.Getenv(cleanupVariable) != "" {
		cfg := node.Config{RunDir: "/run/kedge", ClusterDNS: netip.MustParseAddr("10.43.0.10")}
		err := cfg.ClusterCIDR.UnmarshalText([]byte(clusterCIDR))
		if err == nil {
			err = node.CleanupNetwork(context.Background(), cfg)
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// pair is a pod on each of two nodes, and Services whose endpoints are both.
const pair = `
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {app: web, at: %[1]s}, annotations: {kubernetes.io/ingress-bandwidth: 30M, kubernetes.io/egress-bandwidth: 20M}}
spec:
  nodeName: %[1]s
  terminationGracePeriodSeconds: 0
  containers:
  - {name: server, image: "kedge.test/server:1", ports: [{containerPort: 8080, hostPort: 18080}]}
  - {name: box, image: "kedge.test/busybox:1", command: [sleep, "100000"]}
---
apiVersion: v1
kind: Pod
metadata: {name: %[2]s, labels: {app: web, at: %[2]s}}
spec:
  nodeName: %[2]s
  terminationGracePeriodSeconds: 0
  containers:
  - {name: server, image: "kedge.test/server:1"}
  - {name: box, image: "kedge.test/busybox:1", command: [sleep, "100000"]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: NodePort, ipFamilyPolicy: PreferDualStack, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`

// pods starts the pair on two nodes and waits until both are Ready, also in a slow virtual machine.
func pods(s *cluster.Session, one, other string) {
	s.Apply(pair, one, other)
	s.EventuallyWithin(4*minute, "the pods to be Ready", func() error {
		_, err := s.Try("wait", "--for=condition=Ready", "--timeout=10s", "pod/"+one, "pod/"+other)
		return err
	})
}

// box runs a line of shell in a pod of the pair.
func box(s *cluster.Session, pod, line string) (string, error) {
	return s.Try("exec", pod, "-c", "box", "--", "sh", "-c", line)
}

// field asks for the addresses and the like of an object, without those that are empty.
func field(s *cluster.Session, object, path string) []string {
	return strings.Fields(s.Kubectl("get", object, "-o", "jsonpath={"+path+"}"))
}

// internalIPs are the addresses of nodes.
func internalIPs(s *cluster.Session, nodes ...string) []string {
	var list []string
	for _, n := range nodes {
		list = append(list, field(s, "node/"+n, `.status.addresses[?(@.type=="InternalIP")].address`)...)
	}
	return list
}

// checkPods has every pod of the pair reach both, by every address.
func checkPods(t *testing.T, s *cluster.Session, names ...string) {
	t.Helper()
	for _, to := range names {
		for _, ip := range field(s, "pod/"+to, ".status.podIPs[*].ip") {
			for _, from := range names {
				s.Eventually(fmt.Sprintf("%s to reach %s at %s", from, to, ip), func() error {
					_, err := box(s, from, "ping -c1 -W1 "+ip)
					return err
				})
			}
		}
	}
}

// checkServices has the Service answered by both pods, at its addresses from pods and the server, and at its NodePort from outside.
func checkServices(t *testing.T, s *cluster.Session, nodeIPs []string, names ...string) {
	t.Helper()
	port := field(s, "service/web", ".spec.ports[0].nodePort")[0]
	for _, ip := range field(s, "service/web", ".spec.clusterIPs[*]") {
		url := "http://" + net.JoinHostPort(ip, "80") + "/"
		for _, from := range names {
			answeredBy(t, s, url+" from the pod "+from, names, func() (string, error) {
				return box(s, from, "for i in 1 2 3 4 5 6 7 8; do timeout 3 wget -q -O- "+url+"; done")
			})
		}
		answeredBy(t, s, url+" from the node", names, func() (string, error) { return curls(s.Within(minute), s.Node, url) })
	}
	for _, ip := range nodeIPs {
		url := "http://" + net.JoinHostPort(ip, port) + "/"
		answeredBy(t, s, url+" from outside", names, func() (string, error) {
			ctx := s.Within(minute)
			var all strings.Builder
			for range 8 {
				out, err := get(ctx, url)
				if err != nil {
					return "", err
				}
				all.WriteString(out)
			}
			return all.String(), nil
		})
	}
}

func curls(ctx context.Context, n *cluster.Node, url string) (string, error) {
	return n.Shell(ctx, "for i in 1 2 3 4 5 6 7 8; do curl -gsS -m 3 '"+url+"' || exit; done")
}

// answeredBy waits until lines that start with names come from all of them and from nobody else.
func answeredBy(t *testing.T, s *cluster.Session, what string, names []string, ask func() (string, error)) {
	t.Helper()
	seen := map[string]bool{}
	s.Eventually(what+" to be answered by both pods", func() error {
		out, err := ask()
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			seen[strings.Fields(line)[0]] = true
		}
		for _, name := range names {
			if !seen[name] {
				return fmt.Errorf("%s has not answered, only %v", name, seen)
			}
		}
		if len(seen) != len(names) {
			return fmt.Errorf("answered by %v", seen)
		}
		return nil
	})
}

// nodeProcess is the process ID of a machine's [node] process.
func nodeProcess(t *testing.T, n *cluster.Node) int {
	t.Helper()
	st, err := n.Status(cluster.Within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	return st.PIDs()["node"]
}

// shell runs a line in a machine and fails the test if that fails.
func shell(t *testing.T, n *cluster.Node, line string) string {
	t.Helper()
	out, err := n.Shell(cluster.Within(t, minute), line)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// tables is what a machine knows of the ways to pods of other nodes.
func tables(t *testing.T, n *cluster.Node) string {
	t.Helper()
	return shell(t, n, `ip -4 route show | grep -E '^10\.42\.|^10\.43\.' ; ip -6 route show | grep ^fd42 ; ip neigh show nud permanent; bridge fdb show | grep flannel; true`)
}

// gone waits until no text is in a machine's tables any more.
func gone(t *testing.T, n *cluster.Node, within time.Duration, texts ...string) {
	t.Helper()
	start := time.Now()
	cluster.EventuallyWithin(t, within, fmt.Sprintf("%s to know nothing of %v", n.Name(), texts), func(context.Context) error {
		have := tables(t, n)
		for _, text := range texts {
			if regexp.MustCompile(`\b` + regexp.QuoteMeta(text) + `\b`).MatchString(have) {
				return fmt.Errorf("%s is in\n%s", text, have)
			}
		}
		return nil
	})
	t.Logf("%s had nothing of %v left after %s", n.Name(), texts, time.Since(start).Round(100*time.Millisecond))
}

// get asks for a URL, with a connection of its own.
func get(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = errors.New(res.Status)
	}
	return string(b), err
}

// restart starts Kedge in a machine with other flags, and waits until all of it is ready.
func restart(t *testing.T, n *cluster.Node, flags ...string) {
	t.Helper()
	cluster.Do(t, n.Stop)
	n.Flags = flags
	cluster.Do(t, n.Run)
	ready(t, n)
}

// ready waits until all components of a machine say to be ready.
func ready(t *testing.T, n *cluster.Node) {
	t.Helper()
	cluster.Eventually(t, n.Name()+" to be ready", func(ctx context.Context) error {
		st, err := n.Status(ctx)
		if err == nil {
			err = st.Problems()
		}
		return err
	})
}
