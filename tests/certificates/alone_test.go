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

// TestAlone is a cluster of one machine: its CAs are changed, with Kedge killed and started again at once in the middle of it, and the overlap
// ends by itself. Then it is off for two years.
func TestAlone(t *testing.T) {
	t.Parallel()
	c := cluster.ForTest(t, cluster.Spec{Servers: 1})
	s1 := c.Servers[0]
	cluster.Do(t, c.Start)
	s := s1.Session(t)
	s.Kubectl("create", "deployment", "web", "--image=kedge.test/server:1")
	s.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	const touched = "jsonpath={.items[*].metadata.uid} {.items[*].status.containerStatuses[*].restartCount}"
	pods := s.Kubectl("get", "pods", "-o", touched)
	before := well(t, s1.Node)
	if out, err := s1.Exec(cluster.Within(t, minute), cluster.Program, "certificate", "rotate-ca", "--no-wait", "--overlap", "5s"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := s1.WaitLog(cluster.Within(t, minute), "going along with the change of the CAs"); err != nil {
		t.Fatal(err)
	}
	p := s1.Process()
	if err := errors.Join(p.Signal(cluster.Within(t, minute), "KILL"), p.Wait(cluster.Within(t, minute)), s1.Run(cluster.Within(t, minute))); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	cluster.EventuallyWithin(t, 4*minute, "the change of the CAs to be finished", func(ctx context.Context) error {
		if running, err := s1.Process().Running(ctx); err == nil && !running {
			log, _ := s1.Log()
			return testbed.GiveUp(fmt.Errorf("kedge ended: %s", log[max(0, len(log)-1000):]))
		}
		r, err := rotationStatus(ctx, s1)
		if err == nil && r.Finished.IsZero() {
			err = fmt.Errorf("%+v", r)
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
	if out, err := s1.Shell(cluster.Within(t, minute), "grep -c 'BEGIN CERT' /var/lib/kedge/pki/*-trusted.crt"); err != nil || strings.Contains(out, ":2") {
		t.Errorf("old CAs are trusted: %v: %s", err, out)
	}
	if got := s.Kubectl("get", "pods", "-o", touched); got != pods {
		t.Errorf("pods were touched: %s, were %s", got, pods)
	}
	if log, err := s1.Log(); err == nil {
		for line := range strings.Lines(log) {
			if strings.Contains(line, "a Kedge that was killed") || strings.Contains(line, "the ports are free") {
				t.Log(line)
			}
		}
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
	s.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	if _, err := s.Try("logs", "deployment/web"); err != nil {
		t.Error(err)
	}
}
