// SPDX-License-Identifier: Apache-2.0

// Package images tests `kedge images`: what is saved where a registry can be reached runs where none can.
package images

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/image"
	"github.com/kedge-io/kedge/tests/registry"
)

const (
	shopImage   = "docker.io/library/shop:1"
	shortImage  = "team/short:1" // as a tool may write it into an archive
	missingName = "registry.example/none:1"
	bundle      = "/root/shop.tar.zst"
	// The pods say their image must not be pulled.
	shop = `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: shop, namespace: default}
spec:
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      containers: [{name: shop, image: "shop:1", imagePullPolicy: Never}]
`
)

func TestBundle(t *testing.T) {
	c := cluster.ForTest(t, cluster.Spec{Servers: 1, Agents: 1})
	ctx := cluster.Within(t, 6*time.Minute)
	archive := filepath.Join(t.TempDir(), "shop.tar")
	if err := image.Server(ctx, archive, shopImage); err != nil {
		t.Fatal(err)
	}
	reg, err := registry.Start(c.Bed.Gateway()+":0", registry.Config{Archives: []string{archive}})
	if err != nil {
		t.Fatal(err)
	}
	s, agent := c.Servers[0], c.Agents[0]
	mirrors := fmt.Sprintf("mirrors:\n  docker.io:\n    endpoint: ['http://%s']\n", reg.Addr())
	for _, n := range c.Nodes() {
		if err := n.WriteFile("/etc/kedge/registries.yaml", []byte(mirrors), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.WriteFile("/root/shop.yaml", []byte(shop), 0o644); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) string {
		t.Helper()
		out, err := s.Exec(ctx, append([]string{"kedge", "images"}, args...)...)
		if err != nil {
			t.Fatalf("kedge images %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return out
	}
	refused := func(want string, args ...string) {
		t.Helper()
		out, err := s.Exec(ctx, append([]string{"kedge", "images"}, args...)...)
		if err == nil || !strings.Contains(err.Error()+out, want) {
			t.Errorf("kedge images %s: %v, want %s", strings.Join(args, " "), err, want)
		}
	}

	// Without a cluster: a machine that only fetches.
	if out := run("list", "/root/shop.yaml", "-o", "name"); out != shopImage+"\n" {
		t.Errorf("needed: %q", out)
	}
	refused("nothing was written", "save", missingName, "-o", bundle)
	if out := run("save", "--manifests", "/root/shop.yaml", "-o", bundle); !strings.Contains(out, "1 images") {
		t.Errorf("save: %s", out)
	}
	refused("kedge is not running", "import", bundle)
	if out, err := s.Exec(ctx, "ls", "-A", "/root"); err != nil || strings.Contains(out, ".kedge-images") || strings.Contains(out, ".shop") {
		t.Errorf("left behind: %s, %v", out, err)
	}
	if err := reg.Close(); err != nil {
		t.Fatal(err)
	}

	cluster.Do(t, c.Start)
	if err := s.Apply(ctx, "default", shop); err != nil {
		t.Fatal(err)
	}
	if out := run("list"); !strings.Contains(out, "0 of 2") || !strings.Contains(out, "DaemonSet default/shop") {
		t.Errorf("list:\n%s", out)
	}
	if err := s.WriteFile("/root/broken.tar", []byte(strings.Repeat("broken", 1000)), 0o644); err != nil {
		t.Fatal(err)
	}
	refused("not an image archive", "import", "/root/broken.tar")
	refused(`node nowhere: `, "import", "--node", "nowhere", bundle)
	refused("no such file", "import", "/root/nothing.tar")

	out := run("import", "--all-nodes", bundle)
	for _, n := range c.Nodes() {
		if !strings.Contains(out, n.Name()+": "+shopImage) {
			t.Errorf("import says nothing of %s: %s", n.Name(), out)
		}
	}
	if out := run("list"); !strings.Contains(out, "2 of 2") {
		t.Errorf("list:\n%s", out)
	}
	if out, err := s.Kubectl(ctx, "rollout", "status", "daemonset/shop", "--timeout=60s"); err != nil {
		t.Errorf("%s: %v", out, err)
	}
	var node struct {
		Images []struct {
			Names  []string
			Pinned bool
		}
	}
	if out, err := s.Kubectl(ctx, "get", "--raw", "/api/v1/nodes/http:"+agent.Name()+":1/proxy/images"); err != nil {
		t.Error(err)
	} else if err := json.Unmarshal([]byte(out), &node); err != nil {
		t.Error(err)
	}
	if !slices.ContainsFunc(node.Images, func(i struct {
		Names  []string
		Pinned bool
	}) bool {
		return i.Pinned && slices.Contains(i.Names, shopImage)
	}) {
		t.Errorf("the image is not pinned: garbage collection would remove it: %+v", node.Images)
	}

	// Again, from standard input, and on the node's own machine.
	data, err := s.ReadFile(bundle)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := agent.ExecInput(ctx, bytes.NewReader(data), "kedge", "images", "import", "-"); err != nil || !strings.Contains(out, shopImage) {
		t.Errorf("from standard input: %s, %v", out, err)
	}
	refused(missingName, "pull", missingName)
	short := filepath.Join(t.TempDir(), "short.tar")
	if err := image.Server(ctx, short, shortImage); err != nil {
		t.Fatal(err)
	}
	if data, err = os.ReadFile(short); err != nil {
		t.Fatal(err)
	}
	if out, err := agent.ExecInput(ctx, bytes.NewReader(data), "kedge", "images", "import", "-"); err != nil || strings.TrimSpace(out) != "docker.io/"+shortImage {
		t.Errorf("a short name becomes %s, %v", out, err)
	}
}
