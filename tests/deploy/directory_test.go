// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

// TestDirectory goes through what can happen to a file on one server.
func TestDirectory(t *testing.T) {
	s := shared.Cluster(t).Servers[0]
	f := becomes(t, s, "start.yaml", "applied")
	has(t, s, "start", "configmap", "at-start", "-o", "jsonpath={.data.from}")
	if f.Objects != 1 || f.Revision != 1 {
		t.Errorf("the same file on three servers: %+v", f)
	}

	begin := time.Now()
	put(t, s, "web.yaml", configMap("one", "1")+configMap("two", "1"))
	has(t, s, "1", "configmap", "two", "-o", value)
	t.Logf("applied within %s", time.Since(begin).Round(100*time.Millisecond))
	becomes(t, s, "web.yaml", "applied", revision(1))

	// A change, a removal, and an error between them; the error keeps everything until it is mended.
	put(t, s, "web.yaml", configMap("one", "2")+"---\nkind: [\n"+configMap("three", "1"))
	f = becomes(t, s, "web.yaml", "failed", revision(2), says("document 2 (line 7)"))
	has(t, s, "2", "configmap", "one", "-o", value)
	has(t, s, "1", "configmap", "three", "-o", value)
	has(t, s, "1", "configmap", "two", "-o", value)
	out, err := s.Exec(cluster.Within(t, minute), "sh", "-c", cluster.Program+" manifests; echo $?")
	if err != nil || !strings.Contains(out, "document 2 (line 7): yaml:") || !strings.HasSuffix(out, "\n3\n") {
		t.Errorf("%v\n%s", err, out)
	}
	st, err := s.Status(cluster.Within(t, minute))
	if err != nil || !st.Ready {
		t.Errorf("a file with an error makes the server not ready: %v %+v", err, st)
	}
	put(t, s, "web.yaml", "")
	becomes(t, s, "web.yaml", "failed", revision(3), says("the file is empty"))
	has(t, s, "1", "configmap", "two", "-o", value)
	put(t, s, "web.yaml", configMap("one", "2")+configMap("three", "1"))
	becomes(t, s, "web.yaml", "applied", revision(4))
	has(t, s, "", "configmap", "two")

	// Objects move from one file to another without being made anew.
	uid := func() string {
		out, err := s.Kubectl(cluster.Within(t, minute), "get", "configmap", "one", "-o", "jsonpath={.metadata.uid}")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	before := uid()
	if _, err := s.Shell(cluster.Within(t, minute), "cd "+dir+" && mv web.yaml moved.yaml"); err != nil {
		t.Fatal(err)
	}
	becomes(t, s, "web.yaml", "removed")
	becomes(t, s, "moved.yaml", "applied")
	if after := uid(); after != before {
		t.Errorf("the object was made anew when its file was renamed: %s, %s", before, after)
	}
	remove(t, s, "moved.yaml")
	has(t, s, "", "configmap", "one")
	becomes(t, s, "moved.yaml", "removed")
}

// TestCare is about what is not deleted, and about what has to wait.
func TestCare(t *testing.T) {
	s := shared.Cluster(t).Servers[0]
	kubectl := func(args ...string) {
		t.Helper()
		if _, err := s.Kubectl(cluster.Within(t, minute), args...); err != nil {
			t.Fatal(err)
		}
	}
	kubectl("create", "configmap", "mine", "--from-literal=own=1")
	put(t, s, "care.yaml", strings.ReplaceAll(configMap("inside", "1"), "metadata: {", "metadata: {namespace: care, ")+configMap("mine", "1")+`
---
apiVersion: v1
kind: Namespace
metadata: {name: care}
`)
	becomes(t, s, "care.yaml", "applied")
	has(t, s, "1", "configmap", "mine", "-o", value)
	kubectl("-n", "care", "create", "secret", "generic", "kept", "--from-literal=a=b")
	remove(t, s, "care.yaml")
	becomes(t, s, "care.yaml", "removed", says("Namespace care is kept: it has objects that are not of its manifest: secrets kept"))
	has(t, s, "1", "configmap", "mine", "-o", "jsonpath={.data.own}")
	has(t, s, "", "-n", "care", "configmap", "inside")
	kubectl("-n", "care", "delete", "secret", "kept")
	has(t, s, "", "namespace", "care")

	// A kind that comes later, in another file.
	put(t, s, "a-shed.yaml", "apiVersion: kedge.test/v1\nkind: Shed\nmetadata: {name: small}\nspec: {doors: 2}\n")
	becomes(t, s, "a-shed.yaml", "waiting", says("the cluster has no kind Shed in kedge.test/v1"))
	put(t, s, "b-kind.yaml", `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: sheds.kedge.test}
spec:
  group: kedge.test
  scope: Namespaced
  names: {plural: sheds, singular: shed, kind: Shed}
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, properties: {spec: {type: object, properties: {doors: {type: integer}}}}}}
`)
	begin := time.Now()
	becomes(t, s, "a-shed.yaml", "applied")
	t.Logf("applied %s after its kind", time.Since(begin).Round(100*time.Millisecond))
	remove(t, s, "b-kind.yaml")
	becomes(t, s, "b-kind.yaml", "removed", says("there are objects of this kind: small"))
	has(t, s, "2", "shed", "small", "-o", "jsonpath={.spec.doors}")
	remove(t, s, "a-shed.yaml")
	has(t, s, "", "crd", "sheds.kedge.test")

	// One object in two files: one counts, the other one says so.
	put(t, s, "first.yaml", configMap("twice", "first"))
	becomes(t, s, "first.yaml", "applied")
	put(t, s, "second.yaml", configMap("twice", "second"))
	becomes(t, s, "second.yaml", "failed", says("first.yaml has this object, too"))
	has(t, s, "first", "configmap", "twice", "-o", value)
	remove(t, s, "first.yaml")
	becomes(t, s, "second.yaml", "applied")
	has(t, s, "second", "configmap", "twice", "-o", value)
	remove(t, s, "second.yaml")
	has(t, s, "", "configmap", "twice")
}
