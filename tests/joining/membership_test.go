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
	nodes, err := c.Servers[2].Nodes(within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range c.Nodes() {
		var roles []string
		for label := range nodes[n.Name()].Labels {
			if role, ok := strings.CutPrefix(label, "node-role.kubernetes.io/"); ok {
				roles = append(roles, role)
			}
		}
		slices.Sort(roles)
		want := "[worker]"
		if n.Role == cluster.ServerRole {
			want = "[control-plane etcd]"
		}
		if got := fmt.Sprint(roles); got != want {
			t.Errorf("%s has the roles %s, want %s", n.Name(), got, want)
		}
	}
}

// remove runs kedge node remove on a server.
func remove(t *testing.T, s *cluster.Server, args ...string) string {
	t.Helper()
	out, err := s.Exec(within(t, 2*minute), append([]string{cluster.Program, "node", "remove"}, args...)...)
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
	if err := s.Voters(within(t, minute), s.Name(), c.Servers[1].Name()); err != nil {
		t.Error(err)
	}
	if err := victim.WaitLog(within(t, minute), "removed"); err != nil {
		t.Error(err)
	}
	session.Kubectl("rollout", "status", "deployment/web", "--timeout=55s") // on the others
	if running, err := victim.Process().Running(within(t, minute)); err != nil {
		t.Fatal(err)
	} else if running {
		do(t, victim.Stop)
	}

	token := victim.JoinFlags[slices.Index(victim.JoinFlags, "--token")+1]
	if _, err := s.Exec(within(t, minute), cluster.Program, "token", "delete", token); err != nil {
		t.Fatal(err)
	}
	before, said := belongings(t, s), logOf(t, victim.Node)
	do(t, victim.Run)
	eventually(t, "the removed server to say what it needs", func(context.Context) error {
		if text := strings.TrimPrefix(logOf(t, victim.Node), said); !strings.Contains(text, "kedge token create") {
			return fmt.Errorf("it says: %s", text)
		}
		return nil
	})
	if got := belongings(t, s); got != before {
		t.Errorf("the cluster has now:\n%s\nbefore:\n%s", got, before)
	}
	if running, err := victim.Process().Running(within(t, minute)); err != nil {
		t.Fatal(err)
	} else if running {
		do(t, victim.Stop)
	}
	join(t, c, victim.Node)
	waitReady(t, c)
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
	out, err := s.Shell(within(t, minute), "cd /var/lib/kedge && find . -path '*member/wal' -not -path './etcd/member/*'")
	if err != nil || out == "" {
		t.Errorf("the old data of %s was not kept: %v", s.Name(), err)
	}
}

// TestReimage: a server and an agent lose their disks and join under their old names.
func TestReimage(t *testing.T) {
	c := shared.Cluster(t)
	server, agent := c.Servers[2], c.Agents[0]
	before, err := c.Servers[0].Members(within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []*cluster.Node{server.Node, agent} {
		if err := n.Reimage(within(t, minute)); err != nil {
			t.Fatal(err)
		}
		n.JoinThrough(c.Servers[0].URL(), token(t, c.Servers[0], n.Role))
		do(t, n.Run)
	}
	eventually(t, "the new server to vote in the place of the old one", func(ctx context.Context) error {
		members, err := c.Servers[0].Members(ctx)
		if err == nil && (members[server.Name()].ID == before[server.Name()].ID || members[server.Name()].Learner || len(members) != 3) {
			err = fmt.Errorf("members: %+v", members)
		}
		return err
	})
	waitReady(t, c)
	pods(t, c, server.Node, agent)
}

// TestDeletedNode: a dead server's Node is deleted, and its member with it. When it comes back it joins with its ordinary command.
func TestDeletedNode(t *testing.T) {
	c := shared.Cluster(t)
	s, victim := c.Servers[0], c.Servers[2]
	do(t, victim.PowerCut)
	if _, err := s.Kubectl(within(t, minute), "delete", "node", victim.Name()); err != nil {
		t.Fatal(err)
	}
	gone(t, s, victim.Name())
	do(t, victim.Restart)
	waitReady(t, c)
}

// TestLeave: a server and an agent leave by themselves, clean up, and join again as new machines.
func TestLeave(t *testing.T) {
	c := shared.Cluster(t)
	s := c.Servers[0]
	for _, n := range []*cluster.Node{c.Servers[2].Node, c.Agents[0]} {
		t.Run(string(n.Role), func(t *testing.T) {
			out, err := n.Exec(within(t, 2*minute), cluster.Program, "leave")
			if err != nil {
				t.Fatal(err)
			}
			t.Log(out)
			gone(t, s, n.Name())
			if err := n.Process().Wait(within(t, minute)); err != nil {
				t.Error(err)
			}
			if left := traces(t, n); strings.Contains(left, "/pki/") || strings.Contains(left, "/etcd/") || strings.Contains(left, "kubeconfig") {
				t.Errorf("it has left behind:\n%s", left)
			}
			if out, err := n.Exec(within(t, minute), "pgrep", "-af", "kedge|containerd-shim"); err == nil {
				t.Errorf("processes after leaving: %s", out)
			}
			join(t, c, n)
		})
	}
	waitReady(t, c)
	pods(t, c, c.Servers[2].Node, c.Agents[0])
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
