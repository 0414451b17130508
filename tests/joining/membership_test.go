// SPDX-License-Identifier: Apache-2.0

package joining

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

// TestOneByOne: the shared cluster has been made this way. Its nodes have the roles they should have, and joining took seconds.
func TestOneByOne(t *testing.T) {
	c := shared.Cluster(t)
	t.Logf("from start to Ready, and for servers to vote: %v", c.Took)
	for name, took := range c.Took {
		if took > 30*time.Second {
			t.Errorf("%s needed %s", name, took)
		}
	}
	nodes, err := c.Servers[2].Nodes(cluster.Within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range c.Nodes() {
		want := "[worker]"
		if n.Role == cluster.ServerRole {
			want = "[control-plane etcd]"
		}
		if got := roles(nodes[n.Name()]); got != want {
			t.Errorf("%s has the roles %s, want %s", n.Name(), got, want)
		}
	}
}

func roles(n cluster.NodeState) string {
	var names []string
	for label := range n.Labels {
		if name, ok := strings.CutPrefix(label, "node-role.kubernetes.io/"); ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return fmt.Sprint(names)
}

// remove runs kedge node remove on a server.
func remove(t *testing.T, s *cluster.Server, args ...string) string {
	t.Helper()
	out, err := s.Exec(cluster.Within(t, 2*minute), append([]string{cluster.Program, "node", "remove"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestRemove: a server is removed while it runs. It hears so; it does not come back by itself with a token that was revoked, and
// joins afresh with a new one, without anything being cleaned up by hand.
func TestRemove(t *testing.T) {
	c := shared.Cluster(t)
	s, victim := c.Servers[0], c.Servers[2]
	session := c.Servers[1].Session(t)
	session.Kubectl("create", "deployment", "web", "--image=kedge.test/server:1", "--replicas=4")
	session.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")

	t.Log(remove(t, s, victim.Name(), "--drain"))
	gone(t, s, victim.Name())
	if err := s.Voters(cluster.Within(t, minute), s.Name(), c.Servers[1].Name()); err != nil {
		t.Error(err)
	}
	if err := victim.WaitLog(cluster.Within(t, minute), "removed"); err != nil {
		t.Error(err)
	}
	session.Kubectl("rollout", "status", "deployment/web", "--timeout=55s") // on the others
	if running, err := victim.Process().Running(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	} else if running {
		cluster.Do(t, victim.Stop)
	}

	token := victim.JoinFlags[slices.Index(victim.JoinFlags, "--token")+1]
	if _, err := s.Exec(cluster.Within(t, minute), cluster.Program, "token", "delete", token); err != nil {
		t.Fatal(err)
	}
	before, said := belongings(t, s), logOf(t, victim.Node)
	cluster.Do(t, victim.Run)
	cluster.Eventually(t, "the removed server to say what it needs", func(context.Context) error {
		if text := strings.TrimPrefix(logOf(t, victim.Node), said); !strings.Contains(text, "kedge token create") {
			return fmt.Errorf("it says: %s", text)
		}
		return nil
	})
	if got := belongings(t, s); got != before {
		t.Errorf("the cluster has now:\n%s\nbefore:\n%s", got, before)
	}
	if running, err := victim.Process().Running(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	} else if running {
		cluster.Do(t, victim.Stop)
	}
	join(t, c, victim.Node)
	cluster.Do(t, c.WaitReady)
	movedAside(t, victim)
}

func logOf(t *testing.T, n *cluster.Node) string {
	t.Helper()
	text, err := n.Log()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// movedAside checks that the old data of a datastore was kept.
func movedAside(t *testing.T, s *cluster.Server) {
	t.Helper()
	out, err := s.Shell(cluster.Within(t, minute), "cd /var/lib/kedge && find . -path '*member/wal' -not -path './etcd/member/*'")
	if err != nil || out == "" {
		t.Errorf("the old data of %s was not kept: %v", s.Name(), err)
	}
}

// TestRemoveAgent: an agent is removed while it runs. It stops, is not in the cluster any more, and joins afresh with a token.
func TestRemoveAgent(t *testing.T) {
	c := shared.Cluster(t)
	s, agent := c.Servers[0], c.Agents[0]
	t.Log(remove(t, s, agent.Name()))
	if err := agent.Process().Wait(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	}
	if text := logOf(t, agent); !strings.Contains(text, "removed from the cluster and stops") {
		t.Errorf("it says: %s", text)
	}
	gone(t, s, agent.Name())
	join(t, c, agent)
	cluster.Do(t, c.WaitReady)
	pods(t, c, agent)
}

// TestReimage: a server and an agent lose their disks and join under their old names.
func TestReimage(t *testing.T) {
	c := shared.Cluster(t)
	server, agent := c.Servers[2], c.Agents[0]
	before, err := c.Servers[0].Members(cluster.Within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []*cluster.Node{server.Node, agent} {
		if err := n.Reimage(cluster.Within(t, minute)); err != nil {
			t.Fatal(err)
		}
		n.JoinThrough(c.Servers[0].URL(), token(t, c.Servers[0], n.Role))
		cluster.Do(t, n.Run)
	}
	cluster.Eventually(t, "the new server to vote in the place of the old one", func(ctx context.Context) error {
		members, err := c.Servers[0].Members(ctx)
		if err == nil && (members[server.Name()].ID == before[server.Name()].ID || members[server.Name()].Learner || len(members) != 3) {
			err = fmt.Errorf("members: %+v", members)
		}
		return err
	})
	cluster.Do(t, c.WaitReady)
	pods(t, c, server.Node, agent)
}

// TestDeletedNode: a dead server's Node is deleted, and its member with it. When it comes back it joins with its ordinary command.
func TestDeletedNode(t *testing.T) {
	c := shared.Cluster(t)
	s, victim := c.Servers[0], c.Servers[2]
	cluster.Do(t, victim.PowerCut)
	if _, err := s.Kubectl(cluster.Within(t, minute), "delete", "node", victim.Name()); err != nil {
		t.Fatal(err)
	}
	gone(t, s, victim.Name())
	cluster.Do(t, victim.Restart, c.WaitReady)
}

// TestLeave: a server and an agent leave by themselves, clean up, and join again as new machines.
func TestLeave(t *testing.T) {
	c := shared.Cluster(t)
	s := c.Servers[0]
	for _, n := range []*cluster.Node{c.Servers[2].Node, c.Agents[0]} {
		t.Run(string(n.Role), func(t *testing.T) {
			out, err := n.Exec(cluster.Within(t, 2*minute), cluster.Program, "leave")
			if err != nil {
				t.Fatal(err)
			}
			t.Log(out)
			gone(t, s, n.Name())
			if err := n.Process().Wait(cluster.Within(t, minute)); err != nil {
				t.Error(err)
			}
			if left := traces(t, n); strings.Contains(left, "/pki/") || strings.Contains(left, "/etcd/") || strings.Contains(left, "kubeconfig") {
				t.Errorf("it has left behind:\n%s", left)
			}
			if out, err := n.Exec(cluster.Within(t, minute), "pgrep", "-af", "kedge|containerd-shim"); err == nil {
				t.Errorf("processes after leaving: %s", out)
			}
			join(t, c, n)
		})
	}
	cluster.Do(t, c.WaitReady)
	pods(t, c, c.Servers[2].Node, c.Agents[0])
}

// TestStuckLearner: a machine joins as a server whose datastore port nobody reaches, and then hangs. Half a minute later the next
// server can join. When the machine is well again, it joins by itself.
func TestStuckLearner(t *testing.T) {
	c := shared.Cluster(t)
	s, next, stuck := c.Servers[0], c.Servers[2], visitor(t, c)
	t.Log(remove(t, s, next.Name()))
	gone(t, s, next.Name())
	cluster.Do(t, next.Process().Wait, stuck.Shield)

	stuck.Role = cluster.ServerRole
	stuck.JoinThrough(s.URL(), token(t, s, stuck.Role))
	cluster.Do(t, stuck.Run)
	begin := time.Now()
	if err := stuck.WaitLog(cluster.Within(t, minute), "is its port open for the other servers?"); err != nil {
		t.Error(err)
	}
	cluster.Do(t, stuck.Freeze)
	next.JoinThrough(s.URL(), token(t, s, next.Role))
	cluster.Do(t, next.Run)
	if err := next.WaitLog(cluster.Within(t, minute), "servers join one after the other"); err != nil {
		t.Error(err)
	}
	cluster.Eventually(t, "the next server to vote in the place of the stuck one", func(ctx context.Context) error {
		return s.Voters(ctx, s.Name(), c.Servers[1].Name(), next.Name())
	})
	took := time.Since(begin)
	t.Logf("the next server votes %s after the one that got stuck was started", took.Round(time.Second))
	if took < 30*time.Second {
		t.Error("the stuck one was given less than 30 s")
	}

	begin = time.Now()
	cluster.Do(t, c.Bed.Heal, stuck.Thaw, c.WaitReady)
	t.Logf("the stuck one votes %s after it is well again", time.Since(begin).Round(time.Second))
	dismiss(t, s, stuck)
	stuck.Role = cluster.AgentRole
}

// pods starts one on each of some nodes, and asks it.
func pods(t *testing.T, c *cluster.Cluster, nodes ...*cluster.Node) {
	t.Helper()
	s := c.Servers[0].Session(t)
	for _, n := range nodes {
		s.Apply(cluster.ServerPod, n.Name(), "", "  nodeName: "+n.Name())
	}
	for _, n := range nodes {
		s.Ready(n.Name())
		ip := s.Kubectl("get", "pod", n.Name(), "-o", "jsonpath={.status.podIP}")
		for _, from := range c.Nodes() {
			if from.Process() == nil {
				continue
			}
			s.Eventually(fmt.Sprintf("an answer from a pod on %s to %s", n.Name(), from.Name()), func() error {
				out, err := from.Exec(s.Within(10*time.Second), "curl", "-sS", "-m", "3", "http://"+ip+":8080/")
				if err == nil && !strings.HasPrefix(out, n.Name()+" ") {
					err = errors.New(out)
				}
				return err
			})
		}
	}
}
