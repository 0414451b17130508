// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/client-go/tools/clientcmd"
	certutil "k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
)

func read(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func pool(t testing.TB, pem []byte) *x509.CertPool {
	t.Helper()
	p := x509.NewCertPool()
	if !p.AppendCertsFromPEM(pem) {
		t.Fatal("no certificate")
	}
	return p
}

// meet connects a client with a server, each with a leaf and what it trusts (PEM).
func meet(t testing.TB, server, client *PKI, serverLeaf, clientLeaf Name, serverTrusts, clientTrusts []byte) error {
	t.Helper()
	load := func(p *PKI, n Name) []tls.Certificate {
		pair, err := tls.LoadX509KeyPair(p.CertFile(n), p.CertFile(n))
		if err != nil {
			t.Fatal(err)
		}
		return []tls.Certificate{pair}
	}
	c, s := net.Pipe()
	defer c.Close()
	defer s.Close()
	result := make(chan error, 1)
	go func() {
		conn := tls.Server(s, &tls.Config{Certificates: load(server, serverLeaf), ClientCAs: pool(t, serverTrusts), ClientAuth: tls.RequireAndVerifyClientCert})
		_, err := io.WriteString(conn, "hello")
		if err != nil {
			s.Close()
		}
		result <- err
	}()
	conn := tls.Client(c, &tls.Config{Certificates: load(client, clientLeaf), RootCAs: pool(t, clientTrusts), ServerName: "localhost"})
	_, err := io.ReadFull(conn, make([]byte, 5))
	if err != nil {
		c.Close()
	}
	return errors.Join(err, <-result)
}

// twoServers of one cluster.
func twoServers(t *testing.T) (a, b *PKI) {
	t.Helper()
	a = mustEnsure(t, testConfig(t.TempDir()))
	cfg := testConfig(t.TempDir())
	files := map[string][]byte{}
	for _, name := range SharedFiles() {
		files[name] = read(t, filepath.Join(a.cfg.Dir, name))
	}
	if err := Import(cfg.Dir, files); err != nil {
		t.Fatal(err)
	}
	return a, mustEnsure(t, cfg)
}

// both says that two servers and a client of old get along, in both directions.
func both(t *testing.T, when string, a, b *PKI, oldServerCA []byte) {
	t.Helper()
	for _, pair := range [][2]*PKI{{a, b}, {b, a}, {a, a}, {b, b}} {
		s, c := pair[0], pair[1]
		if err := meet(t, s, c, APIServer, KubeletClient, read(t, s.TrustFile(ClientCA)), read(t, c.TrustFile(ServerCA))); err != nil {
			t.Errorf("%s: API: %v", when, err)
		}
		if err := meet(t, s, c, EtcdPeer, EtcdPeer, read(t, s.TrustFile(EtcdCA)), read(t, c.TrustFile(EtcdCA))); err != nil {
			t.Errorf("%s: etcd: %v", when, err)
		}
		if oldServerCA != nil {
			if err := meet(t, s, c, APIServer, Admin, read(t, s.TrustFile(ClientCA)), oldServerCA); err != nil {
				t.Errorf("%s: a client that knows the old CA only: %v", when, err)
			}
		}
	}
}

func TestRotation(t *testing.T) {
	a, b := twoServers(t)
	oldCA, oldHash := read(t, a.CertFile(ServerCA)), a.CAHash()
	oldEtcd := read(t, a.CertFile(EtcdCA))
	both(t, "before", a, b, oldCA)

	id, err := a.StartRotation()
	if err != nil || len(id) != 12 || a.RotationPhase(id) != PhaseTrust || b.RotationPhase(id) != "" {
		t.Fatalf("%q, %v, %q", id, err, a.RotationPhase(id))
	}
	if again, err := a.StartRotation(); err != nil || again != id {
		t.Errorf("a second start: %s, %v", again, err)
	}
	if a.CAHash() != oldHash {
		t.Error("the new CA issues too early")
	}
	both(t, "the first trusts", a, b, oldCA)
	if err := b.SetRotationPhase(id, PhaseIssue); err == nil {
		t.Error("a server goes on with what it does not know")
	}
	if err := b.AdoptRotation(read(t, a.rotationPath())); err != nil {
		t.Fatal(err)
	}
	both(t, "both trust", a, b, oldCA)
	keys, err := keyutil.PublicKeysFromFile(b.ServiceAccountTrustFile())
	if err != nil || len(keys) != 2 {
		t.Errorf("%d service-account keys, %v", len(keys), err)
	}

	if err := a.SetRotationPhase(id, PhaseIssue); err != nil {
		t.Fatal(err)
	}
	both(t, "the first issues", a, b, oldCA)
	// A datastore member that was not started again knows the old CA only.
	if err := meet(t, b, a, EtcdPeer, EtcdPeer, oldEtcd, oldEtcd); err != nil {
		t.Errorf("a member that trusts the old CA only: %v", err)
	}
	if a.CAHash() == oldHash || !strings.HasPrefix(a.CAHash(), "sha256:"+id) {
		t.Errorf("hash %s", a.CAHash())
	}
	config, err := clientcmd.BuildConfigFromFlags("", a.cfg.AdminKubeconfigPath)
	if err != nil {
		t.Fatal(err)
	}
	if cas, err := certutil.ParseCertsPEM(config.CAData); err != nil || len(cas) != 2 || "sha256:"+HashOfCertificate(cas[0]) != a.CAHash() {
		t.Errorf("CAs in the kubeconfig: %d, %v", len(cas), err)
	}
	if _, err := tls.X509KeyPair(config.CertData, config.KeyData); err != nil {
		t.Errorf("the kubeconfig's certificate: %v", err)
	}
	// Nothing changes at a start, and renewals keep the chain.
	before := snapshot(t, a.cfg.Dir)
	a = mustEnsure(t, a.cfg)
	if got := changed(before, snapshot(t, a.cfg.Dir)); len(got) > 0 {
		t.Errorf("a start in between writes %v", got)
	}
	if _, err := a.Rotate(APIServer); err != nil {
		t.Fatal(err)
	}
	if err := b.SetRotationPhase(id, PhaseIssue); err != nil {
		t.Fatal(err)
	}
	both(t, "both issue", a, b, oldCA)

	if err := a.SetRotationPhase(id, PhaseDone); err != nil {
		t.Fatal(err)
	}
	both(t, "the first is done", a, b, nil)
	if err := meet(t, a, a, APIServer, Admin, read(t, a.TrustFile(ClientCA)), oldCA); err != nil {
		t.Errorf("a client that has not looked at its CA file yet: %v", err)
	}
	if err := b.SetRotationPhase(id, PhaseDone); err != nil {
		t.Fatal(err)
	}
	both(t, "both are done", a, b, nil)
	for _, p := range []*PKI{a, b} {
		if p.RotationPhase(id) != PhaseDone {
			t.Errorf("phase %q", p.RotationPhase(id))
		}
		if err := p.SetRotationPhase(id, PhaseIssue); err != nil {
			t.Errorf("a phase that is over: %v", err)
		}
		if got := string(read(t, p.TrustFile(ServerCA))); got != string(read(t, p.CertFile(ServerCA))) {
			t.Errorf("still trusted: %s", got)
		}
		if keys, err := keyutil.PublicKeysFromFile(p.ServiceAccountTrustFile()); err != nil || len(keys) != 1 {
			t.Errorf("%d service-account keys, %v", len(keys), err)
		}
		if _, err := p.Rotate(); err != nil {
			t.Fatal(err)
		}
		if err := meet(t, p, p, APIServer, Admin, read(t, p.TrustFile(ClientCA)), oldCA); err == nil {
			t.Error("a client that knows the old CA only is served after the next renewal")
		}
		both(t, "after the next renewal", p, p, nil)
		if _, err := os.Stat(p.rotationPath()); !os.IsNotExist(err) {
			t.Errorf("the old keys are left: %v", err)
		}
	}
	if got := bad(a.Status()); got != "" {
		t.Errorf("status: %s", got)
	}
	if err := b.AdoptRotation([]byte(before[RotationFile])); err == nil || !strings.Contains(err.Error(), "does not begin with this server's CA") {
		t.Errorf("a change that is over: %v", err)
	}
}

// TestRotationInterrupted: the power fails between the files of a phase.
func TestRotationInterrupted(t *testing.T) {
	a, b := twoServers(t)
	id, err := a.StartRotation()
	if err != nil {
		t.Fatal(err)
	}
	r := *a.rotation
	r.Phase = PhaseIssue
	if err := a.saveRotation(&r); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(a.KeyFile(ServerCA), r.New["server-ca.key"], 0o600); err != nil { // its certificate is the old one
		t.Fatal(err)
	}
	a = mustEnsure(t, a.cfg)
	if a.RotationPhase(id) != PhaseIssue || !strings.HasPrefix(a.CAHash(), "sha256:"+id) {
		t.Errorf("phase %q, %s", a.RotationPhase(id), a.CAHash())
	}
	both(t, "after the start", a, b, nil)

	if err := os.WriteFile(a.rotationPath(), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Ensure(t.Context(), a.cfg); err == nil || !strings.Contains(err.Error(), "rotation.json is damaged") {
		t.Errorf("a damaged file: %v", err)
	}
}

// TestRotationOwnCA: the operator's own CAs are taken.
func TestRotationOwnCA(t *testing.T) {
	a := mustEnsure(t, testConfig(t.TempDir()))
	own := mustEnsure(t, testConfig(t.TempDir()))
	next := filepath.Join(a.cfg.Dir, nextDir)
	if err := os.Mkdir(next, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"server-ca.crt", "server-ca.key"} {
		if err := os.WriteFile(filepath.Join(next, name), read(t, filepath.Join(own.cfg.Dir, name)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	id, err := a.StartRotation()
	if err != nil || !strings.HasPrefix(own.CAHash(), "sha256:"+id) {
		t.Errorf("%s, %v, want %s", id, err, own.CAHash())
	}
}

func FuzzParseRotation(f *testing.F) {
	cfg := testConfig(f.TempDir())
	p, err := Ensure(f.Context(), cfg)
	if err != nil {
		f.Fatal(err)
	}
	if _, err := p.StartRotation(); err != nil {
		f.Fatal(err)
	}
	f.Add(read(f, p.rotationPath()))
	f.Add([]byte(`{"phase": "trust", "new": {"server-ca.crt": "AAAA"}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseRotation(data)
		if err != nil {
			return
		}
		if _, err := json.Marshal(r); err != nil || len(r.ID) != 12 {
			t.Errorf("accepted %q: %v", data, err)
		}
	})
}
