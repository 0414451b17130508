// SPDX-License-Identifier: Apache-2.0

package join

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/kedge-io/kedge/pkg/pki"
)

// TestClient goes from a token to the cluster's settings over real TLS, with a proxy in the environment that nothing may use.
func TestClient(t *testing.T) {
	t.Setenv("HTTPS_PROXY", "http://192.0.2.1:1")
	c := newCluster(t)
	tok := testToken(t)
	tok.CAHash = c.caHash
	c.admit(t, tok, GroupBootstrapAgents)
	found, err := Discover(t.Context(), Target{Server: c.URL, Token: tok, Role: Agent, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	client, err := found.Client(tok, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := client.Settings(t.Context()); KindOf(err) != KindNotReady || !Retryable(err) ||
		err.Error() != "the cluster does not allow the cluster's settings yet: User cannot GET /api/v1/namespaces/kube-system/configmaps/kedge-cluster" {
		t.Error(err)
	}
	ca, err := os.ReadFile(c.pki.CertFile(pki.ClientCA))
	if err != nil {
		t.Fatal(err)
	}
	c.set(func() { c.settings = map[string]string{KeyCluster: `{"x":1}`, KeyClientCA: string(ca)} })
	settings, gotCA, err := client.Settings(t.Context())
	if err != nil || string(settings) != `{"x":1}` || string(gotCA) != string(ca) {
		t.Errorf("%s %s %v", settings, gotCA, err)
	}
	c.set(func() { clear(c.tokens) })
	if _, _, err := client.Settings(t.Context()); KindOf(err) != KindToken || Retryable(err) ||
		err.Error() != c.address+" does not accept the token any more (for the cluster's settings): it has expired or was revoked meanwhile; make another with `kedge token create`" {
		t.Error(err)
	}
	c.Close()
	if _, _, err := client.Settings(t.Context()); KindOf(err) != KindUnreachable || !Retryable(err) {
		t.Error(err)
	}
}

func TestSettings(t *testing.T) {
	for want, data := range map[string]map[string]string{
		`the cluster has not got the cluster's settings yet: configmaps "kedge-cluster" not found; if this stays so, s:1 is a Kubernetes, but not Kedge's`: nil,
		"the ConfigMap kube-system/kedge-cluster of the cluster has no cluster.json yet: its first server is still starting":                               {"x": "y"},
		"the ConfigMap kube-system/kedge-cluster of the cluster has no usable client-ca.crt (data does not contain any valid RSA or ECDSA certificates): servers write it when they start": {
			KeyCluster: "{}", KeyClientCA: "x"},
	} {
		api := fake.NewClientset()
		if data != nil {
			api = fake.NewClientset(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "kedge-cluster"}, Data: data})
		}
		if _, _, err := newClient(api, "s:1").Settings(t.Context()); err == nil || err.Error() != want || KindOf(err) != KindNotReady || !Retryable(err) {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
}

// signer plays the approver and the controller manager.
type signer struct {
	*fake.Clientset
	ca  *x509.Certificate
	key *ecdsa.PrivateKey
}

// newSigner treats requests by status when they have been looked at a number of times.
func newSigner(t *testing.T, looks int, status func(s *signer, csr *certificatesv1.CertificateSigningRequest)) *signer {
	t.Helper()
	s := &signer{Clientset: fake.NewClientset()}
	var err error
	if s.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, s.key.Public(), s.key)
	if err != nil {
		t.Fatal(err)
	}
	if s.ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	s.PrependReactor("get", "certificatesigningrequests", func(action k8stesting.Action) (bool, runtime.Object, error) {
		if looks--; looks >= 0 {
			return false, nil, nil
		}
		o, err := s.Tracker().Get(action.GetResource(), "", action.(k8stesting.GetAction).GetName())
		if err != nil {
			return true, nil, err
		}
		csr := o.(*certificatesv1.CertificateSigningRequest).DeepCopy()
		status(s, csr)
		return true, csr, nil
	})
	return s
}

// sign issues what was asked for.
func (s *signer) sign(csr *certificatesv1.CertificateSigningRequest) {
	block, _ := pem.Decode(csr.Spec.Request)
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err == nil {
		err = req.CheckSignature()
	}
	if err != nil {
		return
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: req.Subject, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, s.ca, req.PublicKey, s.key)
	if err == nil {
		csr.Status.Certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
}

func (s *signer) requests(t *testing.T) []certificatesv1.CertificateSigningRequest {
	t.Helper()
	list, err := s.CertificatesV1().CertificateSigningRequests().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return list.Items
}

func TestCertificates(t *testing.T) {
	for name, tt := range map[string]struct {
		get     func(*Client, context.Context, string) ([]byte, []byte, error)
		signer  string
		subject string
		seconds int32
	}{
		"node":   {(*Client).NodeCertificate, "kubernetes.io/kube-apiserver-client-kubelet", "CN=system:node:n1,O=system:nodes", 0},
		"server": {(*Client).ServerCertificate, "kubernetes.io/kube-apiserver-client", "CN=system:kedge:server:n1,O=system:kedge:servers", 3600},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSigner(t, 2, (*signer).sign)
			certPEM, keyPEM, err := tt.get(newClient(s, "s:1"), t.Context(), "n1")
			if err != nil {
				t.Fatal(err)
			}
			pair, err := tls.X509KeyPair(certPEM, keyPEM)
			if err != nil {
				t.Fatal(err)
			}
			if got := pair.Leaf.Subject.String(); got != tt.subject {
				t.Error(got)
			}
			csrs := s.requests(t)
			if len(csrs) != 1 {
				t.Fatalf("%d requests", len(csrs))
			}
			spec := csrs[0].Spec
			if spec.SignerName != tt.signer || len(spec.Usages) != 2 || spec.Usages[0] != "digital signature" || spec.Usages[1] != "client auth" {
				t.Errorf("%s %v", spec.SignerName, spec.Usages)
			}
			if (spec.ExpirationSeconds == nil) != (tt.seconds == 0) || spec.ExpirationSeconds != nil && *spec.ExpirationSeconds != tt.seconds {
				t.Errorf("for %v seconds", spec.ExpirationSeconds)
			}
			if !strings.HasPrefix(csrs[0].Name, "kedge-n1-") {
				t.Error(csrs[0].Name)
			}
		})
	}
}

func condition(kind certificatesv1.RequestConditionType, reason, message string) func(*signer, *certificatesv1.CertificateSigningRequest) {
	return func(_ *signer, csr *certificatesv1.CertificateSigningRequest) {
		csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: kind, Reason: reason, Message: message}}
	}
}

func TestCertificateRefused(t *testing.T) {
	for _, tt := range []struct {
		status func(*signer, *certificatesv1.CertificateSigningRequest)
		kind   Kind
		retry  bool
		want   string
	}{
		{condition("Denied", ReasonNameInUse, "n1 is taken"), KindName, false, "n1 is taken"},
		{condition("Denied", ReasonNameSeenRecently, "n1 was alive 9s ago"), KindName, true, "n1 was alive 9s ago"},
		{condition("Denied", ReasonWrongRole, "not with this"), KindRole, false, "not with this"},
		{condition("Denied", ReasonBadRequest, "odd"), KindRefused, false, "odd"},
		{condition("Denied", "KubectlDeny", "by hand"), KindRefused, false, "the certificate request NAME of this machine was denied: KubectlDeny: by hand"},
		{condition("Failed", "SigningError", "no key"), KindNotReady, true, "the cluster could not sign the certificate request NAME: SigningError: no key; its servers' log says more"},
		{func(_ *signer, csr *certificatesv1.CertificateSigningRequest) { csr.Status.Certificate = []byte("x") }, KindNotReady, true,
			"the cluster issued a certificate for system:node:n1 that cannot be used: tls: failed to find any PEM data in certificate input"},
	} {
		s := newSigner(t, 0, tt.status)
		client := newClient(s, "s:1")
		_, _, err := client.NodeCertificate(t.Context(), "n1")
		if err == nil {
			t.Errorf("no error, want %s", tt.want)
			continue
		}
		name := ""
		for _, a := range s.Actions() {
			if create, ok := a.(k8stesting.CreateAction); ok && a.GetVerb() == "create" {
				name = create.GetObject().(*certificatesv1.CertificateSigningRequest).Name
			}
		}
		if got := strings.ReplaceAll(err.Error(), name, "NAME"); got != tt.want || KindOf(err) != tt.kind || Retryable(err) != tt.retry {
			t.Errorf("kind %q, retry %v: %s\nwant %q, %v: %s", KindOf(err), Retryable(err), got, tt.kind, tt.retry, tt.want)
		}
		if len(client.pending) > 0 {
			t.Errorf("%s: the next attempt would find the same answer", tt.want)
		}
		if left := len(s.requests(t)); (left == 0) != (tt.kind != KindNotReady) {
			t.Errorf("%s: %d requests are left", tt.want, left)
		}
	}
}

// TestCertificateResumes: attempts that end without an answer do not fill the cluster with requests.
func TestCertificateResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		approved := false
		s := newSigner(t, 0, func(s *signer, csr *certificatesv1.CertificateSigningRequest) {
			if approved {
				s.sign(csr)
			}
		})
		down := true
		s.PrependReactor("create", "*", func(k8stesting.Action) (bool, runtime.Object, error) {
			if down {
				return true, nil, apierrors.NewServiceUnavailable("etcd is away")
			}
			return false, nil, nil
		})
		client := newClient(s, "s:1")
		if _, _, err := client.NodeCertificate(t.Context(), "n1"); KindOf(err) != KindNotReady {
			t.Error(err)
		}
		down = false
		for range 3 {
			_, _, err := client.NodeCertificate(t.Context(), "n1")
			if KindOf(err) != KindNotReady || !Retryable(err) || !strings.Contains(err.Error(), "nobody has approved or signed the certificate request kedge-n1-") {
				t.Error(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := client.NodeCertificate(ctx, "n1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		approved = true
		if _, _, err := client.NodeCertificate(t.Context(), "n1"); err != nil {
			t.Error(err)
		}
		if n := len(s.requests(t)); n != 1 {
			t.Errorf("%d requests", n)
		}
	})
}

func TestCertificateGone(t *testing.T) {
	s := newSigner(t, 0, func(*signer, *certificatesv1.CertificateSigningRequest) {})
	gone := schema.GroupResource{Group: "certificates.k8s.io", Resource: "certificatesigningrequests"}
	s.PrependReactor("get", "*", func(k8stesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewNotFound(gone, "x")
	})
	client := newClient(s, "s:1")
	if _, _, err := client.ServerCertificate(t.Context(), "n1"); KindOf(err) != KindNotReady || !Retryable(err) || len(client.pending) > 0 {
		t.Error(err, client.pending)
	}
	s = newSigner(t, 0, nil)
	s.PrependReactor("create", "*", func(k8stesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewInvalid(schema.GroupKind{Kind: "CertificateSigningRequest"}, "x", nil)
	})
	client = newClient(s, "s:1")
	if _, _, err := client.ServerCertificate(t.Context(), "n1"); KindOf(err) != KindRefused || Retryable(err) || len(client.pending) > 0 {
		t.Error(err, client.pending)
	}
}

func TestRequestName(t *testing.T) {
	for node, want := range map[string]string{"n1": "kedge-n1-", "a.b-c": "kedge-a.b-c-", strings.Repeat("a", 199) + ".b": "kedge-" + strings.Repeat("a", 199) + "-"} {
		r, err := newRequest("s", node, pkix.Name{CommonName: "x"}, 0, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(r.object.Name, want) || len(r.object.Name) != len(want)+16 {
			t.Errorf("%s: %s", node, r.object.Name)
		}
	}
}

func TestStoreKubeletClient(t *testing.T) {
	s := newSigner(t, 0, (*signer).sign)
	dir := filepath.Join(t.TempDir(), "kubelet", "pki")
	for range 2 { // the second replaces the first
		certPEM, keyPEM, err := newClient(s, "s:1").NodeCertificate(t.Context(), "n1")
		if err != nil {
			t.Fatal(err)
		}
		if err := StoreKubeletClient(dir, certPEM, keyPEM); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "kubelet-client-current.pem")
		pair, err := tls.LoadX509KeyPair(path, path)
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(certPEM)
		if string(pair.Certificate[0]) != string(block.Bytes) {
			t.Error("another certificate is stored")
		}
		for p, mode := range map[string]os.FileMode{path: 0o600, dir: 0o700} {
			if info, err := os.Stat(p); err != nil || info.Mode().Perm() != mode {
				t.Errorf("%s: %v %v", p, info.Mode(), err)
			}
		}
	}
	if err := StoreKubeletClient(dir, []byte("x"), []byte("y")); err == nil || !strings.Contains(err.Error(), "invalid certificate data") {
		t.Error(err)
	}
}
