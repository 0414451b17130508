// SPDX-License-Identifier: Apache-2.0

package joining

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// visitor makes a machine that has not joined, once for all tests of refusals. It is an agent by its role, but runs what it is told.
func visitor(t *testing.T, c *cluster.Cluster) *cluster.Node {
	t.Helper()
	if len(c.Agents) > 1 {
		return c.Agents[1]
	}
	n, err := c.AddAgent(cluster.Within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// dismiss has a visitor that has joined leave again, and makes it the machine that it was.
func dismiss(t *testing.T, s *cluster.Server, n *cluster.Node) {
	t.Helper()
	if _, err := n.Exec(cluster.Within(t, 2*minute), cluster.Program, "leave"); err != nil {
		t.Fatal(err)
	}
	gone(t, s, n.Name())
	cluster.Do(t, n.Reimage)
}

// attempt runs Kedge in the foreground, which has to fail, and returns what stands on the console. If it joins instead, that is
// undone for the tests to come.
func attempt(t *testing.T, c *cluster.Cluster, n *cluster.Node, role cluster.Role, args ...string) string {
	t.Helper()
	_, err := n.Exec(cluster.Within(t, 20*time.Second), append([]string{cluster.Program, string(role), "--join-timeout", "5s"}, args...)...)
	var exit *testbed.ExitError
	if errors.As(err, &exit) && exit.Code >= 1 {
		return exit.Stderr + exit.Stdout
	}
	text := err.Error()
	t.Errorf("kedge %s %v does not end: %s", role, args, text[:min(len(text), 2000)])
	if err := n.Reimage(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Servers[0].Kubectl(cluster.Within(t, minute), "delete", "node", n.Name(), "--ignore-not-found"); err != nil {
		t.Fatal(err)
	}
	t.FailNow()
	return ""
}

// waitExpired waits until nobody may join with a token any more.
func waitExpired(t *testing.T, s *cluster.Server, token string) {
	t.Helper()
	cluster.Eventually(t, "a token to expire", func(ctx context.Context) error {
		out, err := s.Exec(ctx, cluster.Program, "token", "list", "-o", "json")
		if err != nil {
			return err
		}
		var list []struct {
			ID      string
			Expires time.Time
		}
		if err := json.Unmarshal([]byte(out), &list); err != nil {
			return err
		}
		for _, entry := range list {
			if strings.HasPrefix(token, entry.ID) && entry.Expires.After(time.Now()) {
				return fmt.Errorf("it expires at %s", entry.Expires)
			}
		}
		return nil
	})
}

// TestRefusals: whoever may not join reads why and what to do about it, and neither the cluster nor the machine has changed.
func TestRefusals(t *testing.T) {
	c := shared.Cluster(t)
	s, n := c.Servers[0], visitor(t, c)
	agent := token(t, s, cluster.AgentRole)
	server := token(t, s, cluster.ServerRole)
	parts := strings.SplitN(agent, ".", 3)
	if len(parts) != 3 || len(parts[2]) != 64 {
		t.Fatalf("a token is ID.SECRET.CAHASH, not %q", agent)
	}
	revoked := token(t, s, cluster.AgentRole)
	if _, err := s.Exec(cluster.Within(t, minute), cluster.Program, "token", "delete", revoked); err != nil {
		t.Fatal(err)
	}
	expired := token(t, s, cluster.AgentRole, "--ttl", "1s")
	waitExpired(t, s, expired)
	before, clean := belongings(t, s), traces(t, n)
	for _, r := range []struct {
		name string
		role cluster.Role
		args []string
		want string // regular expression
	}{
		{"expired", cluster.AgentRole, []string{"--token", expired}, `has expired or was revoked.*kedge token create`},
		{"revoked", cluster.AgentRole, []string{"--token", revoked}, `has expired or was revoked.*kedge token create`},
		{"mistyped", cluster.AgentRole, []string{"--token", parts[0] + ".0123456789abcdef." + parts[2]}, `mistyped`},
		{"cut off", cluster.AgentRole, []string{"--token", agent[:len(agent)-3]}, `61 characters instead of 64`},
		{"wrong CA", cluster.AgentRole, []string{"--token", parts[0] + "." + parts[1] + "." + strings.Repeat("0", 64)}, `belongs to another cluster`},
		{"another operator's token", cluster.AgentRole, []string{"--token", "not-the-token-of-this-cluster"}, `does not know this machine's --token`},
		{"agent token for a server", cluster.ServerRole, []string{"--token", agent}, `for joining an agent.*kedge token create --role server`},
		{"closed port", cluster.AgentRole, []string{"--token", agent, "--server", "https://" + s.IP() + ":6449"}, `connection refused(.|\n)*gave up after 5s`},
		{"no such machine", cluster.ServerRole, []string{"--token", server, "--server", "https://" + c.Bed.Gateway()[:strings.LastIndex(c.Bed.Gateway(), ".")] + ".250:6443"},
			`(no answer from|there is no way to) (.|\n)*gave up after 5s`},
		{"no TLS", cluster.AgentRole, []string{"--token", agent, "--server", "http://" + s.IP() + ":6443"}, `https://`},
		{"name of an agent", cluster.AgentRole, []string{"--token", agent, "--node-name", c.Agents[0].Name()}, `a node ` + c.Agents[0].Name() + ` exists.*--node-name`},
		{"name of a server", cluster.ServerRole, []string{"--token", server, "--node-name", c.Servers[1].Name()}, `a node ` + c.Servers[1].Name() + ` exists.*--node-name`},
		{"contradicting range", cluster.ServerRole, []string{"--token", server, "--cluster-cidr", "10.99.0.0/16"}, `cluster-cidr.*10\.99\.0\.0/16.*10\.42\.0\.0/16`},
		{"contradicting domain", cluster.ServerRole, []string{"--token", server, "--cluster-domain", "other.local"}, `cluster-domain.*other\.local.*cluster\.local`},
	} {
		t.Run(r.name, func(t *testing.T) {
			begin := time.Now()
			args := append([]string{"--server", s.URL()}, r.args...)
			console := attempt(t, c, n, r.role, args...)
			lines := strings.Split(strings.TrimSpace(console), "\n")
			t.Logf("after %s: %s", time.Since(begin).Round(100*time.Millisecond), lines[len(lines)-1])
			if !regexp.MustCompile(`(?i)` + r.want).MatchString(console) {
				t.Errorf("it does not say %q:\n%s", r.want, console)
			}
			if strings.Contains(console, parts[1]) {
				t.Error("it shows the secret of the token")
			}
			if got := traces(t, n); got != clean {
				t.Errorf("files in the machine:\n%s\nbefore:\n%s", got, clean)
			}
			if got := belongings(t, s); got != before {
				t.Errorf("the cluster has now:\n%s\nbefore:\n%s", got, before)
			}
		})
	}
}

// TestRights: what a token's holder can do besides joining. The token is shown to the API as anybody could.
func TestRights(t *testing.T) {
	c := shared.Cluster(t)
	s, n := c.Servers[0], visitor(t, c)
	ask := func(bearer, method, path string) string {
		t.Helper()
		out, err := n.Exec(cluster.Within(t, minute), "curl", "-ksS", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", "-X", method, "-H", "Authorization: Bearer "+bearer, s.URL()+path)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	paths := []struct{ method, path string }{
		{"GET", "/kedge/v1/keys"},
		{"GET", "/kedge/v1/members"},
		{"POST", "/kedge/v1/members"},
		{"DELETE", "/kedge/v1/members/" + c.Servers[1].Name()},
		{"POST", "/kedge/v1/members/" + c.Servers[1].Name() + "/promote"},
		{"GET", "/api/v1/namespaces/kube-system/secrets"},
		{"GET", "/api/v1/namespaces/kube-system/configmaps"},
		{"GET", "/api/v1/nodes"},
		{"DELETE", "/api/v1/nodes/" + c.Agents[0].Name()},
	}
	for _, role := range []cluster.Role{cluster.AgentRole, cluster.ServerRole} {
		text := token(t, s, role)
		bearer := strings.Join(strings.SplitN(text, ".", 3)[:2], ".")
		paths := append(paths, struct{ method, path string }{"GET", "/api/v1/namespaces/kube-system/secrets/bootstrap-token-" + bearer[:6]})
		if got := ask(bearer, "GET", "/api/v1/namespaces/kube-system/configmaps/kedge-cluster"); got != "200" {
			t.Errorf("%s token: the settings: %s", role, got)
		}
		for _, p := range paths {
			if got := ask(bearer, p.method, p.path); got != "403" {
				t.Errorf("%s token: %s %s: %s, want 403", role, p.method, p.path, got)
			}
			if got := ask(bearer[:len(bearer)-1]+"~", p.method, p.path); got != "401" {
				t.Errorf("no token: %s %s: %s, want 401", p.method, p.path, got)
			}
		}
	}
	serverCertificate(t, s, n)
	// Keys of the cluster are on servers only.
	out, err := c.Agents[0].Shell(cluster.Within(t, minute), "grep -rlE 'PRIVATE KEY' /var/lib/kedge /etc/kedge /var/lib/kubelet | grep -v /images/ | sort")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("keys on the agent: %q", out)
	for _, secret := range []string{"ca.key", "service-account", "encryption"} {
		if strings.Contains(out, secret) {
			t.Errorf("the agent has a key of the cluster: %s", out)
		}
	}
}

// serverCertificate asks with an agent's token for the certificate with which servers fetch keys, and must not get it.
func serverCertificate(t *testing.T, s *cluster.Server, n *cluster.Node) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "system:kedge:server:evil", Organization: []string{"system:kedge:servers"}},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(map[string]any{
		"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": map[string]string{"name": "evil"},
		"spec": map[string]any{
			"request":    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			"signerName": "kubernetes.io/kube-apiserver-client", "usages": []string{"digital signature", "client auth"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	text := token(t, s, cluster.AgentRole)
	bearer := strings.Join(strings.SplitN(text, ".", 3)[:2], ".")
	out, err := n.ExecInput(cluster.Within(t, minute), bytes.NewReader(body), "curl", "-ksS", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", "-H", "Content-Type: application/json",
		"-H", "Authorization: Bearer "+bearer, "--data-binary", "@-", s.URL()+"/apis/certificates.k8s.io/v1/certificatesigningrequests")
	if err != nil || out != "201" {
		t.Fatalf("the request is not taken: %s, %v", out, err)
	}
	cluster.Eventually(t, "the request to be denied", func(ctx context.Context) error {
		got, err := s.Kubectl(ctx, "get", "csr", "evil", "-o", "jsonpath={.status.conditions[*].type}/{.status.certificate}")
		if err == nil && got != "Denied/" {
			err = fmt.Errorf("it is %q", got)
		}
		return err
	})
	if _, err := s.Kubectl(cluster.Within(t, minute), "delete", "csr", "evil"); err != nil {
		t.Error(err)
	}
}

// TestForeignServer: a server that is not the token's gets nothing secret, and is told from a clock that is wrong.
func TestForeignServer(t *testing.T) {
	c := shared.Cluster(t)
	n := visitor(t, c)
	good := token(t, c.Servers[0], cluster.AgentRole)
	clean := traces(t, n)
	t.Run("another cluster", func(t *testing.T) {
		f := startForeign(t, c.Bed, behaviour{})
		console := attempt(t, c, n, cluster.AgentRole, "--server", f.url, "--token", good)
		if !strings.Contains(console, "belongs to another cluster") {
			t.Errorf("it says: %s", console)
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.asked == 0 {
			t.Error("the foreign server was not asked at all")
		}
		if len(f.secrets) > 0 {
			t.Errorf("it was told: %v", f.secrets)
		}
	})
	for name, r := range map[string]struct {
		foreign behaviour
		want    string
	}{
		"clock ahead":     {behaviour{ahead: 2 * time.Hour}, `the clocks are (120m|2h)\S* apart(.|\n)*gave up after`},
		"clock behind":    {behaviour{ahead: -26 * time.Hour}, `the clocks are 2[56]h\S* apart(.|\n)*gave up after`},
		"newer version":   {behaviour{version: "v1.99.0"}, `v1\.99\.0.*an agent must not be`},
		"version too old": {behaviour{version: "v1.20.0"}, `v1\.20\.0.*an agent must not be`},
	} {
		t.Run(name, func(t *testing.T) {
			f := startForeign(t, c.Bed, r.foreign)
			console := attempt(t, c, n, cluster.AgentRole, "--server", f.url, "--token", "abcdef.0123456789abcdef."+f.caHash)
			if !regexp.MustCompile(r.want).MatchString(console) {
				t.Errorf("it says: %s; want %q", console, r.want)
			}
		})
	}
	if got := traces(t, n); got != clean {
		t.Errorf("files in the machine:\n%s\nbefore:\n%s", got, clean)
	}
}

// TestTokenCommands: create prints a command that can be typed as it is; list, inspect and rotate tell what there is.
func TestTokenCommands(t *testing.T) {
	c := shared.Cluster(t)
	s := c.Servers[1]
	run := func(args ...string) string {
		t.Helper()
		out, err := s.Exec(cluster.Within(t, minute), append([]string{cluster.Program, "token"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	out := run("create", "--role", "agent", "--ttl", "1h", "--description", "for the cellar")
	line := regexp.MustCompile(`kedge agent --server (https://\S+) --token ([a-z0-9]{6})\.[a-z0-9]{16}\.[0-9a-f]{64}`).FindStringSubmatch(out)
	if line == nil || line[1] != s.URL() {
		t.Fatalf("no command to join through %s: %s", s.URL(), out)
	}
	if list := run("list", "-o", "json"); !strings.Contains(list, line[2]) || !strings.Contains(list, "for the cellar") {
		t.Errorf("the list does not have %s: %s", line[2], list)
	}
	rotated := strings.TrimSpace(run("rotate", "--print-token", line[2]))
	list := run("list", "-o", "json")
	if strings.Contains(list, line[2]) || len(rotated) < 6 || !strings.Contains(list, rotated[:6]) {
		t.Errorf("after the rotation of %s to %s: %s", line[2], rotated, list)
	}
	if out := run("inspect", rotated); !strings.Contains(out, "agent") || strings.Contains(out, strings.Split(rotated, ".")[1]) {
		t.Errorf("inspect: %s", out)
	}
	run("delete", rotated)
	if list := run("list", "-o", "json"); strings.Contains(list, rotated[:6]) {
		t.Errorf("after it was deleted: %s", list)
	}
}

// TestNeverAlone: a server that cannot reach the cluster never makes one of its own.
func TestNeverAlone(t *testing.T) {
	c := shared.Cluster(t)
	n := visitor(t, c)
	clean := traces(t, n)
	if err := n.Isolate(cluster.Within(t, minute)); err != nil {
		t.Fatal(err)
	}
	p, err := n.Spawn(cluster.Within(t, minute), "/var/log/alone.log", cluster.Program, "server", "--server", c.Servers[0].URL(), "--token", token(t, c.Servers[0], cluster.ServerRole))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(p.Signal(cluster.Within(t, minute), "TERM"), p.Wait(cluster.Within(t, minute)), n.Machine.Join(cluster.Within(t, minute))); err != nil {
			t.Error(err)
		}
	}()
	begin := time.Now()
	cluster.Eventually(t, "it to wait for a while, and to say for whom", func(ctx context.Context) error {
		log, err := n.ReadFile(p.Log)
		if err != nil {
			return err
		}
		if !strings.Contains(string(log), c.Servers[0].IP()) || time.Since(begin) < 6*time.Second {
			return fmt.Errorf("so far: %s", log)
		}
		return nil
	})
	if running, err := p.Running(cluster.Within(t, minute)); !running || err != nil {
		t.Errorf("without a limit it waits for ever, but: running %t, %v", running, err)
	}
	if st, err := n.Status(cluster.Within(t, minute)); err != nil {
		t.Errorf("kedge status meanwhile: %v", err)
	} else if st.Ready {
		t.Errorf("kedge status says that it is ready: %+v", st)
	}
	if got := traces(t, n); got != clean {
		t.Errorf("files in the machine:\n%s\nbefore:\n%s", got, clean)
	}
}
