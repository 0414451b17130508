// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

// archive packs a chart as `helm package` does.
func archive(t *testing.T, name, version string, templates map[string]string) []byte {
	t.Helper()
	files := map[string]string{
		"Chart.yaml":  fmt.Sprintf("apiVersion: v2\nname: %s\nversion: %s\nappVersion: \"7\"\n", name, version),
		"values.yaml": "greeting: hello\nplace: {name: shed}\n",
	}
	for file, text := range templates {
		files["templates/"+file] = text
	}
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	var errs []error
	for _, file := range slices.Sorted(maps.Keys(files)) {
		errs = append(errs, w.WriteHeader(&tar.Header{Name: name + "/" + file, Mode: 0o644, Size: int64(len(files[file])), Typeflag: tar.TypeReg}))
		_, err := w.Write([]byte(files[file]))
		errs = append(errs, err)
	}
	if err := errors.Join(append(errs, w.Close(), z.Close())...); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

const greeting = `
apiVersion: v1
kind: ConfigMap
metadata: {name: {{ .Release.Name }}}
data:
  value: "{{ .Values.greeting }} from {{ .Values.place.name }}, {{ .Chart.Version }}"
`

// neverReady is a Deployment whose image does not exist.
const neverReady = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: {{ .Release.Name }}}
spec:
  selector: {matchLabels: {app: x}}
  template:
    metadata: {labels: {app: x}}
    spec: {containers: [{name: x, image: "kedge.test/missing:1", imagePullPolicy: Never}]}
`

func helmChart(chart []byte, version, more string) string {
	return fmt.Sprintf(`
apiVersion: %s
kind: HelmChart
metadata: {name: greet, namespace: kube-system}
spec:
  targetNamespace: greetings
  createNamespace: true
  bootstrap: false
  backOffLimit: 3
  timeout: 12s
  chartContent: %s
%s
`, version, base64.StdEncoding.EncodeToString(chart), more)
}

// release waits until the object says that its release is so: revision, Ready, Stalled.
func release(t *testing.T, s *cluster.Server, want string) {
	t.Helper()
	releaseOf(t, s, "greet", want)
}

func releaseOf(t *testing.T, s *cluster.Server, name, want string) {
	t.Helper()
	path := `jsonpath={.status.revision} {.status.release} {.status.conditions[?(@.type=="Ready")].status} {.status.conditions[?(@.type=="Stalled")].reason}`
	cluster.Eventually(t, fmt.Sprintf("the release %s to be %q", name, want), func(ctx context.Context) error {
		out, err := s.Kubectl(ctx, "-n", "kube-system", "get", "helmchart", name, "-o", path)
		if err == nil && strings.TrimSpace(out) != want {
			message, _ := s.Kubectl(ctx, "-n", "kube-system", "get", "helmchart", name, "-o", "jsonpath={.status.message}")
			err = fmt.Errorf("it is %q: %s", out, message)
		}
		return err
	})
}

// TestHelm: a chart is installed from what is in the object, upgraded, rolled back when that fails, and uninstalled, without a network.
func TestHelm(t *testing.T) {
	c := shared.Cluster(t)
	s := c.Servers[0]
	first := archive(t, "greet", "1.0.0", map[string]string{"map.yaml": greeting})
	values := "  valuesContent: |\n    greeting: hi\n    place: {name: barn}\n  set: {place.name: attic}\n"

	// The object as people have it in their k3s.
	begin := time.Now()
	put(t, s, "greet.yaml", helmChart(first, "helm.cattle.io/v1", values))
	becomes(t, s, "greet.yaml", "applied", says("taken as helm.kedge.io/v1"))
	has(t, s, "hi from attic, 1.0.0", "-n", "greetings", "configmap", "greet", "-o", value)
	release(t, s, "1 deployed True")
	t.Logf("installed within %s", time.Since(begin).Round(100*time.Millisecond))
	has(t, s, "deployed; these fields mean nothing here: backOffLimit", "-n", "kube-system", "helmchart", "greet", "-o", "jsonpath={.status.message}")

	begin = time.Now()
	second := archive(t, "greet", "1.1.0", map[string]string{"map.yaml": greeting})
	put(t, s, "greet.yaml", helmChart(second, "helm.kedge.io/v1", values))
	release(t, s, "2 deployed True")
	has(t, s, "hi from attic, 1.1.0", "-n", "greetings", "configmap", "greet", "-o", value)
	t.Logf("upgraded within %s", time.Since(begin).Round(100*time.Millisecond))

	// A version that does not become ready is taken back, and not tried again and again.
	third := archive(t, "greet", "1.2.0", map[string]string{"map.yaml": greeting, "broken.yaml": neverReady})
	put(t, s, "greet.yaml", helmChart(third, "helm.kedge.io/v1", values))
	release(t, s, "4 deployed False RolledBack")
	has(t, s, "hi from attic, 1.1.0", "-n", "greetings", "configmap", "greet", "-o", value)
	has(t, s, "", "-n", "greetings", "deployment", "greet")

	// A chart that cannot even be rendered changes nothing, and is tried again when it is mended.
	put(t, s, "greet.yaml", helmChart(archive(t, "greet", "1.3.0", map[string]string{"map.yaml": "{{ .Values.a.b.c }}"}), "helm.kedge.io/v1", values))
	release(t, s, "4 deployed False")

	// Another leader has nothing to do: no installation is repeated.
	put(t, s, "greet.yaml", helmChart(second, "helm.kedge.io/v1", values))
	release(t, s, "5 deployed True")
	cluster.Do(t, s.Stop, s.Restart, c.WaitReady)
	release(t, s, "5 deployed True")

	remove(t, s, "greet.yaml")
	has(t, s, "", "-n", "kube-system", "helmchart", "greet")
	has(t, s, "", "-n", "greetings", "configmap,secret", "-l", "owner=helm", "-o", "name")
	has(t, s, "", "-n", "greetings", "configmap", "greet")
}

// TestChartFile: a chart in the charts directory.
func TestChartFile(t *testing.T) {
	c := shared.Cluster(t)
	for _, s := range c.Servers {
		if err := s.WriteFile(cluster.DataDir+"/charts/greet-1.0.0.tgz", archive(t, "greet", "1.0.0", map[string]string{"map.yaml": greeting}), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := c.Servers[1]
	if err := s.Apply(cluster.Within(t, minute), "default", "apiVersion: helm.kedge.io/v1\nkind: HelmChart\nmetadata: {name: file}\nspec: {chart: greet-1.0.0.tgz}\n"); err != nil {
		t.Fatal(err)
	}
	has(t, s, "hello from shed, 1.0.0", "configmap", "file", "-o", value)
	if _, err := s.Kubectl(cluster.Within(t, minute), "delete", "helmchart", "file", "--timeout=30s"); err != nil {
		t.Fatal(err)
	}
	has(t, s, "", "configmap", "file")
}
