// SPDX-License-Identifier: Apache-2.0

package joining

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

// TestParts: servers with a part only, beside a whole one. Nodes, members and processes are what they should be, kubectl works on
// all of them, and each comes back after a restart.
func TestParts(t *testing.T) {
	t.Parallel()
	c := cluster.ForTest(t, cluster.Spec{Servers: 4})
	for i, part := range []string{"--disable-etcd", "--disable-control-plane", "--disable-agent"} {
		c.Servers[i+1].Flags = []string{part}
	}
	cluster.Do(t, c.Start)
	t.Logf("from start to Ready, and for members to vote: %v", c.Took)
	nodes, err := c.Servers[2].Nodes(cluster.Within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct{ roles, processes string }{
		{"[control-plane etcd]", "[containerd controlplane etcd node]"},
		{"[control-plane]", "[containerd controlplane node]"},
		{"[etcd]", "[containerd etcd node]"},
		{"[]", "[controlplane etcd]"},
	} {
		s := c.Servers[i]
		if got := roles(nodes[s.Name()]); got != want.roles {
			t.Errorf("%s has the roles %s, want %s", s.Name(), got, want.roles)
		}
		st, err := s.Status(cluster.Within(t, minute))
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(slices.Sorted(maps.Keys(st.PIDs()))); got != want.processes {
			t.Errorf("%s runs %s, want %s", s.Name(), got, want.processes)
		}
	}
	if n, ok := nodes[c.Servers[3].Name()]; ok {
		t.Errorf("the server without a kubelet has a Node: %+v", n)
	}
	s := c.Servers[0].Session(t)
	whole := c.Nodes()[:3] // with a kubelet
	podsOn(s, whole)
	for _, server := range c.Servers {
		begin := time.Now()
		cluster.Do(t, server.Stop, server.Run, c.WaitReady)
		t.Logf("restart of %s %v: all ready after %s", server.Name(), server.Flags, time.Since(begin).Round(100*time.Millisecond))
	}
	reach(t, s.NS, whole, c.Servers...)
}
