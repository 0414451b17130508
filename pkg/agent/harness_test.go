// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
)

func clusterSettings() config.Cluster {
	return config.Cluster{
		ClusterCIDR: config.Prefixes{netip.MustParsePrefix("10.42.0.0/16")}, ServiceCIDR: config.Prefixes{netip.MustParsePrefix("10.43.0.0/16")},
		ClusterDNS: netip.MustParseAddr("10.43.0.10"), ClusterDomain: "cluster.local",
		ServiceNodePortRange: config.PortRange{First: 30000, Last: 32767}, FlannelBackend: config.FlannelVXLAN, ProxyMode: config.ProxyAuto,
	}
}

// testConfig is that of an agent with all of its files in a directory of the test's own.
func testConfig(t *testing.T) *config.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "kedge") // t.TempDir's names are too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg := &config.Config{
		Role: config.RoleAgent, NodeName: "n1", NodeIP: []netip.Addr{netip.MustParseAddr("192.0.2.7")}, DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"),
		KubeletRootDir: filepath.Join(dir, "kubelet"), PrivateRegistry: filepath.Join(dir, "registries.yaml"),
		Cluster: clusterSettings(), Given: map[string]string{"node-ip": "--node-ip"},
	}
	for _, d := range []string{cfg.DataDir, cfg.RunDir, cfg.PKIDir(), node.CertDir(cfg.KubeletRootDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return cfg
}

func testMachine(t *testing.T, cfg *config.Config) *Machine {
	t.Helper()
	m := New(cfg)
	m.log = slog.New(slog.NewTextHandler(t.Output(), nil))
	m.Credentials.Kubeconfig = filepath.Join(cfg.DataDir, "no-kubeconfig")
	return m
}

// serve answers on the machine's socket while run runs. The returned function ends it and gives Serve's error.
func serve(t *testing.T, m *Machine, run func(context.Context) error) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- m.Serve(ctx, run) }()
	var err error
	done := false
	stop = func() error {
		if cancel(); !done {
			done, err = true, <-ended
		}
		return err
	}
	t.Cleanup(func() { _ = stop() })
	return stop
}

// eventually waits for a condition, not for a time.
func eventually(t *testing.T, what string, cond func() error) {
	t.Helper()
	var last error
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if supervise.Poll(ctx, func() error { last = cond(); return last }) != nil {
		t.Fatalf("not within 30 seconds: %s: %v", what, last)
	}
}

// apiServer plays the API of a cluster; its certificates and those of its node n1 are real ones.
type apiServer struct {
	*httptest.Server
	pki *pki.PKI
	dir string
}

func newAPIServer(t *testing.T, handler http.HandlerFunc) *apiServer {
	t.Helper()
	a := &apiServer{dir: t.TempDir()}
	var err error
	a.pki, err = pki.Ensure(t.Context(), pki.Config{Dir: a.dir, NodeName: "n1", NodeIPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(a.pki.CertFile(pki.APIServer), a.pki.KeyFile(pki.APIServer))
	if err != nil {
		t.Fatal(err)
	}
	clients := x509.NewCertPool()
	clients.AppendCertsFromPEM(a.file(t, pki.ClientCA))
	a.Server = httptest.NewUnstartedServer(handler)
	a.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: clients, ClientAuth: tls.RequireAndVerifyClientCert}
	a.StartTLS()
	t.Cleanup(a.Close)
	return a
}

func (a *apiServer) file(t *testing.T, name pki.Name) []byte {
	t.Helper()
	data, err := os.ReadFile(a.pki.CertFile(name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func (a *apiServer) address() string { return a.Listener.Addr().String() }

// enrolled gives a machine what a node of the cluster has.
func (a *apiServer) enrolled(t *testing.T, cfg *config.Config) pki.Agent {
	t.Helper()
	files := pki.Agent{Dir: cfg.PKIDir(), ServerCA: a.file(t, pki.ServerCA), ClientCA: a.file(t, pki.ClientCA), Credentials: node.ClientCertFile(cfg.KubeletRootDir),
		BalancerPort: int(netip.MustParseAddrPort(a.address()).Port())}
	if err := files.Write(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(files.Credentials, a.file(t, pki.KubeletClient), 0o600); err != nil {
		t.Fatal(err)
	}
	return files
}

// answer sends an object of the API.
func answer(w http.ResponseWriter, code int, object any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(object)
}

func refusal(code int, reason metav1.StatusReason, message string) metav1.Status {
	return metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Code: int32(code), Reason: reason, Message: message}
}
