// SPDX-License-Identifier: Apache-2.0

package upgrade

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

// testAll upgrades three servers and two agents with one command, which fails, waits, is interrupted and killed, and goes on. Two of them
// go back.
func testAll(t *testing.T, r *releases) {
	bed := testbed.New(t)
	first := r.machine(t, bed, "s1", "server")
	machines := []*cluster.Server{first}
	names := []string{"s1", "s2", "s3", "a1", "a2"}
	for _, name := range names[1:] {
		role := cluster.ServerRole
		if name[0] == 'a' {
			role = cluster.AgentRole
		}
		token, err := first.Token(cluster.Within(t, minute), role)
		if err != nil {
			t.Fatal(err)
		}
		machines = append(machines, r.machine(t, bed, name, string(role), "--server", first.URL(), "--token", token))
	}
	whole := func(ctx context.Context) error {
		errs := []error{first.Voters(ctx, "s1", "s2", "s3"), first.NodesReady(ctx, names...)}
		for _, m := range machines { // which may take a moment longer to know of themselves that they are ready
			_, err := m.Exec(ctx, cluster.Program, "status")
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}
	cluster.Eventually(t, "three voters and five nodes, which say that they are ready", whole)

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
	if got, err := phases(cluster.Within(t, minute)); err != nil || got != "failed: s2 failed s3 waiting s1 waiting a1 waiting a2 waiting" {
		t.Errorf("%q, %v", got, err)
	}

	// The window is not open; whoever waits for it is interrupted, and another one finds it open after a while.
	cluster.Eventually(t, "the machine that failed to be well again", whole)
	window := windowSoon(t, first)
	start := func() *testbed.Process {
		t.Helper()
		p, err := first.Spawn(cluster.Within(t, minute), "/var/log/upgrade.log", cluster.Program, "upgrade", "--all", "--window", window.text, "--from", r.good)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := start()
	cluster.Eventually(t, "the window to be waited for", func(ctx context.Context) error {
		got, err := phases(ctx)
		if err == nil && got != "waiting: s2 waiting s3 waiting s1 waiting a1 waiting a2 waiting" {
			err = fmt.Errorf("the phases are: %s", got)
		}
		return err
	})
	if err := errors.Join(p.Signal(cluster.Within(t, minute), "INT"), p.Wait(cluster.Within(t, minute))); err != nil {
		t.Fatal(err)
	}
	if out, err := first.Shell(t.Context(), "cat /var/log/upgrade.log; kedge upgrade --status"); err != nil ||
		!strings.Contains(out, "waiting for the time window "+window.text+", until ") || !strings.Contains(out, ", failed: interrupt") {
		t.Errorf("%v: %s", err, out)
	}
	p = start()
	cluster.EventuallyWithin(t, 4*minute, "the window to open, and the second server to begin", func(ctx context.Context) error {
		got, err := phases(ctx)
		if err == nil && !strings.Contains(got, "s2 done s3 running") {
			err = fmt.Errorf("the phases are: %s", got)
		}
		return err
	})
	if err := p.Signal(cluster.Within(t, minute), "KILL"); err != nil {
		t.Fatal(err)
	}
	if st, err := stateOf(cluster.Within(t, minute), first); err != nil || st.Cluster.Nodes[0].Began.Before(window.opens) {
		t.Errorf("%v: the window opens at %s: %+v", err, window.opens, st)
	}
	if out, err := upgrade(t, first, "--all", "--from", r.good); err == nil || !strings.Contains(out, "is under way, by s1") {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := upgrade(t, first, "--all", "--drain", "--force", "--parallel", "2", "--from", r.good); err != nil || !strings.Contains(out, "s2: has "+r.new+" already") {
		t.Fatalf("%v: %s", err, out)
	}
	for _, m := range machines {
		runs(t, m, r.new)
	}
	if got, err := phases(cluster.Within(t, minute)); err != nil || !strings.HasPrefix(got, "done: s2 done s3 done s1 done a1 done a2 done") {
		t.Errorf("%q, %v", got, err)
	}
	if st, err := stateOf(cluster.Within(t, minute), first); err != nil || !st.Cluster.Nodes[4].Began.Before(st.Cluster.Nodes[3].Ended) {
		t.Errorf("%v: the agents were not upgraded at the same time: %+v", err, st)
	}
	cluster.Eventually(t, "all to be as before, with another version", func(ctx context.Context) error {
		out, err := first.Kubectl(ctx, "get", "nodes", "-o", `jsonpath={range .items[*]}{.status.nodeInfo.kubeletVersion} {.spec.unschedulable}{"\n"}{end}`)
		if want := strings.Repeat(r.new+" \n", 5); err == nil && out != want {
			err = fmt.Errorf("nodes: %q", out)
		}
		return errors.Join(err, whole(ctx))
	})

	// The way back: agents first. Done twice, it is not the way forward.
	back := []string{"--all", "--rollback", "--skip", "s2", "--skip", "s3", "--skip", "a2"}
	if out, err := upgrade(t, first, back...); err != nil || strings.Index(out, "a1: has "+r.old) > strings.Index(out, "s1: datastore saved") {
		t.Errorf("%v: %s", err, out)
	}
	if got, err := phases(cluster.Within(t, minute)); err != nil || got != "done: a1 done s1 done" {
		t.Errorf("%q, %v", got, err)
	}
	if out, err := upgrade(t, first, back...); err != nil || !strings.Contains(out, "a1: has "+r.old+" already") || !strings.Contains(out, "all machines have "+r.old) {
		t.Errorf("%v: %s", err, out)
	}
	for i, m := range machines {
		runs(t, m, []string{r.old, r.new, r.new, r.old, r.new}[i])
	}
}

// window is one that opens soon.
type window struct {
	text  string
	opens time.Time
}

// windowSoon opens with a minute of the machine's clock, in time for everything that has to happen before.
func windowSoon(t *testing.T, s *cluster.Server) window {
	t.Helper()
	out, err := s.Exec(cluster.Within(t, minute), "date", "+%FT%T%:z")
	if err != nil {
		t.Fatal(err)
	}
	now, err := time.Parse(time.RFC3339, strings.TrimSpace(out))
	if err != nil {
		t.Fatal(err)
	}
	opens := now.Add(20 * time.Second).Truncate(minute).Add(minute)
	return window{opens.Format("15:04") + "-" + opens.Add(2*time.Hour).Format("15:04"), opens}
}
