// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

const pod = `
apiVersion: v1
kind: Pod
metadata: {name: still, namespace: default}
spec:
  containers: [{name: c, image: "kedge.io/pause:1.0", imagePullPolicy: Never}]
`

// TestUpgrade has the parts that share the releases.
func TestUpgrade(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip(testbed.ErrNotRoot)
	}
	r := makeReleases(t)
	t.Run("Node", func(t *testing.T) { testNode(t, r) })
	t.Run("All", func(t *testing.T) { testAll(t, r) })
}

// testNode takes one machine through everything that may happen on the way to another version.
func testNode(t *testing.T, r *releases) {
	s := r.machine(t, testbed.New(t), "m1", "server")
	cluster.Eventually(t, "pods to be accepted", func(ctx context.Context) error {
		_, err := s.Kubectl(ctx, "-n", "default", "get", "serviceaccount", "default")
		return err
	})
	cluster.Do(t, func(ctx context.Context) error { return s.Apply(ctx, "default", pod) })
	container := func() string {
		t.Helper()
		var id string
		cluster.Eventually(t, "the pod to run", func(ctx context.Context) (err error) {
			id, err = s.Kubectl(ctx, "get", "pod", "still", "-o", "jsonpath={.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}")
			if err == nil && !strings.HasPrefix(id, "containerd://") {
				err = fmt.Errorf("no container yet: %q", id)
			}
			return err
		})
		return id
	}
	before := container()
	failed := func(what, want string, args ...string) {
		t.Helper()
		if out, err := upgrade(t, s, args...); err == nil || !strings.Contains(out, want) {
			t.Errorf("%s: %v; want %q in %s", what, err, want, out)
		}
	}

	failed("a release of somebody else", "not trusted", "--from", r.forged)
	if out, err := upgrade(t, s, "--dry-run", "--from", r.good); err != nil || !strings.Contains(out, "can go from "+r.old+" to "+r.new) {
		t.Errorf("%v: %s", err, out)
	}
	url := testDownloads(t, r, s)
	if err := s.WriteFile(cluster.Program+".previous", r.minor, 0o755); err != nil {
		t.Fatal(err)
	}
	failed("back by minor versions", "a step back of a minor version", "--rollback")
	if out, err := s.Shell(t.Context(), "rm /usr/local/bin/kedge.previous; ls /usr/local/bin"); err != nil || out != "kedge\n" {
		t.Errorf("left behind: %q, %v", out, err)
	}
	failed("a version that crashes", "ended 3 times", "--from", r.bad)
	runs(t, s, r.old)
	failed("a version that is too slow", "not ready within 1s", "--timeout", "1s", "--from", r.good)
	runs(t, s, r.old)
	if out, err := s.Shell(t.Context(), "ls /usr/local/bin"); err != nil || out != "kedge\n" {
		t.Errorf("left behind: %q, %v", out, err)
	}

	if out, err := upgrade(t, s, "--from", url); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	st := runs(t, s, r.new)
	if last := st.History[len(st.History)-1]; len(st.History) != 3 || last.Failed || last.To != r.new || last.Snapshot == "" {
		t.Errorf("%+v", st.History)
	}
	if out, err := s.Shell(t.Context(), "test -f "+st.History[2].Snapshot+" && ls /usr/local/bin && systemctl show -p NRestarts --value kedge"); err != nil ||
		!strings.HasPrefix(out, "kedge\nkedge.previous\n") {
		t.Errorf("%q, %v", out, err)
	}
	if out, err := upgrade(t, s, "--rollback"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	runs(t, s, r.old)
	if after := container(); after != before {
		t.Errorf("the pod's container was %s, and is %s", before, after)
	}

	// The power goes while the new version is under trial, and comes back.
	if _, err := s.Spawn(cluster.Within(t, minute), "/var/log/upgrade.log", cluster.Program, "upgrade", "--from", r.good); err != nil {
		t.Fatal(err)
	}
	cluster.Eventually(t, "the new version to be under trial", func(ctx context.Context) error {
		st, err := stateOf(ctx, s)
		if err == nil && (st.Machine.Pending == nil || st.Machine.Version != r.new) {
			err = errors.New("it is not yet")
		}
		return err
	})
	cluster.Do(t, s.PowerCut, s.Boot)
	st = runs(t, s, r.new)
	if last := st.History[len(st.History)-1]; last.Failed || last.Back {
		t.Errorf("%+v", last)
	}
}
