// SPDX-License-Identifier: Apache-2.0

package join

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiversion "k8s.io/apimachinery/pkg/version"
	"k8s.io/cluster-bootstrap/token/jws"

	"github.com/kedge-io/kedge/pkg/pki"
)

// testCluster plays the API server as far as a joining machine sees it: the certificates are those of pkg/pki, the signatures of
// cluster-info those that the controller manager would make.
type testCluster struct {
	*httptest.Server
	pki     *pki.PKI
	caHash  string
	address string

	mu       sync.Mutex
	tokens   map[string][]string // groups by ID.SECRET
	info     map[string]string   // data of cluster-info
	version  string
	clock    time.Duration     // how far it is ahead
	settings map[string]string // data of kedge-cluster
	override http.HandlerFunc  // instead of everything else
	seen     []string          // bearer tokens
}

func newCluster(t *testing.T) *testCluster {
	t.Helper()
	return newClusterFor(t, pki.Config{NodeName: "n1", NodeIPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}, pki.APIServer)
}

// newClusterFor serves with one of the certificates of a PKI.
func newClusterFor(t *testing.T, config pki.Config, serving pki.Name) *testCluster {
	t.Helper()
	config.Dir, config.Logger = t.TempDir(), quiet()
	p, err := pki.Ensure(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	c := &testCluster{pki: p, caHash: strings.TrimPrefix(p.CAHash(), "sha256:"), tokens: map[string][]string{}, version: "v1.37.2"}
	ca, err := os.ReadFile(p.CertFile(pki.ServerCA))
	if err != nil {
		t.Fatal(err)
	}
	c.info = map[string]string{"kubeconfig": kubeconfigOf(ca)}
	pair, err := tls.LoadX509KeyPair(p.CertFile(serving), p.KeyFile(serving))
	if err != nil {
		t.Fatal(err)
	}
	c.Server = httptest.NewUnstartedServer(c)
	c.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert}
	c.EnableHTTP2 = true
	c.Config.ErrorLog = log.New(io.Discard, "", 0)
	c.StartTLS()
	t.Cleanup(c.Close)
	c.address = c.Listener.Addr().String()
	return c
}

// kubeconfigOf is what manifests/join.yaml makes of a CA.
func kubeconfigOf(ca []byte) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters:\n- name: \"\"\n  cluster:\n    certificate-authority-data: %s\n    server: https://kubernetes.default.svc\n",
		base64.StdEncoding.EncodeToString(ca))
}

// admit makes a token valid, and signs cluster-info with it.
func (c *testCluster) admit(t *testing.T, tok Token, groups ...string) Token {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tokens[tok.Bearer()] = append(groups, "system:bootstrappers", "system:authenticated")
	signature, err := jws.ComputeDetachedSignature(c.info["kubeconfig"], tok.ID, tok.Secret)
	if err != nil {
		t.Fatal(err)
	}
	c.info["jws-kubeconfig-"+tok.ID] = signature
	return tok
}

// set changes the cluster while it serves.
func (c *testCluster) set(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

func (c *testCluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	bearer := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	if bearer != "" {
		c.seen = append(c.seen, bearer)
	}
	w.Header().Set("Date", time.Now().Add(c.clock).UTC().Format(http.TimeFormat))
	groups, known := c.tokens[bearer]
	switch {
	case c.override != nil:
		c.override(w, r)
	case bearer != "" && !known:
		sendStatus(w, 401, "Unauthorized")
	case r.Method == "GET" && r.URL.Path == "/api/v1/namespaces/kube-public/configmaps/cluster-info":
		sendJSON(w, 200, corev1.ConfigMap{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
			ObjectMeta: metav1.ObjectMeta{Namespace: "kube-public", Name: "cluster-info"}, Data: maps.Clone(c.info)})
	case r.Method == "GET" && r.URL.Path == "/version":
		sendJSON(w, 200, apiversion.Info{Major: "1", GitVersion: c.version})
	case r.Method == "POST" && r.URL.Path == "/apis/authentication.k8s.io/v1/selfsubjectreviews" && bearer != "":
		var review authenticationv1.SelfSubjectReview
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil || review.Kind != "SelfSubjectReview" {
			sendStatus(w, 400, fmt.Sprint(err))
			return
		}
		id, _, _ := strings.Cut(bearer, ".")
		review.Status.UserInfo = authenticationv1.UserInfo{Username: "system:bootstrap:" + id, Groups: groups}
		sendJSON(w, 201, review)
	case r.Method == "GET" && r.URL.Path == "/api/v1/namespaces/kube-system/configmaps/kedge-cluster" && known && c.settings != nil:
		sendJSON(w, 200, corev1.ConfigMap{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
			ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "kedge-cluster"}, Data: maps.Clone(c.settings)})
	default:
		sendStatus(w, 403, "User cannot "+r.Method+" "+r.URL.Path)
	}
}

func sendJSON(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}

func sendStatus(w http.ResponseWriter, code int, message string) {
	sendJSON(w, code, metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Code: int32(code), Message: message})
}

// testToken is New for tests; it cannot fail.
func testToken(t *testing.T) Token {
	t.Helper()
	tok, err := New()
	if err != nil {
		t.Fatal(err)
	}
	return tok
}
