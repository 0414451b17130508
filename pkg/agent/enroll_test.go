// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// credentials makes a file as the kubelet keeps it.
func credentials(t *testing.T, name string, notAfter time.Time) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: notAfter.Add(-time.Hour), NotAfter: notAfter}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})...)
}

func TestCheckCredentials(t *testing.T) {
	good := credentials(t, join.UserNodePrefix+"n1", time.Now().Add(time.Hour))
	for name, test := range map[string]struct {
		text []byte // nil: no file
		want string // of the error; empty: good
	}{
		"good":         {good, ""},
		"missing":      {nil, "no such file"},
		"damaged":      {good[:len(good)/3], ""},
		"another name": {credentials(t, join.UserNodePrefix+"n2", time.Now().Add(time.Hour)), "they are those of system:node:n2, and this node is called n1"},
		"no node's":    {credentials(t, "n1", time.Now().Add(time.Hour)), "they are those of n1"},
		"expired": {credentials(t, join.UserNodePrefix+"n1", time.Now().Add(-48*time.Hour)),
			"they have expired on " + time.Now().Add(-48*time.Hour).UTC().Format(time.DateOnly) + ", and the clock says " + time.Now().UTC().Format(time.DateOnly)},
	} {
		file := filepath.Join(t.TempDir(), "current.pem")
		if test.text != nil {
			if err := os.WriteFile(file, test.text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err := checkCredentials(file, "n1")
		if name == "damaged" {
			if err == nil {
				t.Error("damaged credentials are good")
			}
			continue
		}
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", name, err, test.want)
		}
	}
}

// A machine that cannot join says what it takes.
func TestNotPart(t *testing.T) {
	for _, test := range []struct {
		known  *Membership
		lapsed error
		want   string
	}{
		{nil, errors.New("no such file"), "this machine is not part of a cluster yet: give --server and --token (on a server: kedge token create)"},
		{nil, nil, "this machine is not part of a cluster yet: give --server and --token"},
		{&Membership{}, errors.New("they have expired"), "this node's credentials do not hold any more (they have expired): to join again, give --server and --token (on a server: kedge token create)"},
	} {
		m := testMachine(t, testConfig(t))
		if err := m.notPart(test.known, test.lapsed); err == nil || !strings.HasPrefix(err.Error(), test.want) {
			t.Errorf("got %v, want %q", err, test.want)
		}
	}
}

// A start without --server goes on where there is a membership and credentials, and only there.
func TestEnrollWithoutServer(t *testing.T) {
	api := newAPIServer(t, func(http.ResponseWriter, *http.Request) {})
	for _, test := range []struct {
		name        string
		known       *Membership
		credentials bool
		want        string
	}{
		{"a node", &Membership{Joined: true}, true, ""},
		{"new", nil, false, "not part of a cluster yet"},
		{"membership lost", nil, true, "not part of a cluster yet"},
		{"credentials lost", &Membership{Joined: true}, false, "credentials do not hold any more (open "},
	} {
		cfg := testConfig(t)
		files := pki.Agent{Dir: cfg.PKIDir(), Credentials: node.ClientCertFile(cfg.KubeletRootDir)}
		if test.credentials {
			files = api.enrolled(t, cfg)
		}
		err := testMachine(t, cfg).enroll(t.Context(), test.known, files)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", test.name, err, test.want)
		}
	}
}

// Joining does not begin without a token that can be one, and the error says where the bad one came from.
func TestTokenBeforeJoining(t *testing.T) {
	cfg := testConfig(t)
	cfg.Server = "https://127.0.0.1:1"
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("short\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ token, file, given, want string }{
		{want: "a token is needed to join https://127.0.0.1:1: give --token (on a server: kedge token create --role agent)"},
		{token: "short", given: "KEDGE_TOKEN", want: "KEDGE_TOKEN: the token cannot be used: it has 5 characters"},
		{file: file, want: file + ": the token cannot be used: it has 5 characters"},
		{file: file + ".missing", want: "token-file: open " + file + ".missing"},
	} {
		cfg.Token, cfg.TokenFile, cfg.Given["token"] = test.token, test.file, test.given
		m := testMachine(t, cfg)
		if err := m.enroll(t.Context(), nil, pki.Agent{}); err == nil || !strings.HasPrefix(err.Error(), test.want) {
			t.Errorf("got %v, want %q", err, test.want)
		}
		if phase := m.status().Phase; phase != "" {
			t.Errorf("it waited: %s", phase)
		}
	}
}

// A node that was removed while it was away learns it from any server; when none answers it goes on.
func TestCheckRegistered(t *testing.T) {
	var asked string
	gone := func(w http.ResponseWriter, r *http.Request) {
		asked = r.Method + " " + r.URL.Path + " as " + r.TLS.PeerCertificates[0].Subject.CommonName
		answer(w, http.StatusNotFound, refusal(http.StatusNotFound, metav1.StatusReasonNotFound, `nodes "n1" not found`))
	}
	there := func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: "n1"}})
	}
	forbidden := func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusForbidden, refusal(http.StatusForbidden, metav1.StatusReasonForbidden, "no"))
	}
	const dead = "127.0.0.1:1"
	for _, test := range []struct {
		name    string
		handler http.HandlerFunc
		known   []string // of servers.json, beside the one that answers
		server  bool     // the one that answers is known from --server alone
		want    error
	}{
		{"it is there", there, nil, false, nil},
		{"it is gone", gone, nil, false, errNotRegistered},
		{"one server is down, another says so", gone, []string{dead}, false, errNotRegistered},
		{"said by the one of --server", gone, []string{dead}, true, errNotRegistered},
		{"what is refused says nothing", forbidden, nil, false, nil},
		{"all are down", nil, []string{dead}, false, nil},
		{"no server is known", nil, nil, false, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			api := newAPIServer(t, test.handler)
			cfg := testConfig(t)
			files := api.enrolled(t, cfg)
			list := test.known
			if test.server {
				cfg.Server = "https://" + api.address()
			} else if test.handler != nil {
				list = append(list, api.address())
			}
			text, err := json.Marshal(map[string]any{"servers": list})
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(BalancerFile(cfg), text, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := testMachine(t, cfg).checkRegistered(t.Context(), files); !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
		})
	}
	if asked != "GET /api/v1/nodes/n1 as system:node:n1" {
		t.Errorf("it asked %s", asked)
	}
}

// A Node that has been there is remembered, once, and what the node goes by stays as it is.
func TestNoteRegistered(t *testing.T) {
	status := func(state supervise.State) []supervise.ProcessStatus {
		return []supervise.ProcessStatus{{Components: []supervise.Component{{Name: node.ComponentKubelet, State: state}, {Name: "other", State: supervise.Ready}}}}
	}
	cfg := testConfig(t)
	if err := Remember(cfg, Membership{Cluster: clusterSettings(), Joined: true}); err != nil {
		t.Fatal(err)
	}
	cfg.ClusterDomain = "edge.example" // others read it at the same time: it must not be written
	m := testMachine(t, cfg)
	m.noteRegistered(status(supervise.Running))
	if known, err := readMembership(cfg); err != nil || known.Registered {
		t.Errorf("before the kubelet is ready: %+v, %v", known, err)
	}
	m.noteRegistered(status(supervise.Ready))
	if known, err := readMembership(cfg); err != nil || !known.Registered || !known.Joined {
		t.Errorf("when it is: %+v, %v", known, err)
	}
	if cfg.ClusterDomain != "edge.example" {
		t.Error("the node's configuration was changed")
	}
	if err := os.Remove(membershipFile(cfg)); err != nil {
		t.Fatal(err)
	}
	m.noteRegistered(status(supervise.Ready))
	if known, err := readMembership(cfg); known != nil || err != nil {
		t.Errorf("written again: %+v, %v", known, err)
	}
}

// An agent whose certificate has expired asks for another one, waits while the clocks differ, and goes on when its clock is set.
func TestRenewExpired(t *testing.T) {
	var asked atomic.Int32
	answers := func(code int, reason metav1.StatusReason, message string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/readyz" { // it means what it forbids
				return
			}
			asked.Add(1)
			if r.URL.Path != join.PathRenew || r.Method != http.MethodPost || len(r.TLS.PeerCertificates) > 0 {
				t.Errorf("%s %s with %d certificates", r.Method, r.URL.Path, len(r.TLS.PeerCertificates))
			}
			answer(w, code, refusal(code, reason, message))
		}
	}
	for _, test := range []struct {
		name   string
		answer http.HandlerFunc
		set    bool   // the clock is set while it waits
		want   string // of the error
	}{
		{"removed", answers(http.StatusForbidden, metav1.StatusReasonForbidden, "it was removed from the cluster"), false, "it was removed from the cluster"},
		{"the clocks differ", answers(http.StatusConflict, "NotExpired", "set the clock"), true, ""},
	} {
		asked.Store(0)
		cfg := testConfig(t)
		api := newAPIServer(t, test.answer)
		files := api.enrolled(t, cfg)
		api.TLS.ClientAuth = tls.RequestClientCert
		good, err := os.ReadFile(files.Credentials)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(files.Credentials, credentials(t, join.UserNodePrefix+"n1", time.Now().Add(-48*time.Hour)), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg.Server = "https://" + api.address()
		m := testMachine(t, cfg)
		ended := make(chan error, 1)
		go func() { ended <- m.renewExpired(t.Context(), files, errExpired) }()
		if test.set {
			eventually(t, "it to wait with the reason", func() error {
				m.mu.Lock()
				defer m.mu.Unlock()
				if !strings.Contains(m.phase, "set the clock") {
					return errors.New(m.phase)
				}
				return nil
			})
			if err := os.WriteFile(files.Credentials, good, 0o600); err != nil { // as good as another time
				t.Fatal(err)
			}
		}
		if err := <-ended; (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) || asked.Load() == 0 {
			t.Errorf("%s: %v, asked %d times", test.name, err, asked.Load())
		}
	}
}
