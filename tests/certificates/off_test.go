// SPDX-License-Identifier: Apache-2.0

package certificates

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/util/keyutil"

	"github.com/kedge-io/kedge/tests/cluster"
)

// issuers are the CAs of a cluster.
type issuers map[string]tls.Certificate

func readIssuers(t *testing.T, s *cluster.Server) issuers {
	t.Helper()
	all := issuers{}
	for _, name := range []string{"server-ca", "client-ca", "request-header-ca", "etcd-ca"} {
		cert, err := s.ReadFile("/var/lib/kedge/pki/" + name + ".crt")
		if err != nil {
			t.Fatal(err)
		}
		key, err := s.ReadFile("/var/lib/kedge/pki/" + name + ".key")
		if err != nil {
			t.Fatal(err)
		}
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		all[string(pair.Leaf.RawSubject)] = pair
	}
	return all
}

// age replaces a certificate in PEM data by one that is the same but for its dates, for the same key.
func (i issuers) age(t *testing.T, data []byte, begin, end time.Time) []byte {
	t.Helper()
	pair, err := tls.X509KeyPair(data, data)
	if err != nil {
		t.Fatal(err)
	}
	ca, ok := i[string(pair.Leaf.RawIssuer)]
	if !ok {
		t.Fatalf("who issued %s?", pair.Leaf.Subject)
	}
	template := *pair.Leaf
	template.NotBefore, template.NotAfter = begin, end
	template.SignatureAlgorithm = x509.UnknownSignatureAlgorithm
	der, err := x509.CreateCertificate(rand.Reader, &template, ca.Leaf, pair.Leaf.PublicKey, ca.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	key, err := keyutil.MarshalPrivateKeyToPEM(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key...)
}

// ageServer makes all leaf certificates of a server two years older than they may be.
func (i issuers) ageServer(t *testing.T, s *cluster.Server) {
	t.Helper()
	for _, name := range strings.Fields(serverNames) {
		if strings.HasSuffix(name, "-ca") || name == "kubeconfig" {
			continue
		}
		file := "/var/lib/kedge/pki/" + name + ".pem"
		data, err := s.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.WriteFile(file, i.age(t, data, time.Now().AddDate(-3, 0, 0), time.Now().AddDate(-2, 0, 0)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// ageAgent makes those of an agent expire right after it was seen last: what it is to the cluster after two years.
func (i issuers) ageAgent(t *testing.T, n *cluster.Node) {
	t.Helper()
	for _, name := range []string{"kubelet-client", "kubelet-server"} {
		file := "/var/lib/kubelet/pki/" + name + "-current.pem"
		data, err := n.Exec(cluster.Within(t, minute), "cat", file)
		if err != nil {
			t.Fatal(err)
		}
		aged := i.age(t, []byte(data), time.Now().Add(-20*time.Hour), time.Now().Add(-2*minute))
		if _, err := n.ExecInput(cluster.Within(t, minute), bytes.NewReader(aged), "sh", "-c", "cat > "+file); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTwoYearsOff: everything on all machines has expired while they were off. They start, in any order, and replace it all by themselves; pods
// are there again.
func TestTwoYearsOff(t *testing.T) {
	c := shared.Cluster(t)
	s := c.Servers[0].Session(t)
	a1 := c.Agents[0]
	s.Kubectl("create", "deployment", "web", "--image=kedge.test/server:1", "--replicas=2")
	s.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	all := readIssuers(t, c.Servers[0])
	for _, n := range append([]*cluster.Node{a1}, c.Servers[2].Node, c.Servers[1].Node, c.Servers[0].Node) {
		if err := errors.Join(n.PowerCut(cluster.Within(t, minute)), n.Boot(cluster.Within(t, minute))); err != nil {
			t.Fatal(err)
		}
	}
	for _, server := range c.Servers {
		all.ageServer(t, server)
	}
	all.ageAgent(t, a1)
	for _, n := range c.Nodes() {
		list, code := check(t, n)
		if code != 4 || list["kubelet-client"].State != "expired" || list["kubelet-serving"].State != "expired" || list["client-ca"].State != "ok" {
			t.Errorf("%s is not what the test wants: exit status %d, %+v", n.Name(), code, list)
		}
	}
	began := time.Now()
	for _, n := range append([]*cluster.Node{a1}, c.Servers[0].Node, c.Servers[1].Node, c.Servers[2].Node) {
		n.JoinFlags = nil // tokens of two years ago are of no use
		if n == a1 {
			n.JoinFlags = []string{"--server", c.Servers[0].URL()}
		}
		if err := n.Run(cluster.Within(t, minute)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.WaitReady(cluster.Within(t, 3*minute)); err != nil {
		t.Fatal(err)
	}
	t.Logf("all ready after %s", time.Since(began).Round(time.Second))
	s.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	for _, n := range c.Nodes() {
		// The kubelet of an agent asks for its own ones when it is up.
		cluster.Eventually(t, n.Name()+" to have new certificates", func(context.Context) error {
			list, code := check(t, n)
			if code != 0 || list["kubelet-client"].DaysLeft < 360 || list["kubelet-serving"].DaysLeft < 360 {
				return errors.New(n.Name() + ": " + list["kubelet-client"].NotAfter.String())
			}
			return nil
		})
		well(t, n)
	}
	if log, err := a1.Log(); err != nil || !strings.Contains(log, "the node's client certificate was renewed") {
		t.Errorf("%s does not say that it got another certificate: %v", a1.Name(), err)
	}
	if _, err := s.Try("logs", "deployment/web"); err != nil {
		t.Errorf("logs, which need the kubelets' serving certificates: %v", err)
	}
}

// TestRemovedAgentExpired: an agent that was removed while its certificate expired does not come back by it, and says what it takes.
func TestRemovedAgentExpired(t *testing.T) {
	c := shared.Cluster(t)
	s1, a1 := c.Servers[0], c.Agents[0]
	if err := a1.Stop(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	}
	readIssuers(t, s1).ageAgent(t, a1)
	if _, err := s1.Exec(cluster.Within(t, minute), cluster.Program, "node", "remove", a1.Name()); err != nil {
		t.Fatal(err)
	}
	a1.JoinFlags = []string{"--server", s1.URL()}
	if err := a1.Run(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	}
	if err := a1.Process().Wait(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	}
	if log, err := a1.Log(); err != nil || !strings.Contains(log, "it was removed from the cluster") || !strings.Contains(log, "a token is needed") {
		t.Errorf("it does not say why: %v", err)
	}
	token, err := s1.Token(cluster.Within(t, minute), cluster.AgentRole)
	if err != nil {
		t.Fatal(err)
	}
	a1.JoinThrough(s1.URL(), token)
	if err := a1.Run(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitReady(cluster.Within(t, 2*minute)); err != nil {
		t.Fatal(err)
	}
}
