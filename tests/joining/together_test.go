// SPDX-License-Identifier: Apache-2.0

package joining

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

const operatorsToken = "a-text-that-the-operator-chose"

// TestTogether starts all machines at the same time, as scripts do, in the wrong order; then it takes the cluster apart.
func TestTogether(t *testing.T) {
	c := cluster.ForTest(t, cluster.Spec{Servers: 3, Agents: 1})
	for _, step := range []struct {
		name string
		run  func(*testing.T, *cluster.Cluster)
	}{
		{"start all at once", startTogether},
		{"quorum is guarded", guardQuorum},
		{"cluster-reset", clusterReset},
	} {
		ended := false
		t.Run(step.name, func(t *testing.T) {
			step.run(t, c)
			ended = true
		})
		if !ended {
			return // the next ones begin where this one ends
		}
	}
}

// startTogether starts the joiners first; they wait and say for what. The first server has no kubelet. One cluster comes of it.
func startTogether(t *testing.T, c *cluster.Cluster) {
	first := c.Servers[0]
	for _, n := range c.Nodes()[1:] {
		n.JoinThrough(first.URL(), operatorsToken)
		cluster.Do(t, n.Run)
	}
	for _, n := range c.Nodes()[1:] {
		if err := n.WaitLog(cluster.Within(t, minute), first.IP()+":6443 (connection refused)"); err != nil {
			t.Error(err)
		}
		st, err := n.Status(cluster.Within(t, minute))
		if err != nil {
			t.Errorf("kedge status of %s, which waits: %v", n.Name(), err)
			continue
		}
		if !strings.Contains(fmt.Sprint(st.Problems()), first.IP()) {
			t.Errorf("kedge status of %s does not say for whom it waits: %v", n.Name(), st.Problems())
		}
	}
	begin := time.Now()
	first.Flags = []string{"--token", operatorsToken, "--disable-agent"}
	cluster.Do(t, first.Run, c.WaitReady)
	t.Logf("three servers and an agent at once: %s from the start of the first", time.Since(begin).Round(100*time.Millisecond))
	nodes, err := first.Nodes(cluster.Within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := nodes[first.Name()]; ok {
		t.Error("the server without a kubelet has a Node")
	}
	if st, err := first.Status(cluster.Within(t, minute)); err != nil {
		t.Error(err)
	} else if pids := st.PIDs(); pids["node"] != 0 || pids["containerd"] != 0 {
		t.Errorf("the server without a kubelet runs %v", pids)
	}
	s := first.Session(t)
	s.Kubectl("create", "deployment", "web", "--image=kedge.test/server:1", "--replicas=3")
	s.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	if out := s.Kubectl("logs", "deployment/web"); !strings.Contains(out, "listening") {
		t.Errorf("logs through a server without a kubelet: %q", out)
	}
	for _, n := range c.Nodes()[1:] {
		if log := logOf(t, n); !strings.Contains(log, "no CA hash") {
			t.Errorf("%s does not warn that its token has no CA hash", n.Name())
		}
	}
}

// guardQuorum: with one server dead, no other can be removed or leave, and nothing happens to it.
func guardQuorum(t *testing.T, c *cluster.Cluster) {
	s1, s2, s3 := c.Servers[0], c.Servers[1], c.Servers[2]
	cluster.Do(t, s3.PowerCut)
	before := belongings(t, s1)
	for name, try := range map[string]func(context.Context) (string, error){
		"kedge node remove": func(ctx context.Context) (string, error) {
			return s1.Exec(ctx, cluster.Program, "node", "remove", s2.Name())
		},
		"kedge leave": func(ctx context.Context) (string, error) { return s2.Exec(ctx, cluster.Program, "leave") },
	} {
		out, err := try(cluster.Within(t, minute))
		var exit *testbed.ExitError
		if !errors.As(err, &exit) || exit.Code < 1 {
			t.Fatalf("%s: %s, %v; want a refusal", name, out, err)
		}
		t.Logf("%s: %s", name, exit.Stderr)
		if text := exit.Stderr + exit.Stdout; !strings.Contains(text, "majority") || !strings.Contains(text, s3.Name()+" does not answer") {
			t.Errorf("%s: it does not name the majority and the dead server: %s", name, text)
		}
	}
	if got := belongings(t, s1); got != before {
		t.Errorf("the cluster has now:\n%s\nbefore:\n%s", got, before)
	}
	if running, err := s2.Process().Running(cluster.Within(t, minute)); !running || err != nil {
		t.Errorf("the server that may not leave: running %t, %v", running, err)
	}
	// The dead one can be removed, and what is left can do without one less.
	if out, err := s1.Exec(cluster.Within(t, 2*minute), cluster.Program, "node", "remove", s3.Name()); err != nil {
		t.Errorf("remove the dead server: %s, %v", out, err)
	}
	gone(t, s1, s3.Name())
	if err := s1.Voters(cluster.Within(t, minute), s1.Name(), s2.Name()); err != nil {
		t.Error(err)
	}
	cluster.Do(t, s3.Restart) // the operator's token is valid: it joins afresh
	cluster.Do(t, c.WaitReady)
	movedAside(t, s3)
}

// clusterReset: two of three servers are lost. The third makes a cluster of its own with all data, and the others rejoin with
// their ordinary commands when they come back.
func clusterReset(t *testing.T, c *cluster.Cluster) {
	s1, s2, s3 := c.Servers[0], c.Servers[1], c.Servers[2]
	s := s1.Session(t)
	s.Kubectl("create", "configmap", "kept", "--from-literal=n=1")
	cluster.Do(t, s2.PowerCut, s3.PowerCut, s1.Stop)
	flags := s1.Flags
	s1.Flags = append(flags[:len(flags):len(flags)], "--cluster-reset")
	begin := time.Now()
	cluster.Do(t, s1.Run)
	// Whether it runs on as a server or ends, is its matter; the ordinary command follows in the latter case.
	err := testbed.Wait(cluster.Within(t, 2*minute), "the reset", func(ctx context.Context) error {
		if running, err := s1.Process().Running(ctx); !running && err == nil {
			return nil
		}
		return s1.Voters(ctx, s1.Name())
	})
	if err != nil {
		t.Fatal(err)
	}
	s1.Flags = flags
	cluster.Do(t, s1.Restart)
	cluster.Eventually(t, "the only server to be ready", func(ctx context.Context) error {
		st, err := s1.Status(ctx)
		if err != nil {
			return err
		}
		return errors.Join(st.Problems(), s1.Voters(ctx, s1.Name()))
	})
	ready := time.Now()
	t.Logf("cluster-reset: ready after %s", ready.Sub(begin).Round(100*time.Millisecond))
	s.Kubectl("create", "deployment", "new", "--image=kedge.test/none")
	cluster.Eventually(t, "the controllers to make a pod", func(ctx context.Context) error {
		out, err := s1.Kubectl(ctx, "-n", s.NS, "get", "pods", "-l", "app=new", "-o", "name")
		if err == nil && out == "" {
			err = errors.New("not yet")
		}
		return err
	})
	if took := time.Since(ready); took > 30*time.Second {
		t.Errorf("there is a new pod %s after the server was ready: the lease of a leader that is gone was waited for", took.Round(time.Second))
	}
	s.Kubectl("delete", "deployment", "new")
	if got := s.Kubectl("get", "configmap", "kept", "-o", "jsonpath={.data.n}"); got != "1" {
		t.Errorf("the ConfigMap has %q", got)
	}
	cluster.Do(t, s2.Restart, s3.Restart, c.WaitReady)
	movedAside(t, s2)
	movedAside(t, s3)
	for _, server := range c.Servers {
		if got, err := server.Kubectl(cluster.Within(t, minute), "-n", s.NS, "get", "configmap", "kept", "-o", "jsonpath={.data.n}"); got != "1" || err != nil {
			t.Errorf("on %s the ConfigMap has %q, %v", server.Name(), got, err)
		}
	}
	// A restart with the ordinary command resets nothing.
	cluster.Do(t, s1.Stop, s1.Run, c.WaitReady)
}
