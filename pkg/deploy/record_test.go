// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

func TestRecord(t *testing.T) {
	s := &corev1.Secret{}
	at := time.Date(2026, 11, 28, 3, 0, 0, 0, time.UTC)
	put := func(v version) record {
		t.Helper()
		if err := v.put(s); err != nil {
			t.Fatal(err)
		}
		r, err := parseRecord(s)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r := put(version{file: "web.yaml", content: []byte("a: 1\n"), revision: 1, by: "s1", at: at})
	if content, err := r.content(); string(content) != "a: 1\n" || err != nil || s.Name != "kedge-manifest-web.yaml" || r.revision != 1 || r.deleted || !r.at.Equal(at) {
		t.Errorf("%+v %q %v", r, content, err)
	}
	s.Data[keyInventory], s.Data[keyStatus] = []byte(`[{"kind":"A","name":"a"}]`), []byte(`{"revision":1,"state":"applied"}`)
	if r.result().State != Applied {
		t.Error("a status of this revision does not count")
	}
	r = put(version{file: "web.yaml", revision: 2, by: "s2", at: at})
	if list, err := r.inventory(); len(list) != 1 || err != nil || !r.deleted || r.hash != "" || r.result().State != Pending || s.Data[keyContent] != nil {
		t.Errorf("after removal: %+v %v %v", r, list, err)
	}
	noise := make([]byte, 1<<20)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	if err := (version{file: "web.yaml", content: noise, revision: 3}).put(&corev1.Secret{}); err == nil || !strings.Contains(err.Error(), "split it up") {
		t.Errorf("too large: %v", err)
	}
	r = put(version{file: "web.yaml", content: bytes.Repeat([]byte("# text\n"), 1<<20), revision: 3})
	if content, err := r.content(); len(content) != 7<<20 || err != nil {
		t.Errorf("%d %v", len(content), err)
	}
	s.Data[keyContent] = s.Data[keyContent][:100]
	if _, err := r.content(); err == nil {
		t.Error("a damaged content is believed")
	}
	for name, damage := range map[string]func(*corev1.Secret){
		"another's name": func(s *corev1.Secret) { s.Annotations[annotationFile] = "x.yaml" },
		"a path":         func(s *corev1.Secret) { s.Annotations[annotationFile] = "../../etc/cron.d/x.yaml" },
		"revision":       func(s *corev1.Secret) { s.Annotations[annotationRevision] = "0" },
		"type":           func(s *corev1.Secret) { s.Type = corev1.SecretTypeOpaque },
		"checksum":       func(s *corev1.Secret) { s.Annotations[annotationHash] = "abc" },
	} {
		bad := s.DeepCopy()
		damage(bad)
		if _, err := parseRecord(bad); err == nil {
			t.Errorf("%s: believed", name)
		}
	}
}

func TestNames(t *testing.T) {
	seen := map[string]string{}
	for _, file := range []string{"web.yaml", "Web.yaml", "my app.yml", "-.json", "ä.yaml", "ö.yaml", strings.Repeat("x", 240) + ".yaml", "a..yaml"} {
		name := recordName(file)
		if !isManifest(file) || len(validation.IsDNS1123Subdomain(name)) > 0 || seen[name] != "" {
			t.Errorf("%s: %s, also %q", file, name, seen[name])
		}
		seen[name] = file
	}
	for _, file := range []string{".web.yaml", "web.yaml.conflict", "web", "a/b.yaml", "..", "web.yaml~", "a\nb.yaml", "web.txt"} {
		if isManifest(file) {
			t.Errorf("%q is taken for a manifest", file)
		}
	}
}

func TestDirectory(t *testing.T) {
	d := directory{t.TempDir()}
	old := time.Now().Add(-time.Minute)
	for name, text := range map[string]string{"a.yaml": "a", "b.json": "b", "c.txt": "c", ".d.yaml": "d"} {
		if err := os.WriteFile(d.file(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(d.file(name), old, old); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(d.file("dir.yaml"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", d.file("link.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := d.write("new.yaml", []byte("n")); err != nil {
		t.Fatal(err)
	}
	l, err := d.scan(time.Now())
	if err != nil || len(l.files) != 3 || !l.files["a.yaml"].settled || l.files["new.yaml"].settled || string(l.files["b.json"].content) != "b" {
		t.Errorf("%+v %v", l, err)
	}
	for _, want := range []string{"a.yaml.conflict", "a.yaml.conflict.2"} {
		if err := os.WriteFile(d.file("a.yaml"), []byte("again"), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := d.aside("a.yaml"); got != want || err != nil {
			t.Errorf("%s %v, want %s", got, err, want)
		}
	}
	if l, err = d.scan(time.Now()); len(l.conflicts) != 2 || err != nil {
		t.Errorf("%v %v", l.conflicts, err)
	}
	none := state{Cluster: "u", Files: map[string]known{}}
	st := state{Cluster: "u", Files: map[string]known{"b.json": {3, hashOf([]byte("b"))}, "new.yaml": {1, "another"}}}
	if err := d.save(none, st); err != nil {
		t.Fatal(err)
	}
	if got, err := d.load("u"); err != nil || got.Files["b.json"].Revision != 3 {
		t.Errorf("%+v %v", got, err)
	}
	if got, err := d.load("another"); err != nil || len(got.Files) != 0 || got.Cluster != "another" {
		t.Errorf("%+v %v", got, err)
	}
	copies := Copies(d.path)
	for i, c := range copies {
		copies[i] = filepath.Base(c)
	}
	if !slices.Equal(copies, []string{"b.json", stateFile}) {
		t.Errorf("copies: %v", copies)
	}
}
