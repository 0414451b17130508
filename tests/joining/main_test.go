// SPDX-License-Identifier: Apache-2.0

// Package joining tests how machines become members of a cluster, and how they stop being ones: tokens, joins, refusals,
// removals, and what a machine that comes back hears.
package joining

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

var shared = cluster.SharedCluster{Name: "joining", Spec: cluster.Spec{Servers: 3, Agents: 1}} //policy:allow variable one cluster for the package

func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }

const minute = time.Minute

func token(t *testing.T, s *cluster.Server, role cluster.Role, args ...string) string {
	t.Helper()
	text, err := s.Token(cluster.Within(t, minute), role, args...)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// join lets a machine join that has been a node before, or not.
func join(t *testing.T, c *cluster.Cluster, n *cluster.Node) {
	t.Helper()
	s := c.Servers[0]
	if err := c.Join(cluster.Within(t, minute), n, s, token(t, s, n.Role)); err != nil {
		t.Fatal(err)
	}
	t.Logf("%s joined within %s", n.Name(), c.Took[n.Name()].Round(100*time.Millisecond))
}

// gone waits until a server has neither the node nor its member.
func gone(t *testing.T, s *cluster.Server, name string) {
	t.Helper()
	cluster.Eventually(t, fmt.Sprintf("%s to be out of the cluster, says %s", name, s.Name()), func(ctx context.Context) error {
		nodes, err := s.Nodes(ctx)
		if err != nil {
			return err
		}
		members, err := s.Members(ctx)
		if err != nil {
			return err
		}
		var errs []error
		if _, ok := nodes[name]; ok {
			errs = append(errs, errors.New("the Node is there"))
		}
		if m, ok := members[name]; ok {
			errs = append(errs, fmt.Errorf("the member is there: %+v", m))
		}
		return errors.Join(errs...)
	})
}

// belongings is all that a server knows about who belongs to the cluster.
func belongings(t *testing.T, s *cluster.Server) string {
	t.Helper()
	nodes, err := s.Nodes(cluster.Within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	members, err := s.Members(cluster.Within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	registered, err := s.Kubectl(cluster.Within(t, minute), "-n", "kube-system", "get", "configmap", "kedge-servers", "-o", "jsonpath={.data}")
	if err != nil {
		t.Fatal(err)
	}
	var uids []string
	for _, name := range slices.Sorted(maps.Keys(nodes)) {
		uids = append(uids, name+"="+nodes[name].UID)
	}
	return fmt.Sprintf("nodes %s\nmembers %+v\nservers %s", strings.Join(uids, " "), members, registered)
}

// traces are the files by which a machine would take itself for a member of a cluster.
func traces(t *testing.T, n *cluster.Node) string {
	t.Helper()
	out, err := n.Shell(cluster.Within(t, minute), "find /var/lib/kedge /etc/kedge /var/lib/kubelet -type f -not -path '*/images/*' -not -path '*/bin/*' 2>/dev/null | sort")
	if err != nil && out != "" {
		t.Fatal(err)
	}
	return out
}
