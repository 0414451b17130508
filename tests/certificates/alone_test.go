// SPDX-License-Identifier: Apache-2.0

package certificates

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

// TestAlone is a cluster of one machine: its CAs are changed, the overlap ends by itself, and Kedge is killed in the middle of it. Then it is
// off for two years.
func TestAlone(t *testing.T) {
	c := cluster.ForTest(t, cluster.Spec{Servers: 1})
	s1 := c.Servers[0]
	cluster.Do(t, c.Start)
	before := well(t, s1.Node)
	if out, err := s1.Exec(cluster.Within(t, minute), cluster.Program, "certificate", "rotate-ca", "--no-wait", "--overlap", "5s"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := s1.WaitLog(cluster.Within(t, minute), "going along with the change of the CAs"); err != nil {
		t.Fatal(err)
	}
	p := s1.Process()
	if err := errors.Join(p.Signal(cluster.Within(t, minute), "KILL"), p.Wait(cluster.Within(t, minute))); err != nil {
		t.Fatal(err)
	}
	cluster.Eventually(t, "its children to be gone", func(ctx context.Context) error {
		out, err := s1.Shell(ctx, "pgrep -af '^kedge \\['; ss -Hlnt 'sport = :6443 or sport = :2380 or sport = :10250'")
		if err == nil && out != "" { // their ports are free a moment later
			err = errors.New(out)
		}
		return err
	})
	cluster.Do(t, s1.Run)
	began := time.Now()
	cluster.EventuallyWithin(t, 4*minute, "the change of the CAs to be finished", func(ctx context.Context) error {
		r, err := rotationStatus(ctx, s1)
		if err == nil && r.Finished.IsZero() {
			err = fmt.Errorf("%+v", r)
		}
		if running, _ := s1.Process().Running(ctx); !running {
			log, _ := s1.Log()
			return testbed.GiveUp(fmt.Errorf("kedge ended: %s", log[max(0, len(log)-1000):]))
		}
		return err
	})
	t.Logf("finished %s after the kill", time.Since(began).Round(time.Second))
	if err := c.WaitReady(cluster.Within(t, 2*minute)); err != nil {
		t.Fatal(err)
	}
	for name, e := range well(t, s1.Node) {
		if e.Issuer == before[name].Issuer {
			t.Errorf("%s is still of %s", name, e.Issuer)
		}
	}
	if out, err := s1.Shell(cluster.Within(t, minute), "ls /var/lib/kedge/pki"); err != nil || strings.Contains(out, "rotation.json") {
		t.Errorf("old keys are left: %v: %s", err, out)
	}

	if err := errors.Join(s1.PowerCut(cluster.Within(t, minute)), s1.Boot(cluster.Within(t, minute))); err != nil {
		t.Fatal(err)
	}
	readIssuers(t, s1).ageServer(t, s1)
	if list, code := check(t, s1.Node); code != 4 || list["apiserver"].State != "expired" {
		t.Errorf("exit status %d: %+v", code, list["apiserver"])
	}
	began = time.Now()
	cluster.Do(t, s1.Run, c.WaitReady)
	t.Logf("ready %s after two years", time.Since(began).Round(100*time.Millisecond))
	well(t, s1.Node)
	kubeletAnswers(t, s1, s1.Node)
}
