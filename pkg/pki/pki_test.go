// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/tools/clientcmd"
	certutil "k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"

	"github.com/kedge-io/kedge/tests/golden"
)

func testConfig(dir string) Config {
	return Config{
		Dir:                 filepath.Join(dir, "pki"),
		NodeName:            "node1",
		NodeIPs:             []netip.Addr{netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("2001:db8::10")},
		AdvertiseAddress:    netip.MustParseAddr("192.0.2.10"),
		ServiceIPs:          []netip.Addr{netip.MustParseAddr("10.43.0.1")},
		ExtraSANs:           []string{"kedge.example.org", "203.0.113.7"},
		AdminKubeconfigPath: filepath.Join(dir, "etc", "kubeconfig.yaml"),
		Logger:              slog.New(slog.DiscardHandler),
	}
}

func mustEnsure(t *testing.T, cfg Config) *PKI {
	t.Helper()
	p, err := Ensure(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// snapshot returns the contents of all files below dir by relative path.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		files[strings.TrimPrefix(path, dir+"/")] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// changed lists the paths whose contents differ between two snapshots.
func changed(before, after map[string]string) []string {
	var out []string
	for path, data := range after {
		if old, ok := before[path]; !ok || old != data {
			out = append(out, path)
		}
	}
	for path := range before {
		if _, ok := after[path]; !ok {
			out = append(out, path+" (gone)")
		}
	}
	slices.Sort(out)
	return out
}

func describe(name Name, cert *x509.Certificate, now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n  subject: %s\n  issuer: %s\n", name, cert.Subject, cert.Issuer)
	fmt.Fprintf(&b, "  from %s for %d days from now\n", cert.NotBefore.Format(time.DateOnly), cert.NotAfter.Sub(now)/day)
	fmt.Fprintf(&b, "  key: %s, signature: %s\n", cert.PublicKeyAlgorithm, cert.SignatureAlgorithm)
	for bit, usage := range map[x509.KeyUsage]string{
		x509.KeyUsageCertSign: "cert sign", x509.KeyUsageCRLSign: "crl sign", x509.KeyUsageKeyEncipherment: "key encipherment",
	} {
		if (cert.KeyUsage&bit != 0) != (cert.IsCA && bit != x509.KeyUsageKeyEncipherment) {
			fmt.Fprintf(&b, "  unexpected for %s\n", usage)
		}
	}
	for _, usage := range cert.ExtKeyUsage {
		fmt.Fprintf(&b, "  usage: %s\n", map[x509.ExtKeyUsage]string{
			x509.ExtKeyUsageServerAuth: "server", x509.ExtKeyUsageClientAuth: "client"}[usage])
	}
	for _, dns := range cert.DNSNames {
		fmt.Fprintf(&b, "  dns: %s\n", dns)
	}
	for _, ip := range cert.IPAddresses {
		fmt.Fprintf(&b, "  ip: %s\n", ip)
	}
	return regexp.MustCompile(`-[0-9a-f]{8}\n`).ReplaceAllString(b.String(), "-HASH\n")
}

func TestCertificates(t *testing.T) {
	p := mustEnsure(t, testConfig(t.TempDir()))
	now := time.Now().Add(-time.Hour)
	var b strings.Builder
	for _, s := range p.Status() {
		if s.Name == AdminKubeconfig {
			continue
		}
		certs, err := certutil.CertsFromFile(p.CertFile(s.Name))
		if err != nil || len(certs) != 1 {
			t.Fatalf("%s: %d certificates, %v", s.Name, len(certs), err)
		}
		b.WriteString(describe(s.Name, certs[0], now))
		if _, err := keyutil.PrivateKeyFromFile(p.KeyFile(s.Name)); err != nil {
			t.Errorf("%s: %v", s.Name, err)
		}
		if s.Warning != "" || (s.RenewAt.IsZero() != s.Name.isCA()) {
			t.Errorf("status %+v", s)
		}
	}
	golden.Compare(t, "testdata/certificates.golden", b.String())
	if ok := regexp.MustCompile(`^sha256:[0-9a-f]{64}$`).MatchString(p.CAHash()); !ok {
		t.Errorf("CAHash %q", p.CAHash())
	}
	// The API server verifies tokens with the same file that signs them.
	if keys, err := keyutil.PublicKeysFromFile(p.KeyFile(ServiceAccount)); err != nil || len(keys) != 1 {
		t.Errorf("public keys of the service-account key: %d, %v", len(keys), err)
	}
}

func TestKubeconfigs(t *testing.T) {
	dir := t.TempDir()
	p := mustEnsure(t, testConfig(dir))
	data, err := os.ReadFile(p.KubeconfigFile(KubeletClient))
	if err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "testdata/kubelet-client.kubeconfig.golden", strings.ReplaceAll(string(data), dir, "DIR"))
	for _, name := range []Name{Admin, KedgeController, KubeletClient} {
		config, err := clientcmd.BuildConfigFromFlags("", p.KubeconfigFile(name))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if config.Host != "https://127.0.0.1:6443" {
			t.Errorf("%s: server %s", name, config.Host)
		}
		if embedded := config.CAFile == "" && config.CertFile == "" && config.KeyFile == ""; embedded != (name == Admin) {
			t.Errorf("%s: embedded %v", name, embedded)
		}
	}
}

func TestEnsureKeepsEverything(t *testing.T) {
	dir := t.TempDir()
	cfg := testConfig(dir)
	mustEnsure(t, cfg)
	before := snapshot(t, dir)
	inodes := func() map[string]string {
		out := map[string]string{}
		for path := range before {
			info, err := os.Stat(filepath.Join(dir, path))
			if err != nil {
				t.Fatal(err)
			}
			out[path] = fmt.Sprintf("%v %+v", info.ModTime(), info.Sys())
		}
		return out
	}
	stats := inodes()
	slices.Reverse(cfg.NodeIPs) // an order that changes is no change
	mustEnsure(t, cfg)
	if got := changed(before, snapshot(t, dir)); len(got) > 0 {
		t.Errorf("changed: %v", got)
	}
	for path, stat := range inodes() {
		// Access times change with reading.
		atime := regexp.MustCompile(`Atim:\{[^}]*\}`)
		if atime.ReplaceAllString(stat, "") != atime.ReplaceAllString(stats[path], "") {
			t.Errorf("%s was written again", path)
		}
	}
}

func TestReissueOnChange(t *testing.T) {
	tests := map[string]struct {
		change func(*Config)
		want   []string
	}{
		"node IP": {
			func(c *Config) { c.NodeIPs = []netip.Addr{netip.MustParseAddr("192.0.2.11")} },
			[]string{"apiserver.pem", "etcd-peer.pem", "kubelet-serving.pem"},
		},
		"node name": {
			func(c *Config) { c.NodeName = "node2" },
			[]string{"apiserver.pem", "etcd-peer.pem", "kedge-server.pem", "kubelet-client.pem", "kubelet-serving.pem"},
		},
		"SAN":            {func(c *Config) { c.ExtraSANs = []string{"*.example.org"} }, []string{"apiserver.pem"}},
		"no SAN":         {func(c *Config) { c.ExtraSANs = nil }, []string{"apiserver.pem"}},
		"cluster domain": {func(c *Config) { c.ClusterDomain = "kedge.internal" }, []string{"apiserver.pem"}},
		"service range": {
			func(c *Config) { c.ServiceIPs = []netip.Addr{netip.MustParseAddr("10.96.0.1")} }, []string{"apiserver.pem"},
		},
		"port": {
			func(c *Config) { c.APIPort = 7443 },
			[]string{"../etc/kubeconfig.yaml", "kedge-controller.kubeconfig",
				"kubelet-client.kubeconfig"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			var log bytes.Buffer
			cfg := testConfig(dir)
			cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
			mustEnsure(t, cfg)
			before := snapshot(t, dir)
			log.Reset()
			test.change(&cfg)
			mustEnsure(t, cfg)
			var want []string
			for _, f := range test.want {
				want = append(want, filepath.Join("pki", f))
				if n, ok := strings.CutSuffix(f, ".pem"); ok && !strings.Contains(log.String(), "name="+n+" reason=") {
					t.Errorf("the log does not say that %s was issued: %s", n, log.String())
				}
			}
			if diff := cmp.Diff(want, changed(before, snapshot(t, dir))); diff != "" {
				t.Errorf("changed files (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDamage(t *testing.T) {
	remove := func(t *testing.T, path string) {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	truncate := func(t *testing.T, path string) {
		if err := os.Truncate(path, 100); err != nil {
			t.Fatal(err)
		}
	}
	empty := func(t *testing.T, path string) {
		if err := os.Truncate(path, 0); err != nil {
			t.Fatal(err)
		}
	}
	// from replaces a file by another one of the same directory.
	from := func(name string) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			data, err := os.ReadFile(filepath.Join(filepath.Dir(path), name))
			if err == nil {
				err = os.WriteFile(path, data, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	certOnly := func(name string) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			certs, err := certutil.CertsFromFile(filepath.Join(filepath.Dir(path), name))
			if err != nil {
				t.Fatal(err)
			}
			data, err := certutil.EncodeCertificates(certs...)
			if err := errors.Join(err, os.WriteFile(path, data, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
	}
	mixed := func(t *testing.T, path string) { // the certificate of one pair with the key of another
		cert, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		key, err := os.ReadFile(filepath.Join(filepath.Dir(path), "client-ca.key"))
		if err != nil {
			t.Fatal(err)
		}
		end := bytes.Index(cert, []byte("-----BEGIN EC"))
		if err := os.WriteFile(path, append(cert[:end:end], key...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		file    string
		how     string
		damage  func(*testing.T, string)
		wantErr []string // empty: Ensure repairs
		want    []string // files that it writes
	}{
		{"apiserver.pem", "lost", remove, nil, []string{"apiserver.pem"}},
		{"apiserver.pem", "truncated", truncate, nil, []string{"apiserver.pem"}},
		{"apiserver.pem", "empty", empty, nil, []string{"apiserver.pem"}},
		{"apiserver.pem", "mismatched", mixed, nil, []string{"apiserver.pem"}},
		{"etcd-peer.pem", "of another CA", from("apiserver.pem"), nil, []string{"etcd-peer.pem"}},
		{"admin.pem", "lost", remove, nil, []string{"../etc/kubeconfig.yaml", "admin.pem"}},
		{"../etc/kubeconfig.yaml", "lost", remove, nil, []string{"../etc/kubeconfig.yaml"}},
		{"../etc/kubeconfig.yaml", "empty", empty, nil, []string{"../etc/kubeconfig.yaml"}},
		{"kubelet-client.kubeconfig", "lost", remove, nil, []string{"kubelet-client.kubeconfig"}},
		{"service-account.key", "lost", remove, nil, []string{"service-account-trusted.key", "service-account.key"}},
		// A CA's certificate can be made anew for its key; everything it has signed stays valid.
		{"client-ca.crt", "lost", remove, nil, []string{"client-ca-trusted.crt", "client-ca.crt"}},

		{"server-ca.key", "lost", remove, []string{"server-ca.key is missing", "server-ca.crt exists", "restore"}, nil},
		{"server-ca.key", "truncated", truncate, []string{"server-ca.key is damaged", "restore"}, nil},
		{"server-ca.key", "empty", empty, []string{"server-ca.key is damaged", "restore"}, nil},
		{"server-ca.key", "of another CA", from("client-ca.key"), []string{"server-ca.crt", "do not belong together", "restore"}, nil},
		{"server-ca.crt", "truncated", truncate, []string{"server-ca.crt", "restore"}, nil},
		{"server-ca.crt", "not a CA", from("apiserver.pem"), []string{"server-ca.crt", "it holds a private key"}, nil},
		{"server-ca.crt", "not a CA", certOnly("apiserver.pem"), []string{"server-ca.crt", "not that of a CA"}, nil},
		{"server-ca.crt", "of another CA", from("client-ca.crt"), []string{"server-ca.crt", "do not belong together"}, nil},
		{"service-account.key", "truncated", truncate, []string{"service-account.key is damaged", "restore"}, nil},
		{"keyring.key", "lost", remove, nil, []string{"keyring.key"}},
		{"keyring.key", "truncated", truncate, []string{"keyring.key is damaged", "restore"}, nil},
		{"encryption.yaml", "truncated", truncate, []string{"encryption.yaml is damaged", "restore"}, nil},
		{"encryption.yaml", "empty", empty, []string{"encryption.yaml is damaged", "restore"}, nil},
		{"encryption.yaml", "lost", remove, []string{"encryption.yaml is missing", "run before", "restore"}, nil},
	}
	for _, test := range tests {
		t.Run(test.file+" "+test.how, func(t *testing.T) {
			dir := t.TempDir()
			cfg := testConfig(dir)
			old := mustEnsure(t, cfg)
			test.damage(t, filepath.Join(cfg.Dir, test.file))
			damaged := snapshot(t, dir)
			p, err := Ensure(t.Context(), cfg)
			after := snapshot(t, dir)
			if test.wantErr != nil {
				if err == nil {
					t.Fatal("no error")
				}
				for _, part := range test.wantErr {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("error %q does not say %q", err, part)
					}
				}
				if got := changed(damaged, after); len(got) > 0 {
					t.Errorf("written in spite of the error: %v", got)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			for _, f := range test.want {
				want = append(want, filepath.Join("pki", f))
			}
			if diff := cmp.Diff(want, changed(damaged, after)); diff != "" {
				t.Errorf("changed files (-want +got):\n%s", diff)
			}
			if p.CAHash() != old.CAHash() {
				t.Error("CAHash changed")
			}
		})
	}
}

// TestReplaceAuthority: without certificate and key a new CA is made, and what the old one had signed is issued anew.
func TestReplaceAuthority(t *testing.T) {
	cfg := testConfig(t.TempDir())
	old := mustEnsure(t, cfg)
	before := snapshot(t, cfg.Dir)
	if err := errors.Join(os.Remove(old.CertFile(EtcdCA)), os.Remove(old.KeyFile(EtcdCA))); err != nil {
		t.Fatal(err)
	}
	p := mustEnsure(t, cfg)
	want := []string{"etcd-ca-trusted.crt", "etcd-ca.crt", "etcd-ca.key", "etcd-peer.pem"}
	if diff := cmp.Diff(want, changed(before, snapshot(t, cfg.Dir))); diff != "" {
		t.Errorf("changed files (-want +got):\n%s", diff)
	}
	handshake(t, p, EtcdPeer, EtcdPeer, EtcdCA, EtcdCA, "localhost")
}

func TestInterruptedFirstStart(t *testing.T) {
	dir := t.TempDir()
	cfg := testConfig(dir)
	mustEnsure(t, cfg)
	// Power was lost after the keys were written and before any certificate was; one write has left its temporary file.
	for path := range snapshot(t, dir) {
		if !strings.HasSuffix(path, ".key") && !strings.HasSuffix(path, "encryption.yaml") {
			if err := os.Remove(filepath.Join(dir, path)); err != nil {
				t.Fatal(err)
			}
		}
	}
	before := snapshot(t, dir)
	for _, leftover := range []string{"pki/.server-ca.crt123", "etc/.kubeconfig.yaml456"} {
		if err := os.WriteFile(filepath.Join(dir, leftover), []byte("-----BEGIN"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mustEnsure(t, cfg)
	after := snapshot(t, dir)
	for path, data := range before {
		if after[path] != data {
			t.Errorf("%s changed", path)
		}
	}
	for path := range after {
		if strings.HasPrefix(filepath.Base(path), ".") {
			t.Errorf("%s is left", path)
		}
	}
}

func TestPermissions(t *testing.T) {
	dir := t.TempDir()
	cfg := testConfig(dir)
	check := func(adminMode fs.FileMode) {
		t.Helper()
		for path := range snapshot(t, dir) {
			info, err := os.Stat(filepath.Join(dir, path))
			if err != nil {
				t.Fatal(err)
			}
			want := fs.FileMode(0o600)
			if path == "etc/kubeconfig.yaml" {
				want = adminMode
			}
			if info.Mode() != want {
				t.Errorf("%s: mode %v, want %v", path, info.Mode(), want)
			}
		}
		info, err := os.Stat(cfg.Dir)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o700 {
			t.Errorf("directory: %v", info.Mode())
		}
	}
	mustEnsure(t, cfg)
	check(0o600)
	// Files that were restored or copied carelessly are closed again.
	for _, f := range []string{"", "server-ca.key", "admin.pem", "encryption.yaml", "service-account.key", "keyring.key"} {
		if err := os.Chmod(filepath.Join(cfg.Dir, f), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cfg.AdminKubeconfigMode = 0o644
	mustEnsure(t, cfg)
	check(0o644)
}

func TestConfigErrors(t *testing.T) {
	tests := map[string]struct {
		change func(*Config)
		want   string
	}{
		"no directory": {func(c *Config) { c.Dir = "" }, "no directory"},
		"node name":    {func(c *Config) { c.NodeName = "Node_1" }, `node name "Node_1"`},
		"SAN":          {func(c *Config) { c.ExtraSANs = []string{"a b"} }, `tls-san "a b"`},
		"SAN port":     {func(c *Config) { c.ExtraSANs = []string{"host:6443"} }, `tls-san "host:6443"`},
		"address":      {func(c *Config) { c.NodeIPs = make([]netip.Addr, 1) }, "empty address"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			cfg := testConfig(dir)
			test.change(&cfg)
			if _, err := Ensure(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			if files := snapshot(t, dir); len(files) > 0 {
				t.Errorf("written in spite of the error: %v", files)
			}
		})
	}
}

func TestParallelEnsure(t *testing.T) {
	cfg := testConfig(t.TempDir())
	hashes := make([]string, 8)
	var wg sync.WaitGroup
	for i := range hashes {
		wg.Go(func() {
			p, err := Ensure(t.Context(), cfg)
			if err != nil {
				t.Error(err)
				return
			}
			hashes[i] = p.CAHash() + p.leaves[Admin].SerialNumber.String()
		})
	}
	wg.Wait()
	if len(slices.Compact(hashes)) != 1 {
		t.Errorf("calls disagree: %v", hashes)
	}
}

// TestOwnCA: an operator's CA, here an RSA intermediate, is used as it is.
func TestOwnCA(t *testing.T) {
	cfg := testConfig(t.TempDir())
	rootKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true}
	begin := time.Now().Add(-time.Hour).Truncate(time.Second)
	intermediate := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "site"}, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: begin, NotAfter: begin.Add(5 * 365 * day),
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, intermediate, root, key.Public(), rootKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	certPEM, err := certutil.EncodeCertificates(cert)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	err = errors.Join(os.WriteFile(filepath.Join(cfg.Dir, "server-ca.crt"), certPEM, 0o644),
		os.WriteFile(filepath.Join(cfg.Dir, "server-ca.key"), keyPEM, 0o644))
	if err != nil {
		t.Fatal(err)
	}
	p := mustEnsure(t, cfg)
	if got := p.leaves[APIServer]; got.Issuer.CommonName != "site" || got.NotBefore.Before(begin) {
		t.Errorf("API server's certificate: issuer %s, from %s", got.Issuer, got.NotBefore)
	}
	handshake(t, p, APIServer, Admin, ServerCA, ClientCA, "kubernetes.default.svc")

	if err := os.WriteFile(filepath.Join(cfg.Dir, "server-ca.crt"), append(certPEM, certPEM...), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Ensure(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "2 certificates instead of one") {
		t.Errorf("a bundle as CA: error %v", err)
	}
}

func TestHandshakes(t *testing.T) {
	p := mustEnsure(t, testConfig(t.TempDir()))
	for _, test := range []struct {
		server, client, serverCA, clientCA Name
		as                                 string
	}{
		{APIServer, Admin, ServerCA, ClientCA, "127.0.0.1"},
		{APIServer, KubeletClient, ServerCA, ClientCA, "::1"},
		{APIServer, KedgeController, ServerCA, ClientCA, "kubernetes.default.svc.cluster.local"},
		{APIServer, KedgeController, ServerCA, ClientCA, "10.43.0.1"},
		{APIServer, Admin, ServerCA, ClientCA, "kedge.example.org"},
		{KubeletServing, APIServerKubeletClient, ServerCA, ClientCA, "192.0.2.10"},
		{APIServer, FrontProxyClient, ServerCA, RequestHeaderCA, "localhost"},
		{EtcdPeer, EtcdPeer, EtcdCA, EtcdCA, "2001:db8::10"},
	} {
		t.Run(fmt.Sprintf("%s to %s as %s", test.client, test.server, test.as), func(t *testing.T) {
			handshake(t, p, test.server, test.client, test.serverCA, test.clientCA, test.as)
		})
	}
}

// handshake checks a connection with the same calls that the components use to load their files.
func handshake(t *testing.T, p *PKI, server, client, serverCA, clientCA Name, as string) {
	t.Helper()
	load := func(n Name) tls.Certificate {
		pair, err := tls.LoadX509KeyPair(p.CertFile(n), p.KeyFile(n))
		if err != nil {
			t.Fatal(err)
		}
		return pair
	}
	pool := func(n Name) *x509.CertPool {
		pool, err := certutil.NewPool(p.CertFile(n))
		if err != nil {
			t.Fatal(err)
		}
		return pool
	}
	c, s := net.Pipe()
	defer c.Close()
	defer s.Close()
	result := make(chan error, 1)
	go func() {
		conn := tls.Server(s, &tls.Config{
			Certificates: []tls.Certificate{load(server)}, ClientCAs: pool(clientCA), ClientAuth: tls.RequireAndVerifyClientCert,
		})
		_, err := io.WriteString(conn, "hello")
		result <- err
	}()
	conn := tls.Client(c, &tls.Config{Certificates: []tls.Certificate{load(client)}, RootCAs: pool(serverCA), ServerName: as})
	_, err := io.ReadFull(conn, make([]byte, 5))
	if err := errors.Join(err, <-result); err != nil {
		t.Error(err)
	}
}

func BenchmarkFirstStart(b *testing.B) {
	for b.Loop() {
		if _, err := Ensure(b.Context(), testConfig(b.TempDir())); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLaterStart(b *testing.B) {
	cfg := testConfig(b.TempDir())
	for b.Loop() {
		if _, err := Ensure(b.Context(), cfg); err != nil {
			b.Fatal(err)
		}
	}
}
