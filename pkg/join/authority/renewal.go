// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	certutil "k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
	"k8s.io/kubernetes/pkg/apis/certificates"

	"github.com/kedge-io/kedge/pkg/join"
)

const (
	// renewedLife is what a node gets for an expired certificate; it is dated back so that most of its life is over, and the kubelet
	// asks for an ordinary one, with a new key, as soon as it starts.
	renewedLife     = time.Hour
	renewedBackdate = 19 * time.Hour
	// registeredAfter is how long a node may take from its first certificate until there is its Node.
	registeredAfter = 24 * time.Hour
	// signAfter is how much later than its certificate's end a node may have been seen: clocks differ.
	signAfter = 10 * time.Minute
)

// renew gives a node whose client certificate has expired, because it was switched off for long, another one for the same key. Anybody
// may ask: the request is signed with that key. What speaks against it is that the node was removed, or that a machine of this name
// has been alive since the certificate ended; that machine has a newer one, and this is a copy of it or the one before it.
func (h *handler) renew(req *http.Request) (any, error) {
	var body join.RenewRequest
	if err := decode(req, &body); err != nil {
		return nil, err
	}
	cert, name, err := h.expired(body, time.Now())
	if err != nil {
		return nil, err
	}
	ctx := req.Context()
	node, err := h.Client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, refuse(http.StatusForbidden, metav1.StatusReasonForbidden, "there is no node %s any more: it was removed from the cluster", name)
	}
	if err != nil {
		return nil, err
	}
	servers, err := ListServers(ctx, h.Client)
	if err != nil {
		return nil, err
	}
	if _, ok := servers[name]; ok || isServer(node) {
		return nil, refuse(http.StatusForbidden, metav1.StatusReasonForbidden, "%s is a server, which makes its own certificates", name)
	}
	p, err := newSilence(h.Client).of(ctx, node)
	if err != nil {
		return nil, err
	}
	switch {
	case cert.NotBefore.Before(node.CreationTimestamp.Add(-registeredAfter)):
		return nil, refuse(http.StatusForbidden, metav1.StatusReasonForbidden, "the node %s was made anew at %s, after this certificate (%s)",
			name, node.CreationTimestamp.UTC().Format(time.RFC3339), cert.NotBefore.UTC().Format(time.RFC3339))
	case p.seen.After(cert.NotAfter.Add(signAfter)):
		return nil, refuse(http.StatusForbidden, metav1.StatusReasonForbidden, "a machine under the name %s was alive after this certificate had expired (%s): %s",
			name, cert.NotAfter.UTC().Format(time.RFC3339), p.describe())
	}
	fresh, err := h.sign(cert, time.Now())
	if err != nil {
		return nil, err
	}
	h.log.Info("renewed the expired certificate of a node that was away", "name", name, "expired", cert.NotAfter, "address", req.RemoteAddr)
	about := corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}
	recordEvent(ctx, h.Client, h.log, about, corev1.EventTypeNormal, "CertificateRenewed",
		"the node came back with a certificate that had expired "+ago(cert.NotAfter, time.Now())+", and got a new one")
	return join.RenewResponse{Certificate: fresh}, nil
}

// expired checks what can be checked without the cluster: the certificate was a node's and has ended, and who asks has its key.
func (h *handler) expired(body join.RenewRequest, now time.Time) (cert *x509.Certificate, name string, err error) {
	bad := func(format string, args ...any) (*x509.Certificate, string, error) {
		return nil, "", refuse(http.StatusBadRequest, metav1.StatusReasonBadRequest, format, args...)
	}
	certs, err := certutil.ParseCertsPEM(body.Certificate)
	if err != nil {
		return bad("the certificate: %v", err)
	}
	cert = certs[0]
	csr, err := certificates.ParseCSR(body.Request)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return bad("the request: %v", err)
	}
	if !bytes.Equal(csr.RawSubjectPublicKeyInfo, cert.RawSubjectPublicKeyInfo) || !bytes.Equal(csr.RawSubject, cert.RawSubject) {
		return bad("the request is not for the key and the subject of the certificate")
	}
	trusted, err := os.ReadFile(h.ClientCA)
	if err != nil {
		return nil, "", err
	}
	options := x509.VerifyOptions{Roots: x509.NewCertPool(), CurrentTime: cert.NotAfter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if !options.Roots.AppendCertsFromPEM(trusted) {
		return nil, "", fmt.Errorf("no certificate in %s", h.ClientCA)
	}
	if _, err := cert.Verify(options); err != nil {
		return nil, "", refuse(http.StatusForbidden, metav1.StatusReasonForbidden, "the certificate is not of this cluster, or of a CA that was replaced since: %v", err)
	}
	name, ok := strings.CutPrefix(cert.Subject.CommonName, join.UserNodePrefix)
	if !ok || !slices.Equal(cert.Subject.Organization, []string{join.GroupNodes}) {
		return nil, "", refuse(http.StatusForbidden, metav1.StatusReasonForbidden, "the certificate of %q is not a node's", cert.Subject)
	}
	if err := checkName(name); err != nil {
		return nil, "", err
	}
	if !now.After(cert.NotAfter) {
		return nil, "", refuse(http.StatusConflict, StatusReasonNotExpired, "the certificate is valid until %s, and here it is %s: set the clock of node %s, or wait",
			cert.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339), name)
	}
	return cert, name, nil
}

// sign makes a certificate for the subject and key of another one.
func (h *handler) sign(old *x509.Certificate, now time.Time) ([]byte, error) {
	caCerts, err := certutil.CertsFromFile(h.IssuingCA)
	if err != nil {
		return nil, err
	}
	key, err := keyutil.PrivateKeyFromFile(h.IssuingCAKey)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("the key in %s cannot sign", h.IssuingCAKey)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: old.Subject, NotBefore: now.Add(-renewedBackdate), NotAfter: now.Add(renewedLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, caCerts[0], old.PublicKey, signer)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: certutil.CertificateBlockType, Bytes: der}), nil
}
