// SPDX-License-Identifier: Apache-2.0

package images

import (
	"slices"
	"strings"
	"testing"
)

func TestIsArchive(t *testing.T) {
	for name, want := range map[string]bool{"a.tar": true, "a.tar.gz": true, "a.tgz": true, "a.tar.zst": true, "a.txt": false, "tar": false, "a.tar.part": false} {
		if isArchive(name) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
}

const objects = `
# a comment, then an empty document
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  template:
    metadata: {labels: {app: web}}
    spec:
      initContainers: [{name: i, image: busybox}]
      containers:
      - {name: c, image: nginx:1.27}
      - {name: none}
      volumes:
      - {name: v, image: {reference: quay.io/team/data:3}}
      - {name: e, emptyDir: {}}
---
{"apiVersion": "v1", "kind": "List", "items": [
 {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "nginx:1.27"}]}},
 {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "j", "namespace": "shop"}, "spec": {"jobTemplate": {"spec": {"template": {"spec":
   {"containers": [{"name": "c", "image": "busybox@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}]}}}}}}]}
---
apiVersion: example.org/v1
kind: Database
metadata: {name: d}
spec: {podTemplate: {spec: {containers: [{name: c, image: "registry.example:5000/db"}]}}}
---
kind: ConfigMap
metadata: {name: no}
data: {image: "not an image"}
`

func TestNeeds(t *testing.T) {
	var n Needs
	if err := n.Read(strings.NewReader(objects)); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, need := range n.List() {
		got = append(got, need.Image+" <- "+strings.Join(need.By, ", "))
	}
	want := []string{
		"docker.io/library/busybox:latest <- Deployment shop/web",
		"docker.io/library/busybox@sha256:" + strings.Repeat("a", 64) + " <- CronJob shop/j",
		"docker.io/library/nginx:1.27 <- Deployment shop/web, Pod p",
		"quay.io/team/data:3 <- Deployment shop/web",
		"registry.example:5000/db:latest <- Database d",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestBadManifests(t *testing.T) {
	for text, want := range map[string]string{
		"kind: [":                              "document 1",
		"a: b\n---\n{{ .Values.image }}: x: y": "document 2",
		"kind: Pod\nmetadata: {name: p}\nspec: {containers: [{image: 'Upper Case'}]}": `Pod p: image "Upper Case"`,
	} {
		var n Needs
		if err := n.Read(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %s", text, err, want)
		}
	}
}

func FuzzNeeds(f *testing.F) {
	f.Add([]byte(objects))
	f.Add([]byte("kind: Pod\nspec: {containers: {image: x}, volumes: [1, [2]]}"))
	f.Add([]byte(`[{"containers": [{"image": 1}]}, null]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var n Needs
		_ = n.Read(strings.NewReader(string(data)))
		for _, need := range n.List() {
			if name, err := Name(need.Image); err != nil || name != need.Image || len(need.By) == 0 {
				t.Errorf("%+v: %s, %v", need, name, err)
			}
		}
	})
}

func TestMissing(t *testing.T) {
	on := []Image{{Names: []string{"b:1", "b@sha256:1"}}, {Names: []string{"a:1"}}}
	if got := Missing([]string{"a:1", "a:2", "b@sha256:1"}, on); !slices.Equal(got, []string{"a:2"}) {
		t.Errorf("got %v", got)
	}
}
