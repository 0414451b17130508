// SPDX-License-Identifier: Apache-2.0

package ha

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// TestLoadBalancers: every node knows all servers and finds them healthy.
func TestLoadBalancers(t *testing.T) {
	c := shared.Cluster(t)
	for _, n := range c.Nodes() {
		err := testbed.Wait(cluster.Within(t, 20*time.Second), "the load balancer of "+n.Name(), func(ctx context.Context) error { return knows(ctx, n, c.Servers...) })
		if err != nil {
			t.Error(err)
		}
	}
}

// used is the server that a node's load balancer uses.
func used(t *testing.T, c *cluster.Cluster, n *cluster.Node) *cluster.Server {
	t.Helper()
	servers := status(t, n).APIServers
	for _, a := range servers {
		for _, s := range c.Servers {
			if a.Active && (a.Local && s.Node == n || a.Address == s.IP()+":6443") {
				return s
			}
		}
	}
	t.Fatalf("%s uses no server: %+v", n.Name(), servers)
	return nil
}

// knows checks that a node's load balancer has these servers, all healthy, each once, and besides at most the address through
// which the node has joined, its last resort.
func knows(ctx context.Context, n *cluster.Node, servers ...*cluster.Server) error {
	st, err := n.Status(ctx)
	if err != nil {
		return err
	}
	if st.Role != n.Role {
		return testbed.GiveUp(fmt.Errorf("it says to be a %q", st.Role))
	}
	var errs []error
	for _, s := range servers {
		found := false
		for _, a := range st.APIServers {
			if a.Address != s.IP()+":6443" && !(s.Node == n && a.Local) {
				continue
			}
			found = true
			if !a.Healthy || a.Local != (s.Node == n) {
				errs = append(errs, fmt.Errorf("%+v", a))
			}
		}
		if !found {
			errs = append(errs, fmt.Errorf("it does not know %s at %s", s.Name(), s.IP()))
		}
	}
	others := slices.DeleteFunc(slices.Clone(st.APIServers), func(a cluster.APIServer) bool {
		return !a.Healthy && !a.Active && slices.Contains(n.JoinFlags, "https://"+a.Address)
	})
	if len(others) != len(servers) {
		errs = append(errs, fmt.Errorf("%d servers instead of %d: %+v", len(others), len(servers), others))
	}
	return errors.Join(errs...)
}

// TestPowerLoss: whichever server loses its power, writers go on within seconds, and nothing they were promised is lost.
func TestPowerLoss(t *testing.T) {
	c := shared.Cluster(t)
	for _, victim := range c.Servers {
		t.Run(victim.Name(), func(t *testing.T) {
			l := startLoad(t, c)
			what := "power loss of " + describe(t, c, victim)
			event := time.Now()
			cluster.Do(t, victim.PowerCut)
			l.acknowledged(time.Now(), 100)
			l.outage(what, event, failOver)
			event = time.Now()
			cluster.Do(t, victim.Restart, c.WaitServing)
			t.Logf("all there %s after the power is back", time.Since(event).Round(100*time.Millisecond))
			l.outage("its return", event, failOver)
			l.finish()
		})
	}
}

// describe tells what would be lost with a server.
func describe(t *testing.T, c *cluster.Cluster, s *cluster.Server) string {
	t.Helper()
	text := s.Name()
	if leads, err := s.LeadsDatastore(cluster.Within(t, minute)); err != nil {
		t.Error(err)
	} else if leads {
		text += ", leader of the datastore"
	}
	if leaseHolder(t, otherThan(c, s)) == s.Name() {
		text += ", holder of the lease"
	}
	if used(t, c, c.Agents[0]) == s {
		text += ", used by " + c.Agents[0].Name()
	}
	return text
}

// leaseHolder is the name of the server that runs the controllers.
func leaseHolder(t *testing.T, s *cluster.Server) string {
	t.Helper()
	identity, err := s.Kubectl(cluster.Within(t, minute), "-n", "kube-system", "get", "lease", "kedge", "-o", "jsonpath={.spec.holderIdentity}")
	if err != nil {
		t.Fatal(err)
	}
	name, _, _ := strings.Cut(identity, "_") // what follows is the process's
	return name
}

// TestIsolation: the server with the controllers is cut off. Writers go on, another server takes the controllers over, nothing
// on the lonely server exits, and it comes back when the network does.
func TestIsolation(t *testing.T) {
	c := shared.Cluster(t)
	holder := leaseHolder(t, c.Servers[0])
	i := slices.IndexFunc(c.Servers, func(s *cluster.Server) bool { return s.Name() == holder })
	if i < 0 {
		t.Fatalf("the lease is held by %q, which is no server", holder)
	}
	victim := c.Servers[i]
	l := startLoad(t, c)
	s := otherThan(c, victim).Session(t)
	unchanged := processes(t, c.Nodes()...)
	what := "isolation of " + describe(t, c, victim)
	s.Kubectl("cordon", victim.Name()) // whoever takes over believes for 40 s that the node is well
	defer s.Kubectl("uncordon", victim.Name())
	event := time.Now()
	cluster.Do(t, victim.Isolate)
	l.acknowledged(time.Now(), 100)
	l.outage(what, event, moveOn)
	s.Kubectl("create", "deployment", "web", "--image=kedge.test/server:1")
	s.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	t.Logf("%s: controllers work again after %s", what, time.Since(event).Round(time.Second))
	event = time.Now()
	cluster.Do(t, victim.Join, c.WaitReady)
	l.outage("its return", event, failOver)
	unchanged()
	l.finish()
}

// TestPartition: two servers, one of them the leader, do not reach each other, but the third. Who used the other one moves on.
func TestPartition(t *testing.T) {
	c := shared.Cluster(t)
	one := leader(t, c)
	i := slices.IndexFunc(c.Nodes(), func(n *cluster.Node) bool { return used(t, c, n) != one })
	if i < 0 {
		t.Fatalf("all nodes use %s", one.Name())
	}
	user := c.Nodes()[i]
	other := used(t, c, user)
	l := startLoadOn(t, c, user)
	unchanged := processes(t, c.Nodes()...)
	what := fmt.Sprintf("partition between %s and %s, which %s uses", describe(t, c, one), describe(t, c, other), user.Name())
	event := time.Now()
	cluster.Do(t, func(ctx context.Context) error { return c.Bed.Partition(ctx, one.Machine, other.Machine) })
	l.acknowledged(event.Add(10*time.Second), 100)
	l.outage(what, event, moveOn)
	// Both sides stay usable: through their own load balancer they reach a server that has a leader.
	for _, s := range c.Servers {
		if out, err := s.Exec(cluster.Within(t, minute), cluster.Program, "kubectl", "--server", "https://127.0.0.1:6444", "--request-timeout=5s", "get", "--raw", "/readyz"); err != nil {
			t.Errorf("from %s: %s, %v", s.Name(), out, err)
		}
	}
	event = time.Now()
	cluster.Do(t, c.Bed.Heal, c.WaitReady)
	l.outage("its end", event, failOver)
	unchanged()
	l.finish()
}

// TestFrozenLeader: the leader hangs, others take over, and when it runs on it knows that it is no leader any more: nobody reads
// old data from it.
func TestFrozenLeader(t *testing.T) {
	c := shared.Cluster(t)
	victim := leader(t, c)
	l := startLoad(t, c)
	reader := l.readBeside(c, victim)
	unchanged := processes(t, c.Nodes()...)
	what := "freeze of " + describe(t, c, victim)
	event := time.Now()
	cluster.Do(t, victim.Freeze)
	l.acknowledged(event.Add(10*time.Second), 50)
	l.outage(what, event, moveOn)
	event = time.Now()
	cluster.Do(t, victim.Thaw, c.WaitReady)
	l.outage("its return", event, failOver)
	unchanged()
	l.finish(reader)
}

// TestRollingRestart: all servers are restarted one after the other, as for an update, and clients only have to repeat a request.
func TestRollingRestart(t *testing.T) {
	c := shared.Cluster(t)
	l := startLoad(t, c)
	for _, s := range c.Servers {
		what := "restart of " + describe(t, c, s)
		event := time.Now()
		cluster.Do(t, s.Stop)
		stopped := time.Since(event)
		cluster.Do(t, s.Run, c.WaitReady)
		t.Logf("%s: stopped in %s, all ready after %s", what, stopped.Round(100*time.Millisecond), time.Since(event).Round(100*time.Millisecond))
		l.outage(what, event, failOver)
	}
	h := l.finish()
	slowest := h.Slowest()
	t.Logf("the slowest write: %+v", slowest)
	if slowest.Took > failOver {
		t.Errorf("a write took %s and %d attempts", slowest.Took, slowest.Attempts)
	}
	if bad := refused(h); len(bad) > 0 {
		t.Errorf("requests failed that no retry cures: %v", bad)
	}
}
