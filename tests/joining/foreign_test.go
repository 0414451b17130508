// SPDX-License-Identifier: Apache-2.0

package joining

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

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
	ca, cert, err := certificates(net.ParseIP(bed.Gateway()))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", bed.Gateway()+":0")
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(ca.RawSubjectPublicKeyInfo)
	caPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})
	f := &foreign{behaviour: b, url: "https://" + l.Addr().String(), caHash: hex.EncodeToString(sum[:])}
	f.info = map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]string{"name": "cluster-info", "namespace": "kube-public"},
		"data": map[string]string{"kubeconfig": fmt.Sprintf(`{apiVersion: v1, kind: Config, clusters: [{name: "", cluster: {certificate-authority-data: %s, server: %q}}]}`,
			base64.StdEncoding.EncodeToString(caPEM), f.url)},
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

// certificates makes a CA and a certificate for a server at ip.
func certificates(ip net.IP) (*x509.Certificate, tls.Certificate, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "foreign"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, caKey.Public(), caKey)
	if err != nil {
		return nil, tls.Certificate{}, err
	}
	ca, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, tls.Certificate{}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, tls.Certificate{}, err
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "server"}, NotBefore: template.NotBefore, NotAfter: template.NotAfter,
		IPAddresses: []net.IP{ip}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if der, err = x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey); err != nil {
		return nil, tls.Certificate{}, err
	}
	return ca, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
