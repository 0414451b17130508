// SPDX-License-Identifier: Apache-2.0

package ha

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

// move turns a machine off and on again with another address.
func move(t *testing.T, n *cluster.Node) {
	t.Helper()
	old := n.IP()
	cluster.Do(t, n.PowerCut, n.Readdress, n.Restart)
	t.Logf("%s moved from %s to %s", n.Name(), old, n.IP())
}

// TestServerMoves: the first server, which all others have joined through, gets another address.
func TestServerMoves(t *testing.T) {
	c := shared.Cluster(t)
	moved, other := c.Servers[0], c.Servers[1]
	l := startLoad(t, c)
	move(t, moved.Node)
	cluster.Do(t, c.WaitReady)
	isAt(t, other, moved.Node)
	for _, n := range c.Nodes() {
		err := testbed.Wait(cluster.Within(t, 20*time.Second), n.Name()+" to know where the servers are now", func(ctx context.Context) error { return knows(ctx, n, c.Servers...) })
		if err != nil {
			t.Error(err)
		}
	}
	reachable(t, c, moved.Node)
	l.finish()
}

// isAt checks what a server knows about the address of a node, in all places.
func isAt(t *testing.T, s *cluster.Server, n *cluster.Node) {
	t.Helper()
	err := testbed.Wait(cluster.Within(t, minute), fmt.Sprintf("%s to be known at %s", n.Name(), n.IP()), func(ctx context.Context) error {
		nodes, err := s.Nodes(ctx)
		if err != nil {
			return err
		}
		if got := nodes[n.Name()].InternalIP; got != n.IP() {
			return fmt.Errorf("its Node has the address %s", got)
		}
		if n.Role != cluster.ServerRole {
			return nil
		}
		members, err := s.Members(ctx)
		if err != nil {
			return err
		}
		if got, want := fmt.Sprint(members[n.Name()].PeerURLs), "[https://"+n.IP()+":2380]"; got != want {
			return fmt.Errorf("its member has the peer URLs %s, not %s", got, want)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// reachable checks that a new pod on a node works in every way: its network from everywhere, and what goes through the kubelet.
func reachable(t *testing.T, c *cluster.Cluster, n *cluster.Node) {
	t.Helper()
	s := c.Servers[len(c.Servers)-1].Session(t)
	s.Apply(cluster.ServerPod, "web", "", "  nodeName: "+n.Name())
	s.Ready("web")
	ip := s.Kubectl("get", "pod", "web", "-o", "jsonpath={.status.podIP}")
	for _, from := range c.Nodes() {
		err := testbed.Wait(cluster.Within(t, minute), fmt.Sprintf("an answer from a pod on %s to %s", n.Name(), from.Name()), func(ctx context.Context) error {
			out, err := from.Exec(ctx, "curl", "-sS", "-m", "3", "http://"+ip+":8080/")
			if err == nil && !strings.HasPrefix(out, "web ") {
				err = fmt.Errorf("%q", out)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	for _, from := range c.Servers {
		if out, err := from.Kubectl(cluster.Within(t, minute), "-n", s.NS, "logs", "web"); err != nil || !strings.Contains(out, "listening") {
			t.Errorf("logs of a pod on %s, from %s: %q, %v", n.Name(), from.Name(), out, err)
		}
	}
}

// TestAgentMoves: an agent gets another address.
func TestAgentMoves(t *testing.T) {
	c := shared.Cluster(t)
	agent := c.Agents[0]
	move(t, agent)
	cluster.Do(t, c.WaitReady)
	isAt(t, c.Servers[1], agent)
	reachable(t, c, agent)
}

// TestOnlyServerMoves: a cluster of one server and an agent. The server gets another address, and has everything it had; the
// agent was off meanwhile and is told the new address.
func TestOnlyServerMoves(t *testing.T) {
	c := cluster.ForTest(t, cluster.Spec{Servers: 1, Agents: 1})
	cluster.Do(t, c.Start)
	server, agent := c.Servers[0], c.Agents[0]
	s := server.Session(t)
	s.Kubectl("create", "configmap", "kept", "--from-literal=n=1")
	s.Kubectl("create", "deployment", "web", "--image=kedge.test/server:1", "--replicas=2")
	s.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	cluster.Do(t, agent.Stop)
	move(t, server.Node)
	if err := server.WaitReady(cluster.Within(t, 2*minute)); err != nil {
		t.Fatal(err)
	}
	isAt(t, server, server.Node)
	if got := s.Kubectl("get", "configmap", "kept", "-o", "jsonpath={.data.n}"); got != "1" {
		t.Errorf("the ConfigMap has %q", got)
	}

	token, err := server.Token(cluster.Within(t, minute), cluster.AgentRole)
	if err != nil {
		t.Fatal(err)
	}
	agent.JoinThrough(server.URL(), token)
	cluster.Do(t, agent.Run, c.WaitReady)
	if err := testbed.Wait(cluster.Within(t, minute), "the agent to know only the new address", func(ctx context.Context) error { return knows(ctx, agent, server) }); err != nil {
		t.Error(err)
	}
	s.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	for _, n := range c.Nodes() {
		reachable(t, c, n)
	}
	// Once more while both run, as when a lease of DHCP is not renewed.
	if err := errors.Join(server.Stop(cluster.Within(t, minute)), server.Readdress(cluster.Within(t, minute)), server.Run(cluster.Within(t, minute))); err != nil {
		t.Fatal(err)
	}
	if err := server.WaitReady(cluster.Within(t, 2*minute)); err != nil {
		t.Error(err)
	}
	isAt(t, server, server.Node)
}
