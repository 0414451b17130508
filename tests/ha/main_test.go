// SPDX-License-Identifier: Apache-2.0

// Package ha tests that a cluster of three servers and an agent carries on, and loses nothing, whichever server dies, hangs,
// moves or is cut off; and that nodes carry on without any server.
package ha

import (
	"os"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

var shared = cluster.SharedCluster{Name: "ha", Spec: cluster.Spec{Servers: 3, Agents: 1}} //policy:allow variable one cluster for the package

func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }

const (
	minute = time.Minute

	// failOver is how long writers may be without the store when a server loses its power.
	failOver = 3 * time.Second
	// moveOn is the same when a server answers but has lost its datastore, which takes longer to be sure of: 4 to 5.5 s have been seen
	// here. It has to be well below the stalls that the tests make.
	moveOn = 10 * time.Second
)

// leader is the server whose member leads the datastore.
func leader(t *testing.T, c *cluster.Cluster) *cluster.Server {
	t.Helper()
	s, err := c.Leader(cluster.Within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func otherThan(c *cluster.Cluster, s *cluster.Server) *cluster.Server {
	for _, o := range c.Servers {
		if o != s {
			return o
		}
	}
	return nil
}

// status asks a node that has to answer.
func status(t *testing.T, n *cluster.Node) *cluster.Status {
	t.Helper()
	st, err := n.Status(cluster.Within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// processes remembers the process IDs on some nodes, and tells later whether they are still the same.
func processes(t *testing.T, nodes ...*cluster.Node) (unchanged func()) {
	t.Helper()
	before := make([]map[string]int, len(nodes))
	for i, n := range nodes {
		before[i] = status(t, n).PIDs()
	}
	return func() {
		t.Helper()
		for i, n := range nodes {
			if running, err := n.Process().Running(cluster.Within(t, minute)); !running || err != nil {
				t.Errorf("kedge of %s: running %t, %v", n.Name(), running, err)
				continue
			}
			for name, pid := range status(t, n).PIDs() {
				if pid != before[i][name] {
					t.Errorf("%s of %s has pid %d, had %d", name, n.Name(), pid, before[i][name])
				}
			}
		}
	}
}
