// SPDX-License-Identifier: Apache-2.0

package join

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	testID     = "abc123"
	testSecret = "0123456789abcdef"
	testText   = testID + "." + testSecret
)

var testHash = strings.Repeat("fedcba9876543210", 4)

func TestParse(t *testing.T) {
	full := testText + "." + testHash
	const paste = "; paste the token as `kedge token create` printed it"
	for _, tt := range []struct{ text, want string }{
		{testText, ""},
		{full, ""},
		{" \t" + full + "\r\n", ""},
		{"", "it is empty"},
		{" \n", "it is empty"},
		{full[:len(full)-1], "the CA hash (third part) has 63 characters instead of 64: the end or the beginning is missing" + paste},
		{testText + ".", "the CA hash (third part) has 0 characters instead of 64: the end or the beginning is missing" + paste},
		{full + "0", "the CA hash (third part) has 65 characters instead of 64" + paste},
		{testText + "." + strings.Repeat("g", 64), "the CA hash (third part) has characters other than 0-9 and a-f" + paste},
		{testText + "." + strings.ToUpper(testHash), "the CA hash (third part) has upper-case letters; a token is all lower case" + paste},
		{testText + ".sha256:" + testHash, "the CA hash (third part) has 71 characters instead of 64" + paste},
		{full[1:], "the ID (first part) has 5 characters instead of 6: the end or the beginning is missing" + paste},
		{"x" + full, "the ID (first part) has 7 characters instead of 6" + paste},
		{"ABC123." + testSecret, "the ID (first part) has upper-case letters; a token is all lower case" + paste},
		{"abc-23." + testSecret, "the ID (first part) has characters other than 0-9 and a-z" + paste},
		{testText[:20], "the secret (second part) has 13 characters instead of 16: the end or the beginning is missing" + paste},
		{"abc123.0123456789ABCDEF", "the secret (second part) has upper-case letters; a token is all lower case" + paste},
		{full + ".more", "it has 4 parts between dots instead of 2 or 3" + paste},
		{"kedge agent --server https://192.0.2.1:6443 --token " + full, "it is a whole command line; give only what stands behind --token in it"},
		{"--token=" + full, "it starts with a dash, like a flag; give only what stands behind --token"},
		{full[:40] + "\n" + full[40:], "there is white space inside, as from a line that was broken" + paste},
		{"K10" + testHash + "::server:secret", "it is a k3s token; make one with `kedge token create` on a server of this cluster"},
		{"K10" + testHash + "::" + testText, "it is a k3s token; make one with `kedge token create` on a server of this cluster"},
		{"H4sI" + strings.Repeat("A", 1000), "it is a k0s token; make one with `kedge token create` on a server of this cluster"},
		{"sha256:" + testHash, "it is only the hash of a CA; make one with `kedge token create` on a server of this cluster"},
		{"password", "it has 8 characters; one of your own has 12 to 512 and no dot, one from `kedge token create` has dots"},
		{strings.Repeat("x", 513), "it has 513 characters; one of your own has 12 to 512 and no dot, one from `kedge token create` has dots"},
		{"gr\u00fc\u00dfe-aus-wien", "it has characters other than letters, digits and ASCII punctuation, which not every terminal and file sends alike"},
		{"twelve\x00chars", "it has characters other than letters, digits and ASCII punctuation, which not every terminal and file sends alike"},
	} {
		got, err := Parse(tt.text)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%q: %v", tt.text, err)
		case tt.want == "":
			if got.Text() != strings.TrimSpace(tt.text) || got.Derived {
				t.Errorf("%q became %q, derived %v", tt.text, got.Text(), got.Derived)
			}
		case err == nil:
			t.Errorf("%q is accepted", tt.text)
		case err.Error() != "the token cannot be used: "+tt.want:
			t.Errorf("%q: got  %v\nwant %s", tt.text, err, tt.want)
		}
	}
}

// TestParseOwn: every machine and every later version has to derive the same.
func TestParseOwn(t *testing.T) {
	a, err := Parse("correct-horse-battery-staple\n")
	if err != nil {
		t.Fatal(err)
	}
	want := Token{ID: "7u6kl4", Secret: "kts7h02eoyw0sjzk", Derived: true}
	if a != want {
		t.Errorf("got %s, %s", a.Bearer(), a)
	}
	b, err := Parse("correct-horse-battery-Staple")
	if err != nil {
		t.Fatal(err)
	}
	if a.ID == b.ID || a.Secret == b.Secret {
		t.Error("two texts, one token")
	}
}

func TestNew(t *testing.T) {
	seen := map[string]bool{}
	chars := map[rune]int{}
	for range 1000 {
		tok, err := New()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := Parse(tok.Text()); err != nil || again != tok {
			t.Fatalf("%s: %v", tok.Text(), err)
		}
		if seen[tok.Secret] {
			t.Fatal("the same secret twice")
		}
		seen[tok.Secret] = true
		for _, c := range tok.ID + tok.Secret {
			chars[c]++
		}
	}
	if len(chars) != len(alphabet) {
		t.Errorf("only %d characters occur", len(chars))
	}
}

// TestLeaks tries every way by which values end up in logs.
func TestLeaks(t *testing.T) {
	tok := Token{ID: testID, Secret: testSecret, CAHash: testHash}
	var out bytes.Buffer
	wrapped := struct {
		T Token
		P *Token
		L []Token
		M map[string]Token
	}{tok, &tok, []Token{tok}, map[string]Token{"x": tok}}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%20v"} {
		fmt.Fprintf(&out, verb+" "+verb+" "+verb+"\n", tok, &tok, wrapped)
	}
	fmt.Fprintln(&out, tok, &tok, wrapped, fmt.Errorf("x: %v", tok))
	for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		slog.New(h).Info("m", "token", tok, "pointer", &tok, "wrapped", wrapped, slog.Group("g", "token", tok))
	}
	data, err := json.Marshal(wrapped)
	if err != nil {
		t.Fatal(err)
	}
	out.Write(data)
	if leaks := regexp.MustCompile("(?i)"+testSecret+"|"+fmt.Sprintf("%x", testSecret)).FindAllString(out.String(), -1); leaks != nil {
		t.Errorf("%d leaks:\n%s", len(leaks), out.String())
	}
	if n := strings.Count(out.String(), "token "+testID); n < 30 {
		t.Errorf("only %d tokens can be told apart:\n%s", n, out.String())
	}
	if got := (Token{}).String(); got != "no token" {
		t.Error(got)
	}
}

func TestObject(t *testing.T) {
	for _, tt := range []struct {
		role   Role
		groups string
	}{
		{Agent, "system:bootstrappers:kedge:agent"},
		{Server, "system:bootstrappers:kedge:server,system:bootstrappers:kedge:agent"},
	} {
		tok := Token{ID: testID, Secret: testSecret}
		before := time.Now()
		s := tok.Object(tt.role, time.Hour, "for the shed")
		if s.Name != "bootstrap-token-abc123" || s.Namespace != "kube-system" || s.Type != "bootstrap.kubernetes.io/token" {
			t.Errorf("%s/%s %s", s.Namespace, s.Name, s.Type)
		}
		expires := string(s.Data["expiration"])
		want := map[string]string{
			"token-id": testID, "token-secret": testSecret, "auth-extra-groups": tt.groups, "description": "for the shed",
			"usage-bootstrap-authentication": "true", "usage-bootstrap-signing": "true", "expiration": expires,
		}
		got := map[string]string{}
		for k, v := range s.Data {
			got[k] = string(v)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
		i, err := FromSecret(s)
		if err != nil {
			t.Fatal(err)
		}
		if i.Token != tok || i.Role != tt.role || i.Description != "for the shed" || i.Expires.Sub(before).Round(time.Minute) != time.Hour {
			t.Errorf("%+v", i)
		}
	}
	own := Token{ID: testID, Secret: testSecret, Derived: true}
	i, err := FromSecret(own.Object(Server, 0, ""))
	if err != nil || i.Token != own || !i.Expires.IsZero() || i.Description != "" {
		t.Errorf("%+v, %v", i, err)
	}
}

func TestFromSecret(t *testing.T) {
	for want, change := range map[string]func(data map[string][]byte){
		"":                                  func(d map[string][]byte) { delete(d, "usage-bootstrap-signing") },
		"its name and its token-id are not": func(d map[string][]byte) { d["token-id"] = []byte("zzzzzz") },
		"its token-secret is not 16":        func(d map[string][]byte) { d["token-secret"] = []byte("short") },
		`its expiration "soon" is no time`:  func(d map[string][]byte) { d["expiration"] = []byte("soon") },
		`bootstrap group "system:masters" is inv`:  func(d map[string][]byte) { d["auth-extra-groups"] = []byte("system:masters") },
		"its name and its token-id are not the sa": func(d map[string][]byte) { delete(d, "token-id") },
	} {
		s := Token{ID: testID, Secret: testSecret}.Object(Agent, 0, "")
		change(s.Data)
		if _, err := FromSecret(s); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	s := Token{ID: testID, Secret: testSecret}.Object(Agent, 0, "")
	s.Data["auth-extra-groups"] = []byte("system:bootstrappers:kubeadm:default-node-token")
	if i, err := FromSecret(s); err != nil || i.Role != "" {
		t.Errorf("%+v, %v", i, err)
	}
	s.Type = "Opaque"
	if _, err := FromSecret(s); err == nil || !strings.Contains(err.Error(), `its type is "Opaque"`) {
		t.Error(err)
	}
}

func TestParseRole(t *testing.T) {
	if r, err := ParseRole("server"); r != Server || err != nil {
		t.Error(r, err)
	}
	if _, err := ParseRole("worker"); err == nil || err.Error() != `"worker" is no role: server or agent` {
		t.Error(err)
	}
}

// FuzzParse leaves out the deriving, which is slow by intention and takes any text.
func FuzzParse(f *testing.F) {
	for _, s := range []string{testText, testText + "." + testHash, "K10a::b", "kedge agent --token x", "", ".", "..", "correct-horse-battery-staple", "ABC123.x"} {
		f.Add(s)
	}
	generated := regexp.MustCompile(`^[a-z0-9]{6}\.[a-z0-9]{16}(\.[0-9a-f]{64})?$`)
	f.Fuzz(func(t *testing.T, text string) {
		tok, own, err := split(text)
		switch {
		case err != nil:
			if tok != (Token{}) || own {
				t.Error("an error and a token")
			}
			if len(text) >= 16 && strings.Contains(err.Error(), text) {
				t.Errorf("the error shows the token: %v", err)
			}
			if generated.MatchString(text) {
				t.Error(err)
			}
		case own:
			if len(text) < minOwn || len(text) > maxOwn || strings.ContainsAny(text, ". \n") {
				t.Errorf("%q is taken for an own token", text)
			}
		default:
			if tok.Text() != text || !generated.MatchString(text) {
				t.Errorf("%q became %q", text, tok.Text())
			}
		}
	})
}
