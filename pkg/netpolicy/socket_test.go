// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/pkg/netpolicy/announce"
)

// FuzzSocket sends anything to the socket's handler: nothing may get out of the directory, or be noted that is not valid.
func FuzzSocket(f *testing.F) {
	f.Add("POST", announce.Path, `{"container":"c","namespace":"a","name":"p","addresses":["10.42.0.2"]}`)
	f.Add("PUT", announce.Path, `{"container":"../c","namespace":"a","name":"p","addresses":["10.42.0.2"]}`)
	f.Add("DELETE", announce.Path+"/..%2fx", "")
	f.Add("POST", tracePath, `{"from":"10.42.0.2","to":"fd00::1","protocol":"tcp","port":80}`)
	f.Fuzz(func(t *testing.T, method, path, body string) {
		r, err := http.NewRequestWithContext(t.Context(), method, "http://kedge/", strings.NewReader(body))
		if err != nil {
			return
		}
		r.URL.Path = path
		dir := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dir, "x.json"), nil, 0o600))
		c := &Controller{cfg: Config{Dir: filepath.Join(dir, "in")}, kick: make(chan struct{}, 1), urgent: make(chan struct{}, 1),
			records: map[string]*record{}, loaded: make(chan struct{})}
		must(t, os.Mkdir(c.cfg.Dir, 0o700))
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // nobody loads rules: do not wait for them
		c.handler().ServeHTTP(httptest.NewRecorder(), r.WithContext(ctx))
		for id, record := range c.records {
			if record.Validate() != nil || record.Container != id {
				t.Errorf("noted: %+v", record)
			}
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
			t.Errorf("%v, %v", entries, err)
		}
	})
}

// TestTrace asks through the socket, and the answer is the kernel's.
func TestTrace(t *testing.T) {
	b := newBed(t)
	b.pod("a", "server", tags{"app": "server"}, "10.42.0.2", "fd00:42::2")
	b.pod("a", "client", tags{"app": "client"}, "10.42.0.3", "fd00:42::3")
	b.policy("a", "deny", denyIngress)
	b.policy("a", "allow", `
podSelector: {matchLabels: {app: server}}
ingress:
- from: [{podSelector: {matchLabels: {app: client}}}, {ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.64/26]}}]
  ports: [{port: web}, {port: 9000, endPort: 9010, protocol: UDP}]`)
	for _, test := range []struct {
		from, to, proto string
		port            uint16
		egress, ingress string // verdict and policies
	}{
		{"10.42.0.3", "10.42.0.2", "tcp", 8080, "allowed", "allowed a/allow"},
		{"fd00:42::3", "fd00:42::2", "tcp", 8080, "allowed", "allowed a/allow"},
		{"10.42.0.3", "10.42.0.2", "udp", 9005, "allowed", "allowed a/allow"},
		{"10.42.0.3", "10.42.0.2", "tcp", 9005, "allowed", "denied a/allow a/deny"},
		{"10.42.0.2", "10.42.0.3", "tcp", 8080, "allowed", "denied a/deny"},
		{"192.0.2.1", "10.42.0.2", "tcp", 8080, "", "allowed a/allow"},
		{"192.0.2.65", "10.42.0.2", "tcp", 8080, "", "denied a/allow a/deny"},
		{"10.42.0.2", "192.0.2.1", "tcp", 80, "allowed", ""},
		{"10.42.0.77", "10.42.0.2", "tcp", 80, "denied no pod", "denied a/allow a/deny"},
		{"10.42.0.1", "10.42.0.2", "tcp", 80, "", "allowed the node"},
		{"10.42.0.2", "10.42.0.2", "tcp", 80, "allowed", "allowed itself"},
	} {
		answer, err := Query(t.Context(), b.cfg.Socket, Question{From: addr(test.from), To: addr(test.to), Protocol: test.proto, Port: test.port})
		must(t, err)
		for want, got := range map[string]*Decision{"egress " + test.egress: answer.Egress, "ingress " + test.ingress: answer.Ingress} {
			if text := strings.Fields(want)[0] + " " + decisionText(got); !matchesText(text, want) || answer.Node != testNode {
				t.Errorf("%s → %s %s/%d: %s, want %s", test.from, test.to, test.proto, test.port, text, want)
			}
		}
	}
	for _, q := range []Question{
		{From: addr("10.0.0.1"), To: addr("fd00::1"), Protocol: "tcp"}, {From: addr("10.0.0.1"), Protocol: "tcp"}, {From: addr("10.0.0.1"), To: addr("10.0.0.2"), Protocol: "icmp"},
	} {
		if _, err := Query(t.Context(), b.cfg.Socket, q); err == nil {
			t.Errorf("%+v: no error", q)
		}
	}
	b.nft("delete table inet kedge-netpol")
	if _, err := Query(t.Context(), b.cfg.Socket, Question{From: addr("10.42.0.3"), To: addr("10.42.0.2"), Protocol: "tcp", Port: 8080}); err == nil || !strings.Contains(err.Error(), "no rules are loaded") {
		t.Errorf("without a table: %v", err)
	}
}

func decisionText(d *Decision) string {
	if d == nil {
		return ""
	}
	verdict := "denied"
	if d.Allowed {
		verdict = "allowed"
	}
	return strings.TrimSpace(verdict + " " + strings.Join(d.Policies, " ") + d.Reason)
}

// matchesText wants the words of want in order, and nothing where it has nothing.
func matchesText(text, want string) bool {
	if len(strings.Fields(text)) == 1 || len(strings.Fields(want)) == 1 {
		return strings.TrimSpace(text) == strings.TrimSpace(want)
	}
	for _, word := range strings.Fields(want) {
		i := strings.Index(text, word)
		if i < 0 {
			return false
		}
		text = text[i:]
	}
	return true
}

// TestUnknownPod: what the API does not show is not attached, and says why.
func TestUnknownPod(t *testing.T) {
	b := newBed(t)
	ctx, cancel := context.WithTimeout(t.Context(), quick)
	defer cancel()
	err := b.ctl.announce(ctx, announce.Pod{Container: "c", Namespace: "a", Name: "none", Addresses: []netip.Addr{addr("10.42.0.9")}})
	if err == nil || !strings.Contains(err.Error(), "has not shown this pod") {
		t.Errorf("a pod that is not in the API: %v", err)
	}
	if b.known("10.42.0.9") {
		t.Error("its address is open")
	}
	// Nobody listens.
	if err := announce.Release(filepath.Join(t.TempDir(), "none.sock"), b.cfg.Dir, "c"); err != nil {
		t.Errorf("release without a node process: %v", err)
	}
	if _, err := os.Stat(announce.File(b.cfg.Dir, "c")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("announcement: %v", err)
	}
}
