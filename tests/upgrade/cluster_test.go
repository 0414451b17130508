// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// testAll upgrades three servers and an agent with one command, which fails, is killed, and goes on.
func testAll(t *testing.T, r *releases) {
	bed := testbed.New(t)
	first := r.machine(t, bed, "s1", "server")
	machines := []*cluster.Server{first}
	for _, name := range []string{"s2", "s3", "a1"} {
		role := cluster.ServerRole
		if name == "a1" {
			role = cluster.AgentRole
		}
		token, err := first.Token(cluster.Within(t, minute), role)
		if err != nil {
			t.Fatal(err)
		}
		machines = append(machines, r.machine(t, bed, name, string(role), "--server", first.URL(), "--token", token))
	}
	cluster.Eventually(t, "three voters and four nodes", func(ctx context.Context) error {
		return errors.Join(first.Voters(ctx, "s1", "s2", "s3"), first.NodesReady(ctx, "s1", "s2", "s3", "a1"))
	})

	// One machine does not trust the release: nothing begins.
	last := machines[3]
	if _, err := last.Exec(t.Context(), "mv", "/etc/kedge/release.pub", "/etc/kedge/aside.pub"); err != nil {
		t.Fatal(err)
	}
	if out, err := upgrade(t, first, "--all", "--from", r.good); err == nil || !strings.Contains(out, "nothing was changed: a1: the release is not trusted") {
		t.Errorf("%v: %s", err, out)
	}
	if _, err := last.Exec(t.Context(), "mv", "/etc/kedge/aside.pub", "/etc/kedge/release.pub"); err != nil {
		t.Fatal(err)
	}

	// The first machine fails: the others are left alone.
	if out, err := upgrade(t, first, "--all", "--timeout", "1s", "--from", r.good); err == nil || !strings.Contains(out, "s2: upgrade from "+r.old) {
		t.Errorf("%v: %s", err, out)
	}
	for _, m := range machines {
		runs(t, m, r.old)
	}
	phases := func(ctx context.Context) (string, error) {
		st, err := stateOf(ctx, first)
		if err != nil || st.Cluster == nil {
			return "", errors.Join(err, errors.New("there is no state of the cluster"))
		}
		list := []string{st.Cluster.Phase + ":"}
		for _, n := range st.Cluster.Nodes {
			list = append(list, n.Name+" "+n.Phase)
		}
		return strings.Join(list, " "), nil
	}
	if got, err := phases(cluster.Within(t, minute)); err != nil || got != "failed: s2 failed s3 waiting s1 waiting a1 waiting" {
		t.Errorf("%q, %v", got, err)
	}

	// Whoever upgrades goes away in the middle of it.
	p, err := first.Spawn(cluster.Within(t, minute), "/var/log/upgrade.log", cluster.Program, "upgrade", "--all", "--from", r.good)
	if err != nil {
		t.Fatal(err)
	}
	cluster.Eventually(t, "the second server to begin", func(ctx context.Context) error {
		got, err := phases(ctx)
		if err == nil && !strings.Contains(got, "s2 done s3 running") {
			err = fmt.Errorf("the phases are: %s", got)
		}
		return err
	})
	if err := p.Signal(cluster.Within(t, minute), "KILL"); err != nil {
		t.Fatal(err)
	}
	if out, err := upgrade(t, first, "--all", "--from", r.good); err == nil || !strings.Contains(out, "is under way, by s1") {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := upgrade(t, first, "--all", "--drain", "--force", "--from", r.good); err != nil || !strings.Contains(out, "s2: has "+r.new+" already") {
		t.Fatalf("%v: %s", err, out)
	}
	for _, m := range machines {
		runs(t, m, r.new)
	}
	if got, err := phases(cluster.Within(t, minute)); err != nil || !strings.HasPrefix(got, "done: s2 done s3 done s1 done a1 done") {
		t.Errorf("%q, %v", got, err)
	}
	cluster.Eventually(t, "all to be as before, with another version", func(ctx context.Context) error {
		out, err := first.Kubectl(ctx, "get", "nodes", "-o", `jsonpath={range .items[*]}{.status.nodeInfo.kubeletVersion} {.spec.unschedulable}{"\n"}{end}`)
		if want := strings.Repeat(r.new+" \n", 4); err == nil && out != want {
			err = fmt.Errorf("nodes: %q", out)
		}
		return errors.Join(err, first.Voters(ctx, "s1", "s2", "s3"), first.NodesReady(ctx, "s1", "s2", "s3", "a1"))
	})
}
