// SPDX-License-Identifier: Apache-2.0

// Package certificates tests what happens to keys and certificates in the life of a cluster: they are looked at, renewed while
// everything runs, replaced after years without power, and their CAs are changed.
package certificates

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

var shared = cluster.SharedCluster{Name: "certificates", Spec: cluster.Spec{Servers: 3, Agents: 1}} //policy:allow variable one cluster for the package

func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }

const minute = time.Minute

// entry is one of `kedge certificate check -o json`.
type entry struct {
	Name, File, Subject, Issuer, State, Warning string
	NotBefore, NotAfter                         time.Time
	DaysLeft                                    int
}

// check runs `kedge certificate check` and returns what it says, by name, and its exit status.
func check(t *testing.T, n *cluster.Node) (map[string]entry, int) {
	t.Helper()
	out, err := n.Exec(cluster.Within(t, minute), cluster.Program, "certificate", "check", "-o", "json")
	code := 0
	var exit *testbed.ExitError
	if errors.As(err, &exit) {
		code, out = exit.Code, exit.Stdout
	} else if err != nil {
		t.Fatal(err)
	}
	var list []entry
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%s: certificate check: %v: %s", n.Name(), err, out)
	}
	byName := map[string]entry{}
	for _, e := range list {
		byName[e.Name] = e
	}
	return byName, code
}

// wantNames are the certificates of a server, and those of an agent.
const (
	serverNames = "server-ca client-ca request-header-ca etcd-ca apiserver apiserver-kubelet-client front-proxy-client admin kedge-controller " +
		"kubelet-client kubelet-serving kedge-server etcd-peer kubeconfig"
	agentNames = "server-ca client-ca kubelet-client kubelet-serving"
)

func wantNames(n *cluster.Node) []string {
	if n.Role == cluster.ServerRole {
		return strings.Fields(serverNames)
	}
	return strings.Fields(agentNames)
}

// well fails the test unless a machine has all of its certificates and all are good.
func well(t *testing.T, n *cluster.Node) map[string]entry {
	t.Helper()
	list, code := check(t, n)
	for _, name := range wantNames(n) {
		if e, ok := list[name]; !ok || e.State != "ok" || e.DaysLeft < 360 {
			t.Errorf("%s: %s is %+v", n.Name(), name, e)
		}
	}
	if code != 0 || len(list) != len(wantNames(n)) {
		t.Errorf("%s: exit status %d, %d certificates: %+v", n.Name(), code, len(list), list)
	}
	return list
}

// load is the program tests/certificates/client at work in a machine.
type load struct {
	n    *cluster.Node
	proc *testbed.Process
}

// report is what it prints; see there.
type report struct {
	Requests, Connections, Events, Serials int
	Issuers, Errors                        []string
}

var program = sync.OnceValues(func() ([]byte, error) { //policy:allow variable it is built once
	return cluster.Build(context.Background(), "github.com/kedge-io/kedge/tests/certificates/client")
})

// startLoad starts clients in a machine that go through its load balancer, with a copy of the administrator's kubeconfig as people have
// on their own machines.
func startLoad(t *testing.T, s *cluster.Server, n *cluster.Node) *load {
	t.Helper()
	binary, err := program()
	if err != nil {
		t.Fatal(err)
	}
	kubeconfig, err := s.ReadFile(cluster.Kubeconfig)
	if err == nil {
		err = errors.Join(n.WriteFile("/opt/client", binary, 0o755), n.WriteFile("/opt/kubeconfig", kubeconfig, 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Exec(cluster.Within(t, minute), "rm", "-f", "/var/log/client.out"); err != nil {
		t.Fatal(err)
	}
	p, err := n.Spawn(cluster.Within(t, minute), "/var/log/client.out", "/opt/client", "/opt/kubeconfig", "127.0.0.1:6444")
	if err != nil {
		t.Fatal(err)
	}
	return &load{n, p}
}

// stop ends it and returns what it says.
func (l *load) stop(t *testing.T) report {
	t.Helper()
	if err := errors.Join(l.proc.Signal(cluster.Within(t, minute), "TERM"), l.proc.Wait(cluster.Within(t, minute))); err != nil {
		t.Fatal(err)
	}
	out, err := l.n.ReadFile("/var/log/client.out")
	if err != nil {
		t.Fatal(err)
	}
	var r report
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("the client: %v: %s", err, out)
	}
	return r
}

// kubeletAnswers waits until a server reaches a kubelet; a connection of before the kubelet's restart may fail once.
func kubeletAnswers(t *testing.T, s *cluster.Server, n *cluster.Node) {
	t.Helper()
	cluster.Eventually(t, "the kubelet of "+n.Name()+" to answer", func(ctx context.Context) error {
		_, err := s.Kubectl(ctx, "get", "--raw", "/api/v1/nodes/"+n.Name()+"/proxy/healthz")
		return err
	})
}
