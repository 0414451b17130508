// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/kedge-io/kedge/tests/history"
)

// api keeps ConfigMaps as an API server does, and gives answers as they come while servers die.
type api struct {
	// spoil is called with every write that has been carried out. It may answer in its own way, or break the store.
	spoil func(a *api, w http.ResponseWriter, name string) bool

	mu      sync.Mutex
	version int
	maps    map[string]configMap
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	name, _ := strings.CutPrefix(strings.TrimPrefix(r.URL.Path, "/api/v1/namespaces/ns/configmaps"), "/")
	if r.Method == http.MethodGet && name == "" {
		var l struct{ Items []configMap }
		for _, m := range a.maps {
			l.Items = append(l.Items, m)
		}
		answer(w, http.StatusOK, l)
		return
	}
	var m configMap
	if r.Method != http.MethodGet {
		if err := json.NewDecoder(r.Body).Decode(&m); err != nil {
			answer(w, http.StatusBadRequest, err.Error())
			return
		}
		name = m.Metadata.Name
	}
	old, exists := a.maps[name]
	switch {
	case r.Method == http.MethodGet && !exists:
		answer(w, http.StatusNotFound, map[string]string{"reason": "NotFound", "message": name})
		return
	case r.Method == http.MethodGet:
		answer(w, http.StatusOK, old)
		return
	case m.Metadata.ResourceVersion != old.Metadata.ResourceVersion:
		answer(w, http.StatusConflict, map[string]string{"reason": "Conflict"})
		return
	}
	a.version++
	m.Metadata.ResourceVersion = strconv.Itoa(a.version)
	a.maps[name] = m
	if a.spoil != nil && a.spoil(a, w, name) {
		return
	}
	answer(w, http.StatusOK, m)
}

func answer(w http.ResponseWriter, code int, body any) {
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // the client may be gone
}

// record lets the writer work for a moment and returns its history.
func record(t *testing.T, a *api) history.History {
	t.Helper()
	a.maps = map[string]configMap{}
	s := httptest.NewUnstartedServer(a)
	s.EnableHTTP2 = true
	s.StartTLS()
	defer s.Close()
	dir := t.TempDir()
	o := options{
		server: s.URL, namespace: "ns", kubeconfig: filepath.Join(dir, "kubeconfig"), out: filepath.Join(dir, "history"),
		writers: 3, readers: 2, rate: 200, duration: time.Second, timeout: 500 * time.Millisecond,
	}
	writeKubeconfig(t, o.kubeconfig, s)
	if err := run(o); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(o.out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, err := history.Read(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(h.Summary())
	return h
}

// writeKubeconfig writes one with the certificate of the test server for both ends, which it does not look at.
func writeKubeconfig(t *testing.T, file string, s *httptest.Server) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(s.TLS.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	text, err := yaml.Marshal(map[string]any{
		"clusters": []any{map[string]any{"cluster": map[string]any{"certificate-authority-data": cert, "server": "https://elsewhere"}}},
		"users":    []any{map[string]any{"user": map[string]any{"client-certificate-data": cert, "client-key-data": key}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestGoodStore(t *testing.T) {
	h := record(t, &api{})
	if err := h.Check(); err != nil {
		t.Error(err)
	}
	sum := h.Summary()
	if sum["put ok"] < 50 || sum["get ok"] < 50 || sum["list ok"] < 2 {
		t.Error("that is little")
	}
	keys := map[string]bool{}
	for _, op := range h {
		keys[op.Key] = true
	}
	if !keys["w0"] || !keys["w2"] || !keys[fmt.Sprintf("w1-%d", createEvery-1)] {
		t.Errorf("keys %v", keys)
	}
	if s := h.Slowest(); s.Attempts != 1 {
		t.Errorf("a write needed %d attempts", s.Attempts)
	}
}

// TestLostAnswers: writes that were carried out and not acknowledged are repeated, and the history is right.
func TestLostAnswers(t *testing.T) {
	h := record(t, &api{spoil: func(_ *api, w http.ResponseWriter, _ string) bool {
		switch rand.IntN(10) {
		case 0:
			panic(http.ErrAbortHandler) // the connection breaks
		case 1:
			answer(w, http.StatusServiceUnavailable, "etcdserver: leader changed")
		default:
			return false
		}
		return true
	}})
	if err := h.Check(); err != nil {
		t.Error(err)
	}
	unknown := 0
	for what, n := range h.Summary() {
		if strings.HasPrefix(what, "put unknown") {
			unknown += n
		}
	}
	if s := h.Slowest(); unknown == 0 || s.Attempts < 2 {
		t.Errorf("%d answers were lost, most attempts %+v", unknown, s)
	}
}

// TestBadStores: what a broken cluster does is found.
func TestBadStores(t *testing.T) {
	for name, spoil := range map[string]func(*api, http.ResponseWriter, string) bool{
		"a write is lost later": func(a *api, _ http.ResponseWriter, name string) bool {
			if a.version == 100 {
				delete(a.maps, "w0")
			}
			return false
		},
		"a created key vanishes": func(a *api, w http.ResponseWriter, name string) bool {
			if name != fmt.Sprintf("w1-%d", createEvery-1) {
				return false
			}
			answer(w, http.StatusCreated, a.maps[name])
			delete(a.maps, name)
			return true
		},
		"a write that failed appears": func(a *api, w http.ResponseWriter, _ string) bool {
			if a.version == 100 {
				answer(w, http.StatusForbidden, "no")
			}
			return a.version == 100
		},
	} {
		if err := record(t, &api{spoil: spoil}).Check(); err == nil {
			t.Errorf("%s: not found", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
}

func TestKubeconfig(t *testing.T) {
	for name, text := range map[string]string{
		"no YAML":     "\t",
		"empty":       "",
		"no key":      "clusters: [{}]\nusers: [{}]",
		"two of them": "clusters: [{},{}]\nusers: [{}]",
	} {
		file := filepath.Join(t.TempDir(), "kubeconfig")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readKubeconfig(file); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
