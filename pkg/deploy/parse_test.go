// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func describe(docs []document) []string {
	var list []string
	for _, d := range docs {
		text := fmt.Sprintf("%d/%d ", d.number, d.line)
		if d.err != nil {
			text += "error: " + d.err.Error()
		} else {
			text += refer(d.object).String()
		}
		list = append(list, text)
	}
	return list
}

func TestParseFile(t *testing.T) {
	const a = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n"
	for _, tt := range []struct {
		what, name, text string
		want             []string
	}{
		{"one", "f.yaml", a, []string{"1/1 ConfigMap a"}},
		{"comments, directives and empty documents", "f.yaml", "%YAML 1.2\n---\n# nothing\n---\n\n# that one:\n" + a + "...\n---\n--- # end\n", []string{"1/7 ConfigMap a"}},
		{"an error does not hide the others", "f.yaml", a + "---\na: [\n---\n" + strings.ReplaceAll(a, "a}", "b}"),
			[]string{"1/1 ConfigMap a", "2/5 error: yaml: line 2: did not find expected node content", "3/7 ConfigMap b"}},
		{"carriage returns", "f.yml", strings.ReplaceAll(a+"---\n"+a, "\n", "\r\n"), []string{"1/1 ConfigMap a", "2/5 ConfigMap a"}},
		{"a separator in a text is none", "f.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n  x: |\n    ---\n    y\n", []string{"1/1 ConfigMap a"}},
		{"on the line of the separator", "f.yaml", "--- {apiVersion: v1, kind: ConfigMap, metadata: {name: a}}\n", []string{"1/1 ConfigMap a"}},
		{"a list", "f.yaml", "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: ConfigMap, metadata: {name: a}}\n- {apiVersion: apps/v1, kind: Deployment, metadata: {name: b, namespace: x}}\n- x\n",
			[]string{"1/1 ConfigMap a", "1/1 Deployment.apps x/b", "1/1 error: this item of a List is no object"}},
		{"JSON", "f.json", `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a"}}` + "\n\n" + `{"kind":"ConfigMapList","apiVersion":"v1","items":[{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"b"}}]}`,
			[]string{"1/1 ConfigMap a", "2/3 ConfigMap b"}},
		{"JSON that breaks off", "f.json", `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a"}} {"a`, []string{"1/1 ConfigMap a", "2/1 error: unexpected EOF"}},
		{"a key twice", "f.yaml", a + "kind: Secret\n", []string{"1/1 error: yaml: unmarshal errors:\n  line 4: key \"kind\" already set in map"}},
		{"missing", "f.yaml", "kind: A\n---\napiVersion: v1\n---\napiVersion: v1\nkind: A\n---\napiVersion: v1\nkind: A\nmetadata: {generateName: a-}\n---\n- a\n---\ntrue\n", []string{
			"1/1 error: apiVersion is missing", "2/3 error: kind is missing", "3/5 error: A: metadata.name is missing",
			"4/8 error: A: an object here needs a name of its own: with generateName each start would make another",
			"5/12 error: this is no object: apiVersion, kind and metadata are missing", "6/14 error: this is no object: apiVersion, kind and metadata are missing"}},
		{"no text", "f.yaml", "apiVersion: v1\nkind: A\nmetadata: {name: a, labels: {x: 1}}\n---\napiVersion: v1\nkind: A\nmetadata: {name: a, namespace: 1}\n", []string{
			"1/1 error: A a: metadata.labels has something that is no text: put numbers, true and false into quotes",
			"2/5 error: A a: metadata.namespace is no text"}},
		{"comments only: all objects go", "f.yaml", "# nothing any more\n", nil},
	} {
		docs, err := parseFile(tt.name, []byte(tt.text))
		if err != nil {
			t.Errorf("%s: %v", tt.what, err)
		}
		if diff := cmp.Diff(tt.want, describe(docs)); diff != "" {
			t.Errorf("%s (-want +got)\n%s", tt.what, diff)
		}
	}
	for text, want := range map[string]string{"": errEmpty.Error(), " \n": errEmpty.Error(), "a: \xff": "this is no text in UTF-8; YAML and JSON are"} {
		if _, err := parseFile("f.yaml", []byte(text)); err == nil || err.Error() != want {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// FuzzParseFile: every document is an object that can be named, or an error, and comes from its line.
func FuzzParseFile(f *testing.F) {
	for _, seed := range []string{"", "---\n", "a: 1\n---\nb: &x [*x]\n", "kind: List\nitems: [{kind: List, items: [null, {}]}]\n", "apiVersion: v1\nkind: A\nmetadata: {name: a}\n",
		`{"apiVersion":"v1","kind":"A","metadata":{"name":"a"}}{`, "--- |\n a\n---\t\n", "%YAML 1.2\n---\n...", "\ufeffapiVersion: v1\nkind: A\nmetadata: {name: b}", "a: !!binary x\n", "? [a]\n: b\n", "metadata: {name: 1e999}\n"} {
		f.Add(seed, false)
		f.Add(seed, true)
	}
	f.Fuzz(func(t *testing.T, text string, isJSON bool) {
		name := "f.yaml"
		if isJSON {
			name = "f.json"
		}
		docs, err := parseFile(name, []byte(text))
		if err != nil && len(docs) > 0 {
			t.Error("documents and an error")
		}
		lines := strings.Count(text, "\n") + 1
		for _, d := range docs {
			if d.number < 1 || d.line < 1 || d.line > lines {
				t.Errorf("document %d in line %d of %d", d.number, d.line, lines)
			}
			if (d.err == nil) == (d.object == nil) {
				t.Fatalf("%+v", d)
			}
			if d.object == nil {
				continue
			}
			if d.object.GetName() == "" || d.object.GetKind() == "" || d.object.GetAPIVersion() == "" {
				t.Errorf("an object without a name: %v", d.object.Object)
			}
			if m := mark(d.object, "f.yaml", true); m.GetAnnotations()[annotationManifest] != "f.yaml" {
				t.Errorf("not marked: %v", m.Object)
			}
			if _, err := d.object.MarshalJSON(); err != nil {
				t.Error(err)
			}
		}
	})
}
