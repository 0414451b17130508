// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"testing"

	"github.com/kedge-io/kedge/tests/cluster"
)

// TestReplication: whichever server somebody writes a file on, all have it; a server that was off brings nothing back.
func TestReplication(t *testing.T) {
	c := shared.Cluster(t)
	s1, s2, s3 := c.Servers[0], c.Servers[1], c.Servers[2]
	one, two := configMap("spread", "1"), configMap("spread", "2")
	put(t, s2, "spread.yaml", one)
	for _, s := range c.Servers {
		contains(t, s, "spread.yaml", one)
	}
	put(t, s2, "doomed.yaml", configMap("doomed", "1"))
	put(t, s2, "edited.yaml", configMap("edited", "1"))
	for _, name := range []string{"spread.yaml", "doomed.yaml", "edited.yaml"} {
		becomes(t, s1, name, "applied")
		contains(t, s3, name, map[string]string{"spread.yaml": one, "doomed.yaml": configMap("doomed", "1"), "edited.yaml": configMap("edited", "1")}[name])
	}

	// While s3 is off one file is changed, one removed, and one changed on both sides.
	cluster.Do(t, s3.Stop)
	put(t, s1, "spread.yaml", two)
	remove(t, s1, "doomed.yaml")
	put(t, s1, "edited.yaml", configMap("edited", "2"))
	has(t, s1, "2", "configmap", "spread", "-o", value)
	has(t, s1, "", "configmap", "doomed")
	becomes(t, s1, "edited.yaml", "applied", revision(2))
	put(t, s3, "edited.yaml", configMap("edited", "3"))
	cluster.Do(t, s3.Restart)
	contains(t, s3, "spread.yaml", two)
	contains(t, s3, "doomed.yaml", "")
	contains(t, s3, "edited.yaml", configMap("edited", "2"))
	contains(t, s3, "edited.yaml.conflict", configMap("edited", "3"))
	has(t, s1, "", "configmap", "doomed")
	has(t, s1, "2", "configmap", "edited", "-o", value)
	cluster.Do(t, c.WaitReady)
	cluster.Eventually(t, "an event that tells of the conflict", func(ctx context.Context) error {
		out, err := s1.Kubectl(ctx, "-n", "kube-system", "get", "events", "--field-selector", "reason=Conflict", "-o", "jsonpath={.items[*].involvedObject.name}")
		if err == nil && out != "kedge-manifest-edited.yaml" {
			err = errText(out)
		}
		return err
	})

	// A server with an empty disk gets everything; one whose directory was taken away, too.
	if _, err := s2.Shell(cluster.Within(t, minute), "rm -rf "+dir); err != nil {
		t.Fatal(err)
	}
	contains(t, s2, "spread.yaml", two)
	has(t, s1, "2", "configmap", "spread", "-o", value)

	// Another leader goes on, with what was written meanwhile.
	holder, err := s1.Kubectl(cluster.Within(t, minute), "-n", "kube-system", "get", "lease", "kedge", "-o", "jsonpath={.spec.holderIdentity}")
	if err != nil {
		t.Fatal(err)
	}
	var rest []*cluster.Server
	for _, s := range c.Servers {
		if s.Name() == holder {
			cluster.Do(t, s.Stop)
		} else {
			rest = append(rest, s)
		}
	}
	put(t, rest[0], "spread.yaml", one)
	remove(t, rest[1], "edited.yaml")
	has(t, rest[0], "1", "configmap", "spread", "-o", value)
	has(t, rest[1], "", "configmap", "edited")
}

type errText string

func (e errText) Error() string { return string(e) }
