// SPDX-License-Identifier: Apache-2.0

package ha

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// TestAllOff: all servers are off and come back, in every order. Two of them are a cluster; one is none, says so, and never makes
// a cluster of its own.
func TestAllOff(t *testing.T) {
	c := shared.Cluster(t)
	s1, s2, s3 := c.Servers[0], c.Servers[1], c.Servers[2]
	powerCut := func(s *cluster.Server) func(context.Context) error { return s.PowerCut }
	stop := func(s *cluster.Server) func(context.Context) error { return s.Stop }
	for _, o := range []struct {
		name string
		off  func(*cluster.Server) func(context.Context) error
		on   []*cluster.Server
	}{
		{"power cut, then s1 s2 s3", powerCut, []*cluster.Server{s1, s2, s3}},
		{"stopped, then s1 s3 s2", stop, []*cluster.Server{s1, s3, s2}},
		{"power cut, then s2 s1 s3", powerCut, []*cluster.Server{s2, s1, s3}},
		{"power cut, then s2 s3 s1", powerCut, []*cluster.Server{s2, s3, s1}},
		{"power cut, then s3 s1 s2", powerCut, []*cluster.Server{s3, s1, s2}},
		{"power cut, then s3 s2 s1", powerCut, []*cluster.Server{s3, s2, s1}},
	} {
		t.Run(o.name, func(t *testing.T) {
			l := startLoad(t, c)
			begin := time.Now()
			for _, s := range c.Servers {
				cluster.Do(t, o.off(s))
			}
			t.Logf("all off after %s", time.Since(begin).Round(100*time.Millisecond))
			cluster.Do(t, o.on[0].Restart)
			err := testbed.Wait(cluster.Within(t, minute), "the first server to say that it waits for another", func(ctx context.Context) error {
				st, err := o.on[0].Status(ctx)
				if err != nil {
					return err
				}
				for _, p := range st.Processes {
					for _, c := range p.Components {
						if c.Name == "etcd" && c.State != "ready" && regexp.MustCompile("leader|majority|quorum").MatchString(c.Reason) {
							t.Logf("etcd is %s: %s", c.State, c.Reason)
							return nil
						}
					}
				}
				return fmt.Errorf("it says: %w", st.Problems())
			})
			if err != nil {
				t.Error(err)
			}
			begin = time.Now()
			cluster.Do(t, o.on[1].Restart)
			l.acknowledged(begin, 50)
			l.firstAfter("the start of the second server", begin)
			cluster.Do(t, o.on[2].Restart, c.WaitServing)
			t.Logf("all there %s after the start of the second server", time.Since(begin).Round(100*time.Millisecond))
			l.finish()
		})
	}
}

// TestStalledDatastore: the disk of one server stands still for 15 seconds. Nothing exits, anywhere.
func TestStalledDatastore(t *testing.T) {
	c := shared.Cluster(t)
	victim := used(t, c, c.Agents[0])
	other := otherThan(c, victim)
	s := other.Session(t)
	s.Apply(cluster.ServerPod, "web", "", "  nodeName: "+victim.Name())
	s.Ready("web")
	ip := s.Kubectl("get", "pod", "web", "-o", "jsonpath={.status.podIP}")
	l := startLoad(t, c)
	reader := l.readBeside(c, other)
	unchanged := processes(t, c.Nodes()...)
	pid := status(t, victim.Node).PIDs()["etcd"]
	signal := func(name string) {
		t.Helper()
		if _, err := victim.Exec(cluster.Within(t, minute), "kill", "-"+name, fmt.Sprint(pid)); err != nil {
			t.Fatal(err)
		}
	}
	what := "stall of the datastore of " + describe(t, c, victim)
	event := time.Now()
	signal("STOP")
	for end := event.Add(15 * time.Second); time.Now().Before(end); {
		if out, err := other.Exec(cluster.Within(t, minute), "curl", "-sS", "-m", "3", "http://"+ip+":8080/"); err != nil || !strings.HasPrefix(out, "web ") {
			t.Fatalf("the pod on that server, after %s: %q, %v", time.Since(event), out, err)
		}
		if err := other.NodesReady(cluster.Within(t, 10*time.Second), victim.Name()); err != nil {
			t.Fatalf("after %s: %v", time.Since(event), err)
		}
		// Pods are reached through the other servers, whose requests go to the kubelet.
		if got, err := s.Try("logs", "web", "--tail=1"); err != nil {
			t.Fatalf("logs of the pod, after %s: %s, %v", time.Since(event), got, err)
		}
	}
	l.outage(what, event, moveOn)
	signal("CONT")
	cluster.Do(t, c.WaitReady)
	unchanged()
	l.finish(reader)
}

// trafficPod asks a Service again and again, and writes what comes of it to a file of the node. Its arguments: the node, the
// Service, its own name.
const trafficPod = `
apiVersion: v1
kind: Pod
metadata: {name: "traffic-%[3]s"}
spec:
  nodeName: %[1]s
  terminationGracePeriodSeconds: 0
  containers:
  - name: client
    image: kedge.test/busybox:1
    command: [sh, -c, 'while sleep 0.2; do if timeout 2 wget -q -O /dev/null http://%[2]s/; then echo ok; else echo "failed $(date +%%T)"; fi; done >>/traffic/by-%[3]s']
    volumeMounts: [{name: traffic, mountPath: /traffic}]
  volumes: [{name: traffic, hostPath: {path: /var/log/traffic}}]
`

// traffic is what pods on a node hear from Services.
type traffic struct {
	t    *testing.T
	node *cluster.Node
	// failures of each client before the test began with anything: the first ones may be from before the Service was known.
	failures map[string]int
}

// startTraffic makes a pod on the node for each name, which asks the host of that name.
func startTraffic(t *testing.T, s *cluster.Session, n *cluster.Node, hosts map[string]string) *traffic {
	t.Helper()
	tr := &traffic{t: t, node: n, failures: map[string]int{}}
	for name, host := range hosts {
		s.Apply(trafficPod, n.Name(), host, name)
		tr.failures[name] = 0
	}
	tr.goesOn("at first", slices.Collect(maps.Keys(hosts))...)
	for name := range hosts {
		_, tr.failures[name] = tr.count(name)
	}
	return tr
}

func (tr *traffic) count(name string) (ok, failed int) {
	text, err := tr.node.ReadFile("/var/log/traffic/by-" + name)
	if err != nil {
		return 0, 0 // it has not begun
	}
	ok = strings.Count(string(text), "ok\n")
	return ok, strings.Count(string(text), "\n") - ok
}

// goesOn waits until some clients have got more answers.
func (tr *traffic) goesOn(when string, names ...string) {
	tr.t.Helper()
	before := map[string]int{}
	for _, name := range names {
		before[name], _ = tr.count(name)
	}
	err := testbed.Wait(cluster.Within(tr.t, minute), fmt.Sprintf("20 more answers for %v %s", names, when), func(context.Context) error {
		var errs []error
		for name, n := range before {
			if ok, failed := tr.count(name); ok < n+20 {
				errs = append(errs, fmt.Errorf("%s: %d, and %d failures so far", name, ok-n, failed))
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		tr.t.Fatal(err)
	}
}

// unharmed checks that no request of some clients has failed.
func (tr *traffic) unharmed(when string, names ...string) {
	tr.t.Helper()
	for _, name := range names {
		if _, failed := tr.count(name); failed != tr.failures[name] {
			tr.t.Errorf("%s: %d requests failed %s", name, failed-tr.failures[name], when)
		}
	}
}

// TestOutage: there is no control plane at all. Pods and the traffic between them go on, also when the node process dies.
func TestOutage(t *testing.T) {
	c := shared.Cluster(t)
	agent := c.Agents[0]
	s := c.Servers[0].Session(t)
	s.Apply(cluster.ServerPod, "near", "", "  nodeName: "+agent.Name())
	s.Apply(cluster.ServerPod, "far", "", "  nodeName: "+c.Servers[1].Name())
	hosts := map[string]string{"near-name": "near"}
	for _, name := range []string{"near", "far"} {
		s.Kubectl("expose", "pod", name, "--port=80", "--target-port=8080")
		hosts[name] = s.Kubectl("get", "service", name, "-o", "jsonpath={.spec.clusterIP}")
	}
	s.Ready("near", "far")
	tr := startTraffic(t, s, agent, hosts)
	identity := func() string {
		return s.Kubectl("get", "pods", "-o", `jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}{"\n"}{end}`)
	}
	pods := identity()

	begin := time.Now()
	for _, server := range c.Servers {
		cluster.Do(t, server.Stop)
	}
	tr.goesOn("without servers", "near", "far", "near-name")
	tr.unharmed("without servers", "near", "far", "near-name")
	restartNodeProcess(t, agent)
	tr.goesOn("with a node process that never saw a server", "near", "far") // names are not known again before there is a server
	tr.unharmed("without servers", "near", "far")
	t.Logf("outage of %s", time.Since(begin).Round(time.Second))

	for _, server := range c.Servers {
		cluster.Do(t, server.Run)
	}
	cluster.Do(t, c.WaitReady)
	tr.goesOn("after the outage", "near", "far", "near-name")
	tr.unharmed("around the outage", "near", "far")
	if now := identity(); now != pods {
		t.Errorf("pods before the outage:\n%s\nafterwards:\n%s", pods, now)
	}
}

// restartNodeProcess kills kubelet and its companions of a node, and waits until it has new ones.
func restartNodeProcess(t *testing.T, n *cluster.Node) {
	t.Helper()
	pid := status(t, n).PIDs()["node"]
	if _, err := n.Exec(cluster.Within(t, minute), "kill", "-9", fmt.Sprint(pid)); err != nil {
		t.Fatal(err)
	}
	err := testbed.Wait(cluster.Within(t, minute), "the node process to be there again", func(ctx context.Context) error {
		st, err := n.Status(ctx)
		if err != nil {
			return err
		}
		if now := st.PIDs()["node"]; now == pid || now == 0 {
			return errors.New("it is not")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
