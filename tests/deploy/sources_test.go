// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/registry"
)

const user, password = "carter", "hunter22"

// source gives a HelmChart that is fetched, with the CA and the Secret for it.
func source(name, chart, ca, secret string) string {
	text := fmt.Sprintf("---\napiVersion: helm.kedge.io/v1\nkind: HelmChart\nmetadata: {name: %s, namespace: kube-system}\nspec:\n  %s\n  targetNamespace: default\n", name, chart)
	if secret != "" {
		text += "  authSecret: {name: " + secret + "}\n"
	}
	if ca != "" {
		text += "  repoCA: |\n    " + strings.ReplaceAll(strings.TrimSpace(ca), "\n", "\n    ") + "\n"
	}
	return text
}

// complains waits until the status of a HelmChart has that text.
func complains(t *testing.T, s *cluster.Server, name, text string) {
	t.Helper()
	cluster.Eventually(t, fmt.Sprintf("%s to say %q", name, text), func(ctx context.Context) error {
		out, err := s.Kubectl(ctx, "-n", "kube-system", "get", "helmchart", name, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status} {.status.message}`)
		if err == nil && (!strings.HasPrefix(out, "False ") || !strings.Contains(out, text)) {
			err = fmt.Errorf("it says %q", out)
		}
		return err
	})
}

// TestSources: charts come from a repository and from a registry that want a password and have a CA of their own; what does not answer is said,
// and tried again.
func TestSources(t *testing.T) {
	c := shared.Cluster(t)
	s := c.Servers[0]
	var charts []registry.Chart
	for _, version := range []string{"1.0.0", "1.1.0"} {
		charts = append(charts, registry.Chart{Name: "greet", Version: version, Archive: archive(t, "greet", version, map[string]string{"map.yaml": greeting})})
	}
	apply := func(text string) {
		t.Helper()
		if err := s.Apply(cluster.Within(t, minute), "kube-system", text); err != nil {
			t.Fatal(err)
		}
	}
	secret := func(name, password string) string {
		return fmt.Sprintf("---\napiVersion: v1\nkind: Secret\nmetadata: {name: %s}\ntype: kubernetes.io/basic-auth\nstringData: {username: %s, password: %s}\n", name, user, password)
	}
	apply(secret("right", password) + secret("wrong", "guess"))

	// Nobody is there yet, and one object's Secret is not.
	l, err := net.Listen("tcp", c.Bed.Gateway()+":0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	apply(source("early", "chart: https://"+address+"/greet-1.0.0.tgz\n  insecureSkipTLSVerify: true", "", "late"))
	complains(t, s, "early", `authSecret: secrets "late" not found`)
	apply(secret("late", password))
	complains(t, s, "early", "connection refused")
	begin := time.Now()
	server, err := registry.Start(address, registry.Config{User: user, Password: password, TLS: true, Charts: charts})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	}()
	ca := string(server.CA())
	fromRepo := func(name, version, ca, secret string) string {
		return source(name, "repo: https://"+address+"\n  chart: greet\n  version: "+version, ca, secret)
	}
	fromRegistry := func(name, ca, secret string) string {
		return source(name, "chart: oci://"+address+"/charts/greet\n  version: 1.1.0", ca, secret)
	}
	apply(fromRepo("repo", "1.0.0", ca, "right") + fromRepo("repo-no-ca", "1.0.0", "", "right") + fromRepo("repo-guess", "1.0.0", ca, "wrong") +
		fromRepo("repo-none", "9.9.9", ca, "right") + fromRegistry("oci", ca, "right") + fromRegistry("oci-no-ca", "", "right") + fromRegistry("oci-guess", ca, "wrong"))
	for _, name := range []string{"repo", "oci"} {
		releaseOf(t, s, name, "1 deployed True")
	}
	has(t, s, "hello from shed, 1.0.0", "configmap", "repo", "-o", value)
	has(t, s, "hello from shed, 1.1.0", "configmap", "oci", "-o", value)
	complains(t, s, "repo-no-ca", "certificate signed by unknown authority")
	complains(t, s, "oci-no-ca", "certificate signed by unknown authority")
	complains(t, s, "repo-guess", "401")
	complains(t, s, "oci-guess", "401")
	complains(t, s, "repo-none", "9.9.9")
	// Mended ones are installed at once.
	apply(fromRepo("repo-no-ca", "1.0.0", ca, "right") + fromRegistry("oci-guess", ca, "right") + source("oci-no-ca", "chart: oci://"+address+"/charts/greet\n  insecureSkipTLSVerify: true", "", "right"))
	for _, name := range []string{"repo-no-ca", "oci-guess", "oci-no-ca"} {
		releaseOf(t, s, name, "1 deployed True")
	}
	has(t, s, "hello from shed, 1.1.0", "configmap", "oci-no-ca", "-o", value) // the newest
	// Nobody touched this one.
	releaseOf(t, s, "early", "1 deployed True")
	t.Logf("installed by itself %s after its source was there", time.Since(begin).Round(time.Second))

	// What was wrong is told once for each text, however often it was tried.
	told := map[string]int{}
	for _, s := range c.Servers {
		log, err := s.Log()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(log) {
			if _, chart, ok := strings.Cut(line, " chart="); ok && strings.Contains(line, "chart not deployed") {
				told[strings.Fields(chart)[0]]++
			}
		}
		if strings.Contains(log, password) {
			t.Errorf("the password is in the log of %s", s.Name())
		}
	}
	if told["kube-system/early"] != 2 || told["kube-system/repo-guess"] != 1 || told["kube-system/repo-none"] != 1 {
		t.Errorf("told in the logs: %v", told)
	}
	if out, err := s.Kubectl(cluster.Within(t, minute), "-n", "kube-system", "delete", "helmchart", "--all", "--timeout=60s"); err != nil {
		t.Fatal(out, err)
	}
	has(t, s, "", "configmap", "repo")
}

// claim is ready when somebody makes a volume for it.
const claim = `
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: {{ .Release.Name }}}
spec: {accessModes: [ReadWriteOnce], storageClassName: "", volumeName: greet-crash, resources: {requests: {storage: 1Mi}}}
`

const volume = `
apiVersion: v1
kind: PersistentVolume
metadata: {name: greet-crash}
spec: {capacity: {storage: 1Mi}, accessModes: [ReadWriteOnce], storageClassName: "", persistentVolumeReclaimPolicy: Retain, hostPath: {path: /tmp}}
`

// TestHelmCrash: the process that works on a release dies in the middle; the release does not stay pending.
func TestHelmCrash(t *testing.T) {
	c := shared.Cluster(t)
	s := c.Servers[0]
	put(t, s, "greet.yaml", helmChart(archive(t, "greet", "1.0.0", map[string]string{"map.yaml": greeting}), "helm.kedge.io/v1", ""))
	release(t, s, "1 deployed True")
	next := helmChart(archive(t, "greet", "2.0.0", map[string]string{"map.yaml": greeting, "claim.yaml": claim}), "helm.kedge.io/v1", "")
	put(t, s, "greet.yaml", strings.ReplaceAll(next, "timeout: 12s", "timeout: 90s"))
	has(t, s, "secret/sh.helm.release.v1.greet.v2", "-n", "greetings", "secret", "-l", "owner=helm,status=pending-upgrade", "-o", "name")
	has(t, s, "hello from shed, 2.0.0", "-n", "greetings", "configmap", "greet", "-o", value)
	killed := 0
	for _, s := range c.Servers {
		out, err := s.Shell(cluster.Within(t, minute), `for p in /proc/[0-9]*; do [ "$(cat $p/comm 2>/dev/null)" = kedge-helm ] && kill -9 ${p#/proc/} && echo killed; done; true`)
		if err != nil {
			t.Fatal(err)
		}
		killed += strings.Count(out, "killed")
	}
	if killed != 1 {
		t.Fatalf("%d processes were killed", killed)
	}
	begin := time.Now()
	complains(t, s, "greet", "the process ended without a result")
	if err := s.Apply(cluster.Within(t, minute), "default", volume); err != nil {
		t.Fatal(err)
	}
	release(t, s, "3 deployed True")
	t.Logf("deployed %s after the process was killed", time.Since(begin).Round(time.Second))
	cluster.Eventually(t, "nothing to be pending", func(ctx context.Context) error {
		out, err := s.Kubectl(ctx, "-n", "greetings", "get", "secret", "-l", "owner=helm,status in (pending-install,pending-upgrade,pending-rollback)", "-o", "name")
		if err == nil && out != "" {
			err = errors.New(out)
		}
		return err
	})
	remove(t, s, "greet.yaml")
	has(t, s, "", "-n", "kube-system", "helmchart", "greet")
	if _, err := s.Kubectl(cluster.Within(t, minute), "delete", "pv", "greet-crash", "--timeout=30s"); err != nil {
		t.Fatal(err)
	}
}
