// SPDX-License-Identifier: Apache-2.0

package join

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
	certutil "k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
)

// Renew asks a server for another client certificate in place of a node's expired one, which credentials (PEM, with its key) holds. The
// result has the same form and the same key. address is host:port of the server, serverCA the CA that it is known by (PEM). Retryable
// says which errors may pass; what the cluster refuses for good takes a token.
func Renew(ctx context.Context, address string, serverCA, credentials []byte) ([]byte, error) {
	pair, err := tls.X509KeyPair(credentials, credentials)
	if err != nil {
		return nil, err
	}
	// With the old key: that is the proof.
	csr, err := certutil.MakeCSR(pair.PrivateKey, &pair.Leaf.Subject, nil, nil)
	if err != nil {
		return nil, err
	}
	old, err := certutil.EncodeCertificates(pair.Leaf)
	if err != nil {
		return nil, err
	}
	// Without a client certificate: the API server answers nothing to who shows an expired one.
	api, err := NewAPI(&rest.Config{Host: "https://" + address, TLSClientConfig: rest.TLSClientConfig{CAData: serverCA}, Timeout: requestTimeout})
	if err != nil {
		return nil, err
	}
	var r RenewResponse
	if err := api.do(ctx, http.MethodPost, PathRenew, RenewRequest{Certificate: old, Request: csr}, &r); err != nil {
		if apierrors.IsConflict(err) {
			return nil, problem(KindClock, err, "%s", err)
		}
		return nil, err
	}
	key, err := keyutil.MarshalPrivateKeyToPEM(pair.PrivateKey)
	if err != nil {
		return nil, err
	}
	fresh := append(r.Certificate, key...)
	if _, err := tls.X509KeyPair(fresh, fresh); err != nil {
		return nil, fmt.Errorf("the certificate that %s issued: %w", address, err)
	}
	return fresh, nil
}
