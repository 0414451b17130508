// SPDX-License-Identifier: Apache-2.0

package encryption

import (
	"encoding/json"
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/golden"
)

const key1 = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="

// first is the configuration of a cluster's first start.
const first = `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- providers:
  - secretbox:
      keys:
      - name: key1
        secret: ` + key1 + `
  - identity: {}
  resources:
  - secrets
`

func adopt(t *testing.T) *State {
	t.Helper()
	s, err := Adopt([]byte(first))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// order is the providers in a line, with the stage.
func (s *State) order() string {
	var names []string
	for _, p := range s.Providers {
		names = append(names, p.Name)
	}
	return strings.Join(names, " ") + " " + string(s.Stage)
}

// TestAdopt: what Kedge wrote at the first start is the same after it was taken over, byte for byte, so that no server reloads it.
func TestAdopt(t *testing.T) {
	s := adopt(t)
	if got, err := s.Config(); err != nil || string(got) != first {
		t.Errorf("%v\n%s", err, got)
	}
	if got := s.order(); got != "key1 identity " {
		t.Error(got)
	}
	for name, change := range map[string][2]string{
		"another resource":        {"  - secrets\n", "  - secrets\n  - configmaps\n"},
		"another provider":        {"  - identity: {}\n", "  - aescbc:\n      keys:\n      - name: a\n        secret: " + key1 + "\n"},
		"a second list":           {"resources:\n- providers", "resources:\n- resources: [configmaps]\n  providers: [{identity: {}}]\n- providers"},
		"a short key":             {key1, "c2hvcnQ="},
		"a field nobody knows":    {"kind:", "kinds: x\nkind:"},
		"the same name for a key": {"  - identity: {}\n", "  - secretbox:\n      keys:\n      - name: key1\n        secret: " + key1 + "\n"},
	} {
		if _, err := Adopt([]byte(strings.Replace(first, change[0], change[1], 1))); !errors.Is(err, ErrForeign) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestStages: at each stage a server that is one stage behind, or ahead, can read what the others write.
func TestStages(t *testing.T) {
	s := adopt(t)
	var seen []string
	advance := func() {
		t.Helper()
		next, err := s.Advance()
		if err != nil {
			t.Fatal(err)
		}
		if next.Generation != s.Generation+1 {
			t.Errorf("generation %d after %d", next.Generation, s.Generation)
		}
		together(t, s, next)
		s = next
		seen = append(seen, s.order())
	}
	for _, a := range []Action{Rotate, Rotate, Disable, Enable, Rotate} {
		next, err := s.Begin(a, time.Unix(0, 0).UTC())
		if err != nil {
			t.Fatal(a, err)
		}
		together(t, s, next)
		s = next
		seen = append(seen, string(a)+": "+s.order())
		if again, err := s.Begin(a, time.Now()); again != nil || err != nil {
			t.Errorf("%s once more: %v, %v", a, again, err)
		}
		advance()
		advance()
		if _, err := s.Advance(); err == nil {
			t.Error("went on after the end")
		}
	}
	want := []string{
		"rotate-key: key1 key2 identity prepare", "key2 key1 identity write", "key2 identity ",
		"rotate-key: key2 key3 identity prepare", "key3 key2 identity write", "key3 identity ",
		"disable: key3 identity prepare", "identity key3 write", "identity ",
		"enable: identity key4 prepare", "key4 identity write", "key4 identity ",
		"rotate-key: key4 key5 identity prepare", "key5 key4 identity write", "key5 identity ",
	}
	if got := strings.Join(seen, "\n"); got != strings.Join(want, "\n") {
		t.Errorf("got\n%s", got)
	}
}

// together: two servers with neighbouring states read what the other one writes. The last stage is left when nothing is stored by what goes.
func together(t *testing.T, a, b *State) {
	t.Helper()
	reads := func(s *State, provider string) bool { return strings.Contains(" "+s.order()+" ", " "+provider+" ") }
	if !reads(a, b.Writer().Name) || a.Stage != Write && !reads(b, a.Writer().Name) {
		t.Errorf("%q and %q do not understand each other", a.order(), b.order())
	}
}

func TestBeginRefuses(t *testing.T) {
	s := adopt(t)
	off := s.clone()
	off.Providers = off.Providers[1:]
	rotating, err := s.Begin(Rotate, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		s    *State
		a    Action
		want string
	}{
		{s, Enable, "on already"},
		{off, Disable, "off already"},
		{off, Rotate, "secrets-encrypt enable"},
		{rotating, Disable, "rotate-key has not ended yet"},
		{s, "x", `"x" is no change`},
	} {
		if next, err := tt.s.Begin(tt.a, time.Now()); next != nil || err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, %v", tt.a, next, err)
		}
	}
}

func TestConfigGolden(t *testing.T) {
	s, err := adopt(t).Begin(Rotate, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	text, err := s.Config()
	if err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "testdata/prepare.yaml", regexp.MustCompile(`secret: \S+`).ReplaceAllString(string(text), "secret: KEY"))
}

func TestProviderOf(t *testing.T) {
	for value, want := range map[string]string{
		"k8s:enc:secretbox:v1:key1:\x00\x01garbage": "key1",
		"k8s:enc:secretbox:v1:key12:x":              "key12",
		"k8s\x00\x0a\x0c":                           Identity,
		"{\"kind\":\"Secret\"}":                     Identity,
		"":                                          Identity,
		"k8s:enc:aescbc:v1:key1:x":                  "unknown",
		"k8s:enc:secretbox:v1:":                     "unknown",
		"k8s:enc:":                                  "unknown",
	} {
		if got := providerOf([]byte(value)); got != want {
			t.Errorf("%q: %s, want %s", value, got, want)
		}
	}
}

// FuzzParse: whatever is in the keyring, a State that was taken can be made a configuration, and is the same when it is stored again.
func FuzzParse(f *testing.F) {
	good, err := Adopt([]byte(first))
	if err != nil {
		f.Fatal(err)
	}
	text, err := json.Marshal(good)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"generation":3,"stage":"write","target":"key2","resources":["secrets"],"providers":[{"name":"identity"}]}`))
	f.Add([]byte(`{}`))
	f.Add([]byte(first))
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, err := Adopt(data); err == nil {
			if _, err := s.Config(); err != nil {
				t.Error(err)
			}
		}
		s, err := Parse(data)
		if err != nil {
			return
		}
		if _, err := s.Config(); err != nil {
			t.Error(err)
		}
		if s.Stage != Stable {
			if next, err := s.Advance(); err != nil || next.validate() != nil {
				t.Errorf("%+v, %v", next, err)
			}
		}
	})
}
