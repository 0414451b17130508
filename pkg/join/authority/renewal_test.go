// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
	certutil "k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"

	"github.com/kedge-io/kedge/pkg/join"
)

// clientCA is a CA on disk.
type clientCA struct {
	crt, key string
	cert     *x509.Certificate
	signer   *ecdsa.PrivateKey
}

func newClientCA(t testing.TB) clientCA {
	t.Helper()
	dir := t.TempDir()
	ca := clientCA{crt: filepath.Join(dir, "ca.crt"), key: filepath.Join(dir, "ca.key"), signer: newKey(t)}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotAfter: time.Now().Add(time.Hour),
		NotBefore: time.Unix(0, 0), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, ca.signer.Public(), ca.signer)
	if err != nil {
		t.Fatal(err)
	}
	if ca.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	key, err := keyutil.MarshalPrivateKeyToPEM(ca.signer)
	if err != nil {
		t.Fatal(err)
	}
	for file, data := range map[string][]byte{ca.crt: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), ca.key: key} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return ca
}

func (ca clientCA) pem(t testing.TB) []byte {
	t.Helper()
	data, err := os.ReadFile(ca.crt)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// node makes a node's client certificate, PEM.
func (ca clientCA) node(t testing.TB, key *ecdsa.PrivateKey, cn, org string, begin, end time.Time) []byte {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: cn, Organization: []string{org}},
		NotBefore: begin, NotAfter: end, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.signer)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func csrFor(t testing.TB, key *ecdsa.PrivateKey, cn, org string) []byte {
	t.Helper()
	csr, err := certutil.MakeCSR(key, &pkix.Name{CommonName: cn, Organization: []string{org}}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func TestRenew(t *testing.T) {
	ca, other := newClientCA(t), newClientCA(t)
	key, wrong := newKey(t), newKey(t)
	const cn, org = join.UserNodePrefix + "a1", join.GroupNodes
	now := time.Now()
	made, ended := now.AddDate(-3, 0, 0), now.AddDate(-2, 0, 0)
	expired := ca.node(t, key, cn, org, made, ended)
	request := csrFor(t, key, cn, org)
	node := func(created, seen time.Time) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a1", CreationTimestamp: metav1.NewTime(created)},
			Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionUnknown, LastHeartbeatTime: metav1.NewTime(seen)}}}}
	}
	away := node(made, ended.AddDate(0, -1, 0))
	server := node(made, ended.AddDate(0, -1, 0))
	server.Labels = map[string]string{"node-role.kubernetes.io/control-plane": ""}
	for _, test := range []struct {
		name          string
		node          *corev1.Node
		lease         time.Time // last renewed; zero: none
		cert, request []byte
		code          int
		want          string // of the message
	}{
		{"was away", away, ended.AddDate(0, -1, 0), expired, request, http.StatusOK, ""},
		{"was away, no lease", away, time.Time{}, expired, request, http.StatusOK, ""},
		{"still valid", away, time.Time{}, ca.node(t, key, cn, org, made, now.Add(time.Hour)), request, http.StatusConflict, "set the clock"},
		{"removed", nil, time.Time{}, expired, request, http.StatusForbidden, "removed from the cluster"},
		{"another CA", away, time.Time{}, other.node(t, key, cn, org, made, ended), request, http.StatusForbidden, "not of this cluster"},
		{"another key", away, time.Time{}, expired, csrFor(t, wrong, cn, org), http.StatusBadRequest, "not for the key"},
		{"another subject", away, time.Time{}, expired, csrFor(t, key, join.UserNodePrefix+"a2", org), http.StatusBadRequest, "the subject"},
		{"not a node", away, time.Time{}, ca.node(t, key, "admin", "system:masters", made, ended), csrFor(t, key, "admin", "system:masters"), http.StatusForbidden, "not a node's"},
		{"alive since", away, ended.Add(time.Hour), expired, request, http.StatusForbidden, "alive after this certificate"},
		{"seen since", node(made, ended.Add(time.Hour)), time.Time{}, expired, request, http.StatusForbidden, "alive after this certificate"},
		{"made anew", node(made.AddDate(0, 1, 0), made), time.Time{}, expired, request, http.StatusForbidden, "made anew"},
		{"a server", server, time.Time{}, expired, request, http.StatusForbidden, "is a server"},
		{"nonsense", away, time.Time{}, []byte("x"), request, http.StatusBadRequest, "the certificate:"},
		{"nonsense request", away, time.Time{}, expired, []byte("x"), http.StatusBadRequest, "the request:"},
	} {
		client := fake.NewClientset()
		if test.node != nil {
			if _, err := client.CoreV1().Nodes().Create(t.Context(), test.node, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if !test.lease.IsZero() {
			renewed := metav1.NewMicroTime(test.lease)
			lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "a1", Namespace: corev1.NamespaceNodeLease}, Spec: coordinationv1.LeaseSpec{RenewTime: &renewed}}
			if _, err := client.CoordinationV1().Leases(corev1.NamespaceNodeLease).Create(t.Context(), lease, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		h := NewHandler(Config{ClientCA: ca.crt, IssuingCA: ca.crt, IssuingCAKey: ca.key, Client: client, Logger: slog.New(slog.DiscardHandler)})
		body, err := json.Marshal(join.RenewRequest{Certificate: test.cert, Request: test.request})
		if err != nil {
			t.Fatal(err)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(context.Background(), http.MethodPost, join.PathRenew, bytes.NewReader(body)))
		if w.Code != test.code || !strings.Contains(w.Body.String(), test.want) {
			t.Errorf("%s: %d %s", test.name, w.Code, w.Body)
		}
		if w.Code != http.StatusOK {
			continue
		}
		var answer join.RenewResponse
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
			t.Fatal(err)
		}
		certs, err := certutil.ParseCertsPEM(answer.Certificate)
		if err != nil {
			t.Fatal(err)
		}
		c := certs[0]
		if !key.PublicKey.Equal(c.PublicKey) || c.Subject.CommonName != cn || c.NotAfter.After(now.Add(2*time.Hour)) || c.CheckSignatureFrom(ca.cert) != nil {
			t.Errorf("%s: got %v until %v", test.name, c.Subject, c.NotAfter)
		}
		// The kubelet asks for the next one when 70 to 90 percent of this one's life are over.
		if over := now.Sub(c.NotBefore); over < c.NotAfter.Sub(c.NotBefore)/100*92 {
			t.Errorf("%s: %v of %v are over", test.name, over, c.NotAfter.Sub(c.NotBefore))
		}
	}
}

// FuzzRenew: whatever anybody sends is answered, and not with a certificate.
func FuzzRenew(f *testing.F) {
	ca := newClientCA(f)
	key := newKey(f)
	cert := ca.node(f, key, join.UserNodePrefix+"a1", join.GroupNodes, time.Now().AddDate(-3, 0, 0), time.Now().AddDate(-2, 0, 0))
	f.Add(cert, csrFor(f, key, join.UserNodePrefix+"a1", join.GroupNodes))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), []byte("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"))
	f.Add([]byte{}, []byte{})
	h := NewHandler(Config{ClientCA: ca.crt, IssuingCA: ca.crt, IssuingCAKey: ca.key, Client: fake.NewClientset(), Logger: slog.New(slog.DiscardHandler)})
	f.Fuzz(func(t *testing.T, cert, request []byte) {
		body, err := json.Marshal(join.RenewRequest{Certificate: cert, Request: request})
		if err != nil {
			t.Fatal(err)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(context.Background(), http.MethodPost, join.PathRenew, bytes.NewReader(body)))
		if w.Code < 400 || w.Code >= 500 {
			t.Errorf("%d %s", w.Code, w.Body)
		}
	})
}
