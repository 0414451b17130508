// SPDX-License-Identifier: Apache-2.0

package certificates

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

// rotation is `kedge certificate rotate-ca --status -o json`.
type rotation struct {
	ID, Phase, Turn string
	Finished        time.Time
	WaitingFor      []string
	Machines        map[string]string
}

func rotationStatus(ctx context.Context, s *cluster.Server) (*rotation, error) {
	out, err := s.Exec(ctx, cluster.Program, "certificate", "rotate-ca", "--status", "-o", "json")
	if err != nil {
		return nil, err
	}
	var r rotation
	return &r, json.Unmarshal([]byte(out), &r)
}

// TestRotateCA changes the CAs of a whole cluster: agents, pods, tokens and clients outside go on, a server that is off in between catches
// up, and nobody touches a machine.
func TestRotateCA(t *testing.T) {
	c := shared.Cluster(t)
	s1, s3, a1 := c.Servers[0], c.Servers[2], c.Agents[0]
	s := s1.Session(t)
	if out := s.Kubectl("version"); out == "" {
		t.Fatal("no API")
	}
	s.Kubectl("create", "deployment", "web", "--image=kedge.test/server:1", "--replicas=2")
	s.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	pods := s.Kubectl("get", "pods", "-o", "jsonpath={.items[*].metadata.uid} {.items[*].status.containerStatuses[*].restartCount}")
	oldToken, err := s1.Token(cluster.Within(t, minute), cluster.AgentRole)
	if err != nil {
		t.Fatal(err)
	}
	oldKubeconfig, err := s1.ReadFile(cluster.Kubeconfig)
	if err == nil {
		err = s1.WriteFile("/opt/old-kubeconfig", oldKubeconfig, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	serviceAccountToken := s.Kubectl("create", "token", "default", "--duration=2h")
	before := map[string]map[string]entry{}
	for _, n := range c.Nodes() {
		before[n.Name()] = well(t, n)
	}
	out, err := s1.Exec(cluster.Within(t, minute), cluster.Program, "certificate", "rotate-ca", "--dry-run")
	if err != nil || !strings.Contains(out, "s1, s2, s3") || !strings.Contains(out, "a1") || !strings.Contains(out, "Nothing was changed") {
		t.Errorf("dry run: %v: %s", err, out)
	}
	if _, err := a1.Exec(cluster.Within(t, minute), cluster.Program, "certificate", "rotate-ca", "--kubeconfig", "/opt/kubeconfig"); err == nil {
		t.Error("an agent changes the CAs")
	}

	// One server is off at first.
	if err := s3.Stop(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if out, err := s1.Exec(cluster.Within(t, minute), cluster.Program, "certificate", "rotate-ca", "--no-wait", "--overlap", "1h"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cluster.EventuallyWithin(t, 3*minute, "the running servers to trust the new CAs", func(ctx context.Context) error {
		r, err := rotationStatus(ctx, s1)
		if err != nil {
			return err
		}
		for _, n := range []string{"s1", "s2"} {
			if !strings.HasPrefix(r.Machines[n], r.ID+"/") {
				return fmt.Errorf("%+v", r)
			}
		}
		return nil
	})
	if err := s3.Restart(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	}
	cluster.EventuallyWithin(t, 6*minute, "all machines to have certificates from the new CAs", func(ctx context.Context) error {
		r, err := rotationStatus(ctx, s1)
		if err == nil && (r.Phase != "renew" || len(r.WaitingFor) > 0) {
			err = fmt.Errorf("%+v", r)
		}
		return err
	})
	t.Logf("all machines followed within %s", time.Since(began).Round(time.Second))
	if err := c.WaitReady(cluster.Within(t, 2*minute)); err != nil {
		t.Fatal(err)
	}
	for _, n := range c.Nodes() {
		for name, e := range well(t, n) {
			if old := before[n.Name()][name]; e.Issuer == old.Issuer && !(n == a1 && strings.HasSuffix(name, "-ca")) {
				t.Errorf("%s: %s is still of %s", n.Name(), name, e.Issuer)
			}
		}
	}
	// What was handed out before works during the overlap.
	if _, err := s1.Exec(cluster.Within(t, minute), cluster.Program, "kubectl", "--kubeconfig", "/opt/old-kubeconfig", "get", "nodes"); err != nil {
		t.Errorf("an old kubeconfig: %v", err)
	}
	if _, err := s1.Exec(cluster.Within(t, minute), "sh", "-c", "curl -sS --fail --cacert /var/lib/kedge/pki/server-ca.crt -H 'Authorization: Bearer "+serviceAccountToken+
		"' https://127.0.0.1:6443/apis"); err != nil {
		t.Errorf("a service account's token from before: %v", err)
	}
	a2, err := c.AddAgent(cluster.Within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Join(cluster.Within(t, 2*minute), a2, s1, oldToken); err != nil {
		t.Errorf("an agent with an old token: %v", err)
	}
	if got := s.Kubectl("get", "pods", "-o", "jsonpath={.items[*].metadata.uid} {.items[*].status.containerStatuses[*].restartCount}"); got != pods {
		t.Errorf("pods were touched: %s, were %s", got, pods)
	}
	ca := s.Kubectl("get", "configmap", "kube-root-ca.crt", "-o", `jsonpath={.data.ca\.crt}`)
	if strings.Count(ca, "BEGIN CERTIFICATE") != 2 {
		t.Errorf("the CAs of pods: %s", ca)
	}

	out, err = s1.Exec(cluster.Within(t, 5*minute), cluster.Program, "certificate", "rotate-ca", "--finish")
	if err != nil || !strings.Contains(out, "finished on") {
		t.Fatalf("finish: %v: %s", err, out)
	}
	if err := c.WaitReady(cluster.Within(t, 2*minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := s1.Exec(cluster.Within(t, minute), cluster.Program, "kubectl", "--kubeconfig", "/opt/old-kubeconfig", "get", "nodes"); err == nil {
		t.Error("an old kubeconfig works after the overlap")
	}
	s.Eventually("pods to trust the new CA only", func() error {
		ca := s.Kubectl("get", "configmap", "kube-root-ca.crt", "-o", `jsonpath={.data.ca\.crt}`)
		if strings.Count(ca, "BEGIN CERTIFICATE") != 1 {
			return errors.New(ca)
		}
		return nil
	})
	for _, n := range slices.Concat(c.Nodes()) {
		well(t, n)
		kubeletAnswers(t, s1, n)
	}
	if _, err := s.Try("logs", "deployment/web"); err != nil {
		t.Error(err)
	}
	// A new token fits, an old one is refused with the reason.
	a2.Flags, a2.JoinFlags = nil, nil
	if err := a2.Stop(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := s1.Exec(cluster.Within(t, minute), cluster.Program, "node", "remove", "a2"); err != nil {
		t.Fatal(err)
	}
	if err := a2.Reimage(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	}
	refused, err := a2.Exec(cluster.Within(t, minute), cluster.Program, "agent", "--server", s1.URL(), "--token", oldToken)
	if err == nil || !strings.Contains(err.Error(), "before its CAs were changed") {
		t.Errorf("an old token after the overlap: %v: %s", err, refused)
	}
	token, err := s1.Token(cluster.Within(t, minute), cluster.AgentRole)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Join(cluster.Within(t, 2*minute), a2, s1, token); err != nil {
		t.Errorf("an agent with a new token: %v", err)
	}
}
