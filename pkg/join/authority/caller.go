// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"

	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/pki"
)

// caller is who asks.
type caller struct {
	user   string
	admin  bool
	server string // name of the node, if it proved that it is a server
	doubt  error  // why it did not, although it is in the group
}

// caller tells who asks. The API server knows its user, but not how it was authenticated: that somebody is a server counts only if
// the connection's own certificate says so. A bearer token, impersonation or an aggregating proxy does not.
func (h *handler) caller(req *http.Request) (caller, error) {
	user, ok := apirequest.UserFrom(req.Context())
	if !ok {
		return caller{}, refuse(http.StatusUnauthorized, metav1.StatusReasonUnauthorized, "nobody was authenticated")
	}
	c := caller{user: user.GetName(), admin: slices.Contains(user.GetGroups(), pki.GroupMasters)}
	if slices.Contains(user.GetGroups(), join.GroupServers) {
		c.server, c.doubt = h.prove(req, c.user)
	}
	return c, nil
}

// prove returns the name of the server that the connection belongs to.
func (h *handler) prove(req *http.Request, user string) (string, error) {
	if req.TLS == nil || len(req.TLS.PeerCertificates) == 0 {
		return "", errors.New("there is no client certificate on this connection")
	}
	pem, err := os.ReadFile(h.ClientCA)
	if err != nil {
		return "", err
	}
	// The API server's listener takes any certificate: others than the authenticator's that named this user.
	options := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if !options.Roots.AppendCertsFromPEM(pem) {
		return "", fmt.Errorf("no certificate in %s", h.ClientCA)
	}
	for _, cert := range req.TLS.PeerCertificates[1:] {
		options.Intermediates.AddCert(cert)
	}
	cert := req.TLS.PeerCertificates[0]
	if _, err := cert.Verify(options); err != nil {
		return "", err
	}
	name, ok := strings.CutPrefix(cert.Subject.CommonName, join.UserServerPrefix)
	if cert.Subject.CommonName != user || !ok || !slices.Contains(cert.Subject.Organization, join.GroupServers) {
		return "", fmt.Errorf("the client certificate of this connection is for %q", cert.Subject)
	}
	if err := checkName(name); err != nil {
		return "", err
	}
	return name, nil
}

func (c caller) forbidden(why string) error {
	if c.doubt != nil {
		return refuse(http.StatusForbidden, metav1.StatusReasonForbidden, "%s, and a server shows its own client certificate: %v", why, c.doubt)
	}
	return refuse(http.StatusForbidden, metav1.StatusReasonForbidden, "%s, and %q is none", why, c.user)
}

// mayChange: a server is the master of its own membership, an administrator of all.
func (c caller) mayChange(name string) error {
	switch {
	case c.server == "" && !c.admin:
		return c.forbidden("membership of the datastore is changed by servers and administrators")
	case c.server != name && !c.admin:
		return refuse(http.StatusForbidden, metav1.StatusReasonForbidden, "server %s changes its own membership, not that of %q; an administrator may: kedge node remove", c.server, name)
	}
	return checkName(name)
}

func refuse(code int, reason metav1.StatusReason, format string, args ...any) error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status: metav1.StatusFailure, Code: int32(code), Reason: reason, Message: fmt.Sprintf(format, args...),
	}}
}

// statusOf puts an error into the form that clients of the API know.
func statusOf(err error) metav1.Status {
	code, reason := http.StatusInternalServerError, metav1.StatusReasonInternalError
	var known apierrors.APIStatus
	switch {
	case errors.As(err, &known) && known.Status().Code >= http.StatusBadRequest:
		status := known.Status()
		status.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
		return status
	case errors.Is(err, datastore.ErrBusy):
		code, reason = http.StatusConflict, StatusReasonBusy
	case errors.Is(err, datastore.ErrQuorum):
		code, reason = http.StatusConflict, StatusReasonQuorum
	case errors.Is(err, datastore.ErrNotReady):
		code, reason = http.StatusConflict, StatusReasonNotCaughtUp
	case errors.Is(err, datastore.ErrExists):
		code, reason = http.StatusConflict, metav1.StatusReasonAlreadyExists
	case errors.Is(err, datastore.ErrNoLeader):
		code, reason = http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable
	case errors.Is(err, datastore.ErrNotMember):
		code, reason = http.StatusNotFound, metav1.StatusReasonNotFound
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		code, reason = http.StatusGatewayTimeout, metav1.StatusReasonTimeout
	}
	return metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure,
		Code: int32(code), Reason: reason, Message: err.Error(),
	}
}

func success() metav1.Status {
	return metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess, Code: http.StatusOK}
}
