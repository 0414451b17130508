// SPDX-License-Identifier: Apache-2.0

package joining

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	certutil "k8s.io/client-go/util/cert"

	"github.com/kedge-io/kedge/tests/testbed"
)

// behaviour of a foreign server.
type behaviour struct {
	ahead   time.Duration // of its clock
	version string
}

// foreign is an API server as far as a machine sees it before it joins. It runs on the host.
type foreign struct {
	behaviour

	url, caHash string
	info        map[string]any // cluster-info

	mu      sync.Mutex
	asked   int
	secrets []string // what it was told that is not for everybody
}

func startForeign(t *testing.T, bed *testbed.Bed, b behaviour) *foreign {
	t.Helper()
	chain, key, err := certutil.GenerateSelfSignedCertKey(bed.Gateway(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(chain, key)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := x509.ParseCertificate(cert.Certificate[1])
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", bed.Gateway()+":0")
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(ca.RawSubjectPublicKeyInfo)
	f := &foreign{behaviour: b, url: "https://" + l.Addr().String(), caHash: hex.EncodeToString(sum[:])}
	f.info = map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]string{"name": "cluster-info", "namespace": "kube-public"},
		"data": map[string]string{"kubeconfig": fmt.Sprintf(`{apiVersion: v1, kind: Config, clusters: [{name: "", cluster: {certificate-authority-data: %s, server: %q}}]}`,
			base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})), f.url)},
	}
	srv := &http.Server{Handler: f, ReadHeaderTimeout: 10 * time.Second, TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}}
	served := make(chan error, 1)
	go func() { served <- srv.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		<-served
	})
	return f
}

func (f *foreign) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body) // what did not arrive is no secret
	f.mu.Lock()
	f.asked++
	if len(r.Header["Authorization"]) > 0 || len(body) > 0 || len(r.TLS.PeerCertificates) > 0 {
		f.secrets = append(f.secrets, fmt.Sprintf("%s %s %v %s", r.Method, r.URL.Path, r.Header["Authorization"], body))
	}
	f.mu.Unlock()
	w.Header().Set("Date", time.Now().Add(f.ahead).UTC().Format(http.TimeFormat))
	w.Header().Set("Content-Type", "application/json")
	answer := map[string]any{"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": http.StatusNotFound, "reason": "NotFound", "message": "no " + r.URL.Path}
	switch r.URL.Path {
	case "/api/v1/namespaces/kube-public/configmaps/cluster-info":
		answer = f.info
	case "/version":
		answer = map[string]any{"gitVersion": f.version}
	default:
		w.WriteHeader(http.StatusNotFound)
	}
	_ = json.NewEncoder(w).Encode(answer) // the machine may be gone
}
