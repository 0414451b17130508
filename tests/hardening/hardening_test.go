// SPDX-License-Identifier: Apache-2.0

// Package hardening tests what guards a cluster: the encryption of Secrets and the change of its key, what the CIS benchmark says, who
// listens where, and that no secret shows up where it does not belong.
package hardening

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
	"github.com/kedge-io/kedge/tests/testbed"
)

const (
	minute     = time.Minute
	token      = "the-servers-own-token-2026"
	agentToken = "the-agents-own-token-2026"
	auditLog   = "/var/log/kedge/audit.log"
)

// TestHardening runs everything on one cluster whose tokens are in files.
func TestHardening(t *testing.T) {
	c := start(t)
	t.Run("RotateKey", func(t *testing.T) { rotate(t, c) })
	t.Run("DisableEnable", func(t *testing.T) { disableEnable(t, c) })
	t.Run("CIS", func(t *testing.T) { benchmark(t, c) })
	t.Run("Admission", func(t *testing.T) { admission(t, c) })
	t.Run("Listeners", func(t *testing.T) { listeners(t, c) })
	t.Run("NoSecretsInSight", func(t *testing.T) { noSecretsInSight(t, c) })
}

func start(t *testing.T) *cluster.Cluster {
	t.Helper()
	c := cluster.ForTest(t, cluster.Spec{Servers: 3, Agents: 1,
		Options: cluster.Options{
			Flags: []string{"--token-file", "/etc/kedge/token", "--agent-token-file", "/etc/kedge/agent-token", "--audit-log", auditLog, "--pod-security", "baseline"},
			Files: map[string]string{"/etc/kedge/token": token + "\n", "/etc/kedge/agent-token": agentToken + "\n"},
		},
		AgentFlags: []string{"--token-file", "/etc/kedge/agent-token"},
	})
	first := c.Servers[0]
	cluster.Do(t, first.Run, first.WaitReady)
	for _, n := range c.Nodes()[1:] {
		n.JoinFlags = []string{"--server", first.URL()}
		cluster.Do(t, n.Run)
	}
	cluster.Do(t, c.WaitReady)
	return c
}

// report is the part of `kedge secrets-encrypt status -o json` that is looked at.
type report struct {
	Enabled   bool
	State     struct{ Action, Stage string }
	Providers []struct{ Name string }
	Servers   []struct {
		Name, Error string
		Current     bool
	}
	Objects struct{ By map[string]int }
}

func status(t *testing.T, s *cluster.Server) (r report, settled bool) {
	t.Helper()
	out, err := s.Exec(cluster.Within(t, minute), cluster.Program, "secrets-encrypt", "status", "-o", "json")
	var exit *testbed.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.Code != 3) {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return r, err == nil
}

// change runs a change to its end.
func change(t *testing.T, s *cluster.Server, action string) string {
	t.Helper()
	out, err := s.Exec(cluster.Within(t, 2*minute), cluster.Program, "secrets-encrypt", action)
	if err != nil {
		t.Fatalf("%s: %v\n%s", action, err, out)
	}
	return out
}

// traffic writes and reads Secrets through one server until /tmp/stop is there, and writes what failed.
const traffic = `i=0
while [ ! -e /tmp/stop ]; do
	i=$((i+1))
	kedge kubectl --request-timeout=15s -n rotation create secret generic "$(hostname)-$i" --from-literal=a=b 2>&1 >/dev/null || echo "FAILED create $i"
	kedge kubectl --request-timeout=15s -n rotation get secret "s$((i % 60 + 1))" -o name 2>&1 >/dev/null || echo "FAILED get $i"
done
echo "rounds $i"`

// rotate changes the key while a server is off at first, the command is killed, and clients are at work.
func rotate(t *testing.T, c *cluster.Cluster) {
	one, two, three := c.Servers[0], c.Servers[1], c.Servers[2]
	if r, settled := status(t, one); !settled || !r.Enabled || r.Providers[0].Name != "key1" || len(r.Servers) != 3 {
		t.Fatalf("at first: %+v", r)
	}
	var secrets strings.Builder
	for i := range 60 {
		fmt.Fprintf(&secrets, "---\n{apiVersion: v1, kind: Secret, metadata: {name: s%d}, stringData: {a: hidden-value-%d}}\n", i+1, i+1)
	}
	cluster.Do(t, func(ctx context.Context) error {
		_, err := one.Kubectl(ctx, "create", "namespace", "rotation")
		return err
	},
		func(ctx context.Context) error { return one.Apply(ctx, "rotation", secrets.String()) })
	oldKeys := readFile(t, one.Node, "/var/lib/kedge/pki/encryption.yaml")

	cluster.Do(t, three.PowerCut)
	p, err := two.Spawn(cluster.Within(t, minute), "/var/log/rotate.log", cluster.Program, "secrets-encrypt", "rotate-key")
	if err != nil {
		t.Fatal(err)
	}
	cluster.Eventually(t, "the command to say what it waits for", func(context.Context) error {
		text, err := two.ReadFile("/var/log/rotate.log")
		if err == nil && !strings.Contains(string(text), "server "+three.Name()) {
			err = fmt.Errorf("it says %q", text)
		}
		return err
	})
	if r, settled := status(t, one); settled || r.State.Stage != "prepare" || r.State.Action != "rotate-key" {
		t.Errorf("while it waits: %+v", r)
	}
	if out, err := one.Exec(cluster.Within(t, minute), cluster.Program, "secrets-encrypt", "disable"); err == nil || !strings.Contains(err.Error()+out, "rotate-key has not ended") {
		t.Errorf("another change meanwhile: %v %s", err, out)
	}
	cluster.Do(t, func(ctx context.Context) error { return p.Signal(ctx, "KILL") }, three.Restart, c.WaitReady)

	var clients []*testbed.Process
	for _, s := range c.Servers {
		client, err := s.Spawn(cluster.Within(t, minute), "/var/log/traffic.log", "sh", "-c", traffic)
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, client)
	}
	begin := time.Now()
	out := change(t, one, "rotate-key")
	t.Logf("after %s:\n%s", time.Since(begin).Round(100*time.Millisecond), out)
	for i, s := range c.Servers {
		cluster.Do(t, func(ctx context.Context) error { _, err := s.Exec(ctx, "touch", "/tmp/stop"); return err }, clients[i].Wait)
		text := readFile(t, s.Node, "/var/log/traffic.log")
		t.Logf("%s: %s", s.Name(), strings.TrimSpace(text))
		if strings.Contains(text, "FAILED") || !strings.Contains(text, "rounds ") {
			t.Errorf("requests to %s failed:\n%s", s.Name(), text)
		}
	}
	if r, settled := status(t, two); !settled || len(r.Objects.By) != 1 || r.Objects.By["key2"] < 60 {
		t.Errorf("at last: %+v", r)
	}
	for _, s := range c.Servers {
		keys := readFile(t, s.Node, "/var/lib/kedge/pki/encryption.yaml")
		if !strings.Contains(keys, "name: key2") || strings.Contains(keys, "key1") || strings.Contains(keys, secretIn(oldKeys)) {
			t.Errorf("%s has the configuration\n%s", s.Name(), strings.ReplaceAll(keys, secretIn(keys), "KEY"))
		}
		stored(t, s, "k8s:enc:secretbox:v1:key2:")
	}
}

// stored looks into a server's own datastore member: every Secret begins so.
func stored(t *testing.T, s *cluster.Server, prefix string) {
	t.Helper()
	const raw = "/usr/local/bin/rawkeys"
	ctx := cluster.Within(t, 3*minute)
	if _, err := s.Exec(ctx, "test", "-x", raw); err != nil {
		program, err := cluster.Build(ctx, "github.com/kedge-io/kedge/tests/hardening/rawkeys")
		if err != nil {
			t.Fatal(err)
		}
		if err := s.WriteFile(raw, program, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	out, err := s.Exec(ctx, raw, "/run/kedge/etcd.sock", "/registry/secrets/")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	for _, line := range lines {
		if !strings.Contains(line, ` "`+prefix) {
			t.Errorf("%s: %s", s.Name(), line)
		}
	}
	if len(lines) < 60 {
		t.Errorf("%s has %d Secrets only", s.Name(), len(lines))
	}
}

func disableEnable(t *testing.T, c *cluster.Cluster) {
	one, two := c.Servers[0], c.Servers[1]
	change(t, two, "disable")
	if r, settled := status(t, one); !settled || r.Enabled || len(r.Objects.By) != 1 || r.Objects.By["identity"] < 60 {
		t.Errorf("disabled: %+v", r)
	}
	stored(t, one, `k8s\x00`)
	change(t, one, "enable")
	if r, settled := status(t, two); !settled || !r.Enabled || r.Providers[0].Name != "key3" || len(r.Objects.By) != 1 {
		t.Errorf("enabled: %+v", r)
	}
	stored(t, one, "k8s:enc:secretbox:v1:key3:")
}

// benchmark: nothing fails but what is known and said in docs/hardening.md.
func benchmark(t *testing.T, c *cluster.Cluster) {
	look := func(n *cluster.Node, known ...string) map[string]string {
		t.Helper()
		out, err := n.Exec(cluster.Within(t, minute), cluster.Program, "check", "--profile", "cis", "-o", "json")
		var exit *testbed.ExitError
		if err != nil && (!errors.As(err, &exit) || exit.Code != 1) {
			t.Fatal(err)
		}
		var r struct {
			Items []struct{ ID, Title, Status, Finding string }
		}
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		items := map[string]string{}
		for _, i := range r.Items {
			if items[i.ID] != "" {
				t.Errorf("item %s is there twice", i.ID)
			}
			items[i.ID] = i.Status
			if i.Status == "fail" != slices.Contains(known, i.ID) {
				t.Errorf("%s: %s %s: %s: %s", n.Name(), i.ID, i.Status, i.Title, i.Finding)
			}
		}
		if failed := err != nil; failed != (len(known) > 0) {
			t.Errorf("%s: exit status says failed=%t", n.Name(), failed)
		}
		return items
	}
	server := look(c.Servers[0].Node, "1.3.3")
	if len(server) != 131 {
		t.Errorf("%d items", len(server))
	}
	agent := look(c.Agents[0])
	for id, status := range agent {
		if strings.HasPrefix(id, "1.2.") && status != "n/a" {
			t.Errorf("item %s of an agent: %s", id, status)
		}
	}
}

// admission: who may ask without a user, and which pods are taken.
func admission(t *testing.T, c *cluster.Cluster) {
	s := c.Servers[0]
	for path, want := range map[string]string{"/livez": "200", "/readyz": "200", "/version": "200", "/api": "401", "/metrics": "401",
		"/api/v1/namespaces/kube-public/configmaps/cluster-info": "200", "/apis": "401", "/kedge/v1/encryption": "401"} {
		out, err := s.Exec(cluster.Within(t, minute), "curl", "-sk", "-o", "/dev/null", "-w", "%{http_code}", "https://127.0.0.1:6443"+path)
		if err != nil || out != want {
			t.Errorf("anonymous %s: %s, want %s, %v", path, out, want, err)
		}
	}
	const privileged = `{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{name: c, image: kedge.test/busybox:1, securityContext: {privileged: true}}]}}`
	create := func(namespace string) error {
		_, err := s.ExecInput(cluster.Within(t, minute), strings.NewReader(privileged), cluster.Program, "kubectl", "-n", namespace, "create", "--dry-run=server", "-f", "-")
		return err
	}
	if err := create("rotation"); err == nil || !strings.Contains(err.Error(), "violates PodSecurity") {
		t.Errorf("a privileged pod: %v", err)
	}
	if err := create("kube-system"); err != nil {
		t.Errorf("a privileged pod in kube-system: %v", err)
	}
	out, err := s.Shell(cluster.Within(t, minute), `stat -c %a `+auditLog+`; grep -c '"verb":"create".*"resource":"secrets"' `+auditLog)
	if lines := strings.Fields(out); err != nil || len(lines) != 2 || lines[0] != "600" || lines[1] == "0" {
		t.Errorf("audit log: %q, %v", out, err)
	}
}

// listeners: what can be reached from outside is on the list.
func listeners(t *testing.T, c *cluster.Cluster) {
	server, agent := []string{"tcp 6443", "tcp 2380", "tcp 10250", "udp 8472"}, []string{"tcp 10250", "udp 8472"}
	for _, n := range c.Nodes() {
		out, err := n.Exec(cluster.Within(t, minute), "ss", "-Hlntu")
		if err != nil {
			t.Fatal(err)
		}
		var open []string
		for line := range strings.Lines(out) {
			fields := strings.Fields(line)
			if len(fields) < 5 {
				continue
			}
			i := strings.LastIndexByte(fields[4], ':')
			host, port := strings.Trim(fields[4][:i], "[]"), fields[4][i+1:]
			host, _, _ = strings.Cut(host, "%")
			// The cluster DNS has an address of its own that no packet from outside reaches.
			if strings.HasPrefix(host, "127.") || host == "::1" || host == "10.43.0.10" {
				continue
			}
			if entry := fields[0] + " " + port; !slices.Contains(open, entry) {
				open = append(open, entry)
			}
		}
		allowed := agent
		if n.Role == cluster.ServerRole {
			allowed = server
		}
		for _, entry := range open {
			if !slices.Contains(allowed, entry) {
				t.Errorf("%s listens on %s:\n%s", n.Name(), entry, out)
			}
		}
		for _, entry := range allowed {
			if !slices.Contains(open, entry) {
				t.Errorf("%s does not listen on %s, so this list is wrong:\n%s", n.Name(), entry, out)
			}
		}
	}
}

// noSecretsInSight looks for every secret that this test knows in what other users of a machine, or readers of logs, can see.
func noSecretsInSight(t *testing.T, c *cluster.Cluster) {
	s := c.Servers[0]
	made, err := s.Token(cluster.Within(t, minute), cluster.AgentRole)
	if err != nil {
		t.Fatal(err)
	}
	_, secret, _ := strings.Cut(made[strings.LastIndexByte(made, ':')+1:], ".")
	patterns := []string{token, agentToken, secret, "hidden-value-", "aGlkZGVuLXZhbHVl"} // the last is its base64
	keys, err := s.Shell(cluster.Within(t, minute), `cd /var/lib/kedge/pki; cat keyring.key; sed -n 's/.*secret: //p' encryption.yaml; for k in *.key *.pem; do grep -h -A1 'BEGIN.*PRIVATE' $k | grep -v BEGIN; done`)
	if err != nil {
		t.Fatal(err)
	}
	patterns = append(patterns, strings.Fields(keys)...)
	for _, p := range patterns {
		if len(p) < 12 {
			t.Fatalf("%q is too short to look for", p)
		}
	}
	for _, n := range c.Nodes() {
		if err := n.WriteFile("/root/patterns", []byte(strings.Join(patterns, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		// A pattern that is there shows that the search finds something.
		out, err := n.Shell(cluster.Within(t, minute), `cp /etc/kedge/agent-token /var/log/control
			grep -laF -f /root/patterns /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null
			grep -rlaF -f /root/patterns /var/log 2>/dev/null; rm /var/log/control`)
		if err != nil {
			t.Fatal(err)
		}
		if found := strings.Fields(out); !slices.Equal(found, []string{"/var/log/control"}) {
			t.Errorf("%s: secrets are in %v", n.Name(), found)
		}
	}
}

func readFile(t *testing.T, n *cluster.Node, path string) string {
	t.Helper()
	b, err := n.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// secretIn is the first key in an EncryptionConfiguration.
func secretIn(config string) string {
	_, rest, _ := strings.Cut(config, "secret: ")
	key, _, _ := strings.Cut(rest, "\n")
	return key
}
