// SPDX-License-Identifier: Apache-2.0

package snapshot

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

// TestSingleServer: save, look, damage, prune and restore on one machine; power losses in the middle of saving and of restoring.
func TestSingleServer(t *testing.T) {
	m := single(t, "--snapshot-schedule", "* * * * *", "--snapshot-retention", "2")
	m.mark("before")
	if out := m.snapshot("save", "--name", "good"); !strings.Contains(out, "verified") || !strings.Contains(out, "nobody has the recovery key") {
		t.Errorf("it says %s", out)
	}
	m.refuses("there is a snapshot", "save", "--name", "good")
	m.refuses("cannot be the name", "save", "--name", "../x")
	key := m.snapshot("recovery-key")
	if again := m.snapshot("recovery-key"); again != key || !strings.Contains(key, "AGE-SECRET-KEY-1") {
		t.Errorf("the recovery key is\n%s\nand then\n%s", key, again)
	}
	if out := m.snapshot("save", "--name", "later"); strings.Contains(out, "nobody has") {
		t.Errorf("it says %s", out)
	}
	after := m.mark("after")
	if out := m.kubectl("-n", "kube-system", "get", "configmap", "kedge-snapshots", "-o", "jsonpath={.data}"); !strings.Contains(out, `good`) || !strings.Contains(out, "later") {
		t.Errorf("the cluster knows of %s", out)
	}
	scheduled(t, m)
	powerLossWhileSaving(t, m)
	damage(t, m)

	m.refuses("another kedge is running", "restore", "good")
	if out := m.snapshot("restore", "--dry-run", "good"); !strings.Contains(out, "would be refused") || !strings.Contains(out, "the snapshot is intact") {
		t.Errorf("a dry run says %s", out)
	}
	cluster.Do(t, m.Stop)
	if out := m.snapshot("restore", "--dry-run", "good"); !strings.Contains(out, "nothing was changed") || m.files() != "etcd etcd.disk.json etcd.member.json pki" {
		t.Errorf("a dry run says %s and leaves %s", out, m.files())
	}
	m.refuses("damaged", "restore", "cut-off")
	if m.files() != "etcd etcd.disk.json etcd.member.json pki" {
		t.Errorf("what was refused leaves %s", m.files())
	}
	powerLossWhileRestoring(t, m)
	m.start()
	if got := m.marks("before", "after"); got != "before" {
		t.Errorf("after the restore there is %s", got)
	}
	if now := m.revision(m.kubectl("create", "configmap", "now", "-o", "jsonpath={.metadata.resourceVersion}")); now <= after {
		t.Errorf("revision %d after %d", now, after)
	}
	m.eventually(minute, "the restore to leave nothing but the former data", func() bool { return !strings.Contains(m.files(), "restore") })
	// What was kept is complete, and can be had back by hand.
	if _, err := m.Shell(cluster.Within(t, minute), "ls "+cluster.DataDir+"/etcd.stale-*/member/snap/db"); err != nil {
		t.Error(err)
	}
}

// scheduled waits for three snapshots by the schedule, of which two stay; what was saved by hand stays, too.
func scheduled(t *testing.T, m machine) {
	t.Helper()
	var seen []string
	m.eventually(4*minute, "three scheduled snapshots", func() bool {
		_, all := m.list()
		for _, e := range all {
			if e.Trigger == "scheduled" && !slices.Contains(seen, e.Name) {
				seen = append(seen, e.Name)
			}
		}
		return len(seen) >= 3
	})
	m.eventually(minute, "the oldest to be removed", func() bool {
		_, all := m.list()
		n := 0
		for _, e := range all {
			if e.Trigger == "scheduled" {
				n++
			}
		}
		return n == 2
	})
	if names, _ := m.list(); !slices.Contains(names, "good") || !slices.Contains(names, "later") || slices.Contains(names, seen[0]) {
		t.Errorf("there are %v", names)
	}
}

// powerLossWhileSaving: whenever it comes, there is no half a snapshot, and the next one cleans up.
func powerLossWhileSaving(t *testing.T, m machine) {
	t.Helper()
	for i := range 12 {
		name := fmt.Sprintf("cut-%d", i)
		line := fmt.Sprintf("%s snapshot save --name %s >/dev/null 2>&1 & p=$!; sleep 0.%03d; kill -9 $p; wait $p; true", cluster.Program, name, 20+15*i)
		if _, err := m.Shell(cluster.Within(t, minute), line); err != nil {
			t.Fatal(err)
		}
	}
	names, all := m.list()
	survived := 0
	for _, e := range all {
		if e.Problem != "" {
			t.Errorf("%s: %s", e.Name, e.Problem)
		}
		if strings.HasPrefix(e.Name, "cut-") {
			survived++
			m.snapshot("inspect", e.Name)
			m.snapshot("delete", e.Name)
		}
	}
	t.Logf("%d of 12 snapshots were complete before the end; all: %v", survived, names)
	m.snapshot("save", "--name", "calm")
	m.snapshot("delete", "calm")
	if out, err := m.Shell(cluster.Within(t, minute), "ls -A "+dir+" | grep tmp; true"); err != nil || out != "" {
		t.Errorf("left are %s, %v", out, err)
	}
}

// damage: snapshots that are not as they were written are told, and never displace a good one.
func damage(t *testing.T, m machine) {
	t.Helper()
	line := "cd " + dir + "; head -c 20000 good.kedge >cut-off.kedge; for i in 1 2 3; do head -c 20000 $(ls scheduled-*.kedge | tail -1) >scheduled-broken-$i.kedge; done; touch scheduled-broken-*.kedge"
	if _, err := m.Shell(cluster.Within(t, minute), line); err != nil {
		t.Fatal(err)
	}
	m.refuses("the snapshot is damaged", "inspect", "cut-off")
	out := m.snapshot("prune")
	if !strings.Contains(out, "does not count") {
		t.Errorf("pruning says %s", out)
	}
	names, all := m.list()
	whole := 0
	for _, e := range all {
		if e.Trigger == "scheduled" && !strings.HasPrefix(e.Name, "scheduled-broken") {
			whole++
		}
	}
	if whole < 2 {
		t.Errorf("of the good ones %d are left: %v", whole, names)
	}
	if _, err := m.Shell(cluster.Within(t, minute), "rm "+dir+"scheduled-broken-*"); err != nil {
		t.Fatal(err)
	}
}

// powerLossWhileRestoring: whenever it comes, the data are the former or the restored ones, and the command can be given again.
func powerLossWhileRestoring(t *testing.T, m machine) {
	t.Helper()
	begin := time.Now()
	var states []string
	for i := range 15 {
		line := fmt.Sprintf("%s snapshot restore good >/dev/null 2>&1 & p=$!; sleep 0.%03d; kill -9 $p; wait $p; true", cluster.Program, 20+25*i)
		if _, err := m.Shell(cluster.Within(t, minute), line); err != nil {
			t.Fatal(err)
		}
		files := m.files()
		states = append(states, files)
		if !slices.Contains(strings.Fields(files), "etcd") && !strings.Contains(files, "restore.json") {
			t.Fatalf("neither data nor a note what to do: %s", files)
		}
	}
	slices.Sort(states)
	t.Logf("%s; states: %s", time.Since(begin), strings.Join(slices.Compact(states), "; "))
	if out := m.snapshot("restore", "good"); !strings.Contains(out, "restored good") {
		t.Errorf("it says %s", out)
	}
	// And the point of no return without the rest: Kedge completes it at its start.
	line := `cd ` + cluster.DataDir + ` && mv etcd etcd.restore && printf '{"snapshot":"good","stamp":"x","phase":"swap","etcdDir":"%s/etcd","pkiDir":"%s/pki","membership":%s,"pending":{}}' "$PWD" "$PWD" "$(cat cluster.json)" >restore.json`
	if _, err := m.Shell(cluster.Within(t, minute), line); err != nil {
		t.Fatal(err)
	}
}

func single(t *testing.T, flags ...string) machine {
	t.Helper()
	c := cluster.ForTest(t, cluster.Spec{Servers: 1, Options: cluster.Options{Flags: flags}})
	m := machine{c.Servers[0], t}
	cluster.Do(t, c.Start)
	return m
}

// eventually waits for something of a machine.
func (m machine) eventually(d time.Duration, what string, ok func() bool) {
	m.t.Helper()
	cluster.EventuallyWithin(m.t, d, what, func(context.Context) error {
		if !ok() {
			return errors.New("not yet")
		}
		return nil
	})
}
