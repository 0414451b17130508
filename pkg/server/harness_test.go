// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiversion "k8s.io/apimachinery/pkg/version"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/join"
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

// testServer has all of its files in a directory of the test's own.
func testServer(t *testing.T, change func(*config.Config)) *server {
	t.Helper()
	dir := t.TempDir()
	cfg := &config.Config{
		Role: config.RoleServer, NodeName: "n2", NodeIP: []netip.Addr{netip.MustParseAddr("192.0.2.7")}, AdvertiseAddress: netip.MustParseAddr("192.0.2.7"),
		BindAddress: netip.IPv4Unspecified(), HTTPSListenPort: 6443, LBServerPort: 6444, DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"),
		KubeletRootDir: filepath.Join(dir, "kubelet"), WriteKubeconfig: filepath.Join(dir, "kubeconfig.yaml"), WriteKubeconfigMode: 0o600,
		PrivateRegistry: filepath.Join(dir, "registries.yaml"), JoinTimeout: 20 * time.Second, Cluster: clusterSettings(), Given: map[string]string{},
	}
	if change != nil {
		change(cfg)
	}
	for _, d := range []string{cfg.DataDir, cfg.RunDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return &server{Machine: agent.New(cfg), cfg: cfg, log: slog.New(slog.NewTextHandler(t.Output(), nil)), etcdChanged: make(chan struct{}, 1)}
}

// withData gives the server what etcd goes by: a write-ahead log.
func (s *server) withData(t *testing.T) {
	t.Helper()
	write(t, filepath.Join(s.etcdDir(), "member", "wal", "0000000000000000-0000000000000000.wal"), "data")
	write(t, datastore.MemberFile(s.etcdDir()), `{"id":"8e9e05c52164694d","clusterID":"cdf818194e3a8c32","name":"n2"}`)
	if !datastore.HasMember(s.etcdDir()) {
		t.Fatal("package datastore sees no member")
	}
}

// removed notes what the datastore notes when its member was removed.
func (s *server) removed(t *testing.T) {
	t.Helper()
	write(t, datastore.RemovedFile(s.etcdDir()), `{"id":"8e9e05c52164694d","time":"2026-11-24T10:00:00Z"}`)
	if r, err := datastore.ReadRemoved(s.etcdDir()); r == nil || err != nil {
		t.Fatalf("package datastore reads %+v, %v", r, err)
	}
}

// running starts the server's machine with a datastore process that does not get as far as starting.
func (s *server) running(t *testing.T) {
	t.Helper()
	s.Credentials.Kubeconfig = filepath.Join(s.cfg.DataDir, "no-kubeconfig")
	if _, err := s.Balance(""); err != nil {
		t.Fatal(err)
	}
	runs := make(chan struct{})
	s.OnChange = func([]supervise.ProcessStatus) {
		select {
		case <-runs:
		default:
			close(runs)
		}
	}
	process := s.Process(etcd, nil, func() (any, error) { return nil, errors.New("not in this test") })
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, []*supervise.Process{process}, []string{etcd}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	<-runs
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// stale gives the directories of data that has been moved aside.
func (s *server) stale(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob(s.etcdDir() + ".stale-*")
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// testCluster is the server n1 as a joining one sees it: the API and the join API, with real keys and certificates.
type testCluster struct {
	*httptest.Server
	pki   *pki.PKI
	token join.Token

	mu       sync.Mutex
	settings config.Cluster
	registry map[string]string
	busy     int            // how many times AddMember is refused
	calls    map[string]int // of what changes something or is secret, with the caller's name
	signed   map[string]*certificatesv1.CertificateSigningRequest
}

func newCluster(t *testing.T) *testCluster {
	t.Helper()
	token, err := join.New()
	if err != nil {
		t.Fatal(err)
	}
	c := &testCluster{token: token, settings: clusterSettings(), registry: map[string]string{}, calls: map[string]int{}, signed: map[string]*certificatesv1.CertificateSigningRequest{}}
	c.pki, err = pki.Ensure(t.Context(), pki.Config{Dir: t.TempDir(), NodeName: "n1", NodeIPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	c.token.CAHash = strings.TrimPrefix(c.pki.CAHash(), "sha256:")
	pair, err := tls.LoadX509KeyPair(c.pki.CertFile(pki.APIServer), c.pki.KeyFile(pki.APIServer))
	if err != nil {
		t.Fatal(err)
	}
	clients := x509.NewCertPool()
	clients.AppendCertsFromPEM(c.file(string(pki.ClientCA) + ".crt"))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/v1/namespaces/{namespace}/configmaps/{name}", c.configMap)
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, 200, apiversion.Info{Major: "1", GitVersion: "v1.37.2"})
	})
	mux.HandleFunc("POST /apis/authentication.k8s.io/v1/selfsubjectreviews", func(w http.ResponseWriter, _ *http.Request) {
		review := authenticationv1.SelfSubjectReview{TypeMeta: metav1.TypeMeta{APIVersion: "authentication.k8s.io/v1", Kind: "SelfSubjectReview"}}
		review.Status.UserInfo = authenticationv1.UserInfo{Username: "system:bootstrap:" + token.ID, Groups: []string{join.GroupBootstrapServers, join.GroupBootstrapAgents}}
		answer(w, 201, review)
	})
	mux.HandleFunc("POST /apis/certificates.k8s.io/v1/certificatesigningrequests", c.sign)
	mux.HandleFunc("GET /apis/certificates.k8s.io/v1/certificatesigningrequests/{name}", func(w http.ResponseWriter, r *http.Request) {
		answer(w, 200, c.signed[r.PathValue("name")])
	})
	mux.HandleFunc("GET "+join.PathKeys, c.keys)
	mux.HandleFunc("POST "+join.PathMembers, c.addMember)
	c.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		mux.ServeHTTP(w, r)
	}))
	c.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: clients, ClientAuth: tls.VerifyClientCertIfGiven}
	c.StartTLS()
	t.Cleanup(c.Close)
	return c
}

func (c *testCluster) address() string { return c.Listener.Addr().String() }

// file is one of those that servers share.
func (c *testCluster) file(name string) []byte {
	data, _ := os.ReadFile(filepath.Join(filepath.Dir(c.pki.CertFile(pki.ServerCA)), name))
	return data
}

func (c *testCluster) shared() map[string][]byte {
	files := map[string][]byte{}
	for _, name := range pki.SharedFiles() {
		files[name] = c.file(name)
	}
	return files
}

func (c *testCluster) called() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.calls)
}

func (c *testCluster) configMap(w http.ResponseWriter, r *http.Request) {
	data := map[string]map[string]string{}
	kubeconfig := clientcmdapi.NewConfig()
	kubeconfig.Clusters[""] = &clientcmdapi.Cluster{Server: "https://kubernetes.default.svc", CertificateAuthorityData: c.file("server-ca.crt")}
	text, _ := clientcmd.Write(*kubeconfig)
	settings, _ := json.Marshal(c.settings)
	data["cluster-info"] = map[string]string{"kubeconfig": string(text)}
	data[join.ConfigMapCluster] = map[string]string{join.KeyCluster: string(settings), join.KeyClientCA: string(c.file("client-ca.crt"))}
	data[join.ConfigMapServers] = c.registry
	answer(w, 200, corev1.ConfigMap{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
		ObjectMeta: metav1.ObjectMeta{Namespace: r.PathValue("namespace"), Name: r.PathValue("name")}, Data: data[r.PathValue("name")]})
}

// sign does what approver and controller manager do.
func (c *testCluster) sign(w http.ResponseWriter, r *http.Request) {
	csr := &certificatesv1.CertificateSigningRequest{}
	body, err := io.ReadAll(r.Body)
	if err == nil {
		_, _, err = scheme.Codecs.UniversalDeserializer().Decode(body, nil, csr)
	}
	if err != nil {
		http.Error(w, err.Error(), 400)
		return
	}
	block, _ := pem.Decode(csr.Spec.Request)
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		http.Error(w, err.Error(), 400)
		return
	}
	ca, err := tls.X509KeyPair(c.file("client-ca.crt"), c.file("client-ca.key"))
	if err != nil {
		http.Error(w, err.Error(), 500)
		return
	}
	c.calls[fmt.Sprintf("sign %s of %s", request.Subject.CommonName, strings.Join(request.Subject.Organization, ","))]++
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: request.Subject, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Leaf, request.PublicKey, ca.PrivateKey)
	if err != nil {
		http.Error(w, err.Error(), 500)
		return
	}
	csr.Status.Certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	csr.TypeMeta = metav1.TypeMeta{APIVersion: "certificates.k8s.io/v1", Kind: "CertificateSigningRequest"}
	c.signed[csr.Name] = csr
	answer(w, 201, csr)
}

func caller(r *http.Request) string {
	if len(r.TLS.PeerCertificates) == 0 {
		return "nobody"
	}
	return r.TLS.PeerCertificates[0].Subject.CommonName
}

func (c *testCluster) keys(w http.ResponseWriter, r *http.Request) {
	c.calls["keys for "+caller(r)]++
	answer(w, 200, join.KeysResponse{Files: c.shared()})
}

func (c *testCluster) addMember(w http.ResponseWriter, r *http.Request) {
	var request join.AddMemberRequest
	if err := json.NewDecoder(r.Body).Decode(&request); err != nil {
		http.Error(w, err.Error(), 400)
		return
	}
	c.calls[fmt.Sprintf("member %s at %s for %s", request.Name, request.PeerURL, caller(r))]++
	if c.busy > 0 {
		c.busy--
		answer(w, 409, metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Code: 409, Message: "another server is joining"})
		return
	}
	answer(w, 200, join.AddMemberResponse{ID: "2", Members: []join.Member{
		{Name: "n1", ID: "1", PeerURLs: []string{"https://192.0.2.1:2380"}}, {ID: "2", PeerURLs: []string{request.PeerURL}, Learner: true}}})
}

func answer(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}
