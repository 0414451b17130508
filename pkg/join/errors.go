// SPDX-License-Identifier: Apache-2.0

package join

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// Kind sorts what can go wrong for a joining machine, for tests and for people who read docs/tokens.md.
type Kind string

// The kinds. Waiting can cure those marked so, and Wait does.
const (
	KindUnreachable Kind = "unreachable"   // waits: the server is off, or the port is closed
	KindNotReady    Kind = "not ready"     // waits: the API or what Kedge puts into it is not there yet
	KindBusy        Kind = "busy"          // waits: another server is joining, or a majority is missing
	KindClock       Kind = "clock"         // waits: the two clocks differ
	KindNotKedge    Kind = "not kedge"     // something else answers
	KindCA          Kind = "wrong CA"      // the token belongs to another cluster
	KindToken       Kind = "bad token"     // unknown, expired, revoked or mistyped
	KindRole        Kind = "wrong role"    // the token does not allow what was asked for
	KindVersion     Kind = "wrong version" // this Kedge and the cluster are too far apart
	KindName        Kind = "name in use"   // another machine has the name; waits if that may be gone
	KindSetting     Kind = "wrong setting" // an option of this machine contradicts the cluster
	KindRefused     Kind = "refused"       // anything else that the cluster said no to
)

// Error is a problem of joining, in words for the console of the joining machine: what, why, and what to do.
type Error struct {
	Kind  Kind
	Text  string
	Retry bool  // waiting can cure it
	Err   error // what is behind it, may be nil
}

func (e *Error) Error() string { return e.Text }

// Unwrap gives what is behind it, such as a StatusError of the API.
func (e *Error) Unwrap() error { return e.Err }

func problem(kind Kind, cause error, format string, args ...any) *Error {
	e := &Error{Kind: kind, Text: fmt.Sprintf(format, args...), Err: cause}
	switch kind {
	case KindUnreachable, KindNotReady, KindBusy, KindClock:
		e.Retry = true
	}
	return e
}

// KindOf is the kind of a problem, or nothing when err is another error.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return ""
}

// Retryable says whether waiting can cure err.
func Retryable(err error) bool {
	var e *Error
	if errors.As(err, &e) {
		return e.Retry
	}
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		code := status.Status().Code
		return code == http.StatusConflict || code == http.StatusTooManyRequests || code >= http.StatusInternalServerError
	}
	var op *net.OpError
	return errors.As(err, &op) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, context.DeadlineExceeded)
}

// traced lets a request with the context tell whether there was a connection.
func traced(ctx context.Context) (context.Context, *atomic.Bool) {
	connected := new(atomic.Bool)
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		ConnectDone: func(_, _ string, err error) {
			if err == nil {
				connected.Store(true)
			}
		},
		GotConn: func(httptrace.GotConnInfo) { connected.Store(true) },
	}), connected
}

// connectionError puts a failed request to the server at address into words; connected says how far it got. Errors that are none of the
// network are returned as they are.
func connectionError(address string, connected *atomic.Bool, err error) error {
	var (
		dns    *net.DNSError
		netErr net.Error
		record tls.RecordHeaderError
		alert  tls.AlertError
	)
	const port = "is `kedge server` running there (`kedge status` says so), and is this the right address and port?"
	switch {
	case err == nil, errors.Is(err, context.Canceled), KindOf(err) != "":
		return err
	case errors.Is(err, http.ErrSchemeMismatch), errors.As(err, &record), errors.As(err, &alert):
		return problem(KindNotKedge, err, "what listens on %s does not speak TLS as a Kubernetes API does: correct the address or port of --server", address)
	case errors.As(err, &dns):
		return problem(KindUnreachable, err, "the name %s cannot be resolved (%s): use an IP address in --server, or add the name to the DNS or to /etc/hosts", dns.Name, dns.Err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return problem(KindUnreachable, err, "nothing listens on %s (connection refused): %s", address, port)
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return problem(KindUnreachable, err, "there is no way to %s (%s): is the machine on, and are cable, address and routes right? `ip route get` shows the way taken",
			address, rootOf(err))
	case (errors.As(err, &netErr) && netErr.Timeout() || errors.Is(err, context.DeadlineExceeded)) && connected.Load():
		return problem(KindNotReady, err, "%s takes connections and does not answer: it hangs or is overloaded, its datastore has no majority, or the network was cut just now; "+
			"`kedge status` there says more", address)
	case errors.As(err, &netErr) && netErr.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return problem(KindUnreachable, err, "no answer from %s: is the machine on, and does no firewall between here and there drop TCP to this port? "+
			"%s", address, port)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return problem(KindUnreachable, err, "%s closed the connection without an answer: is it starting or stopping, or does something in between (a proxy, a firewall) cut it?", address)
	}
	return certificateError(address, err)
}

// certificateError is about a server that does not prove to be one of the cluster whose CA was verified before.
func certificateError(address string, err error) error {
	var (
		unknown x509.UnknownAuthorityError
		name    x509.HostnameError
		invalid x509.CertificateInvalidError
		op      *net.OpError
	)
	switch {
	case errors.As(err, &unknown):
		return problem(KindCA, err, "the certificate of %s is not of the cluster that the token belongs to: another machine answers, or something in between "+
			"opens the encryption (a proxy); nothing secret was sent to it", address)
	case errors.As(err, &name):
		host, _, _ := net.SplitHostPort(address)
		return problem(KindSetting, err, "the server's certificate is not for the address %s but for %s: use one of these in --server, or start the server with --tls-san %s",
			host, strings.Join(certificateNames(name.Certificate), ", "), host)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return problem(KindNotReady, err, "a certificate of %s is valid from %s to %s, and here it is %s: is this machine's clock right? Servers renew their certificates when they start",
			address, clockTime(invalid.Cert.NotBefore), clockTime(invalid.Cert.NotAfter), clockTime(time.Now()))
	case errors.As(err, &op):
		return problem(KindUnreachable, err, "the connection to %s failed: %s", address, rootOf(err))
	}
	return err
}

func clockTime(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

func certificateNames(cert *x509.Certificate) []string {
	var names []string
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	return append(names, cert.DNSNames...)
}

// rootOf is the innermost error: without the address and the URL that are said elsewhere.
func rootOf(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}

// statusError puts the API's refusal of a request into words. what is the request as a sentence has it: "the cluster's settings".
func statusError(address, what string, connected *atomic.Bool, err error) error {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return connectionError(address, connected, err)
	}
	s := status.Status()
	text := strings.TrimSpace(s.Message)
	if text == "" {
		text = http.StatusText(int(s.Code))
	}
	switch {
	case s.Code == http.StatusUnauthorized:
		return problem(KindToken, err, "%s does not accept the token any more (for %s): it has expired or was revoked meanwhile; make another with `kedge token create`", address, what)
	case s.Code == http.StatusForbidden:
		// The role was checked before, so these are the first seconds of a cluster, in which its rules are not there yet.
		return problem(KindNotReady, err, "the cluster does not allow %s yet: %s", what, text)
	case s.Code == http.StatusNotFound:
		return problem(KindNotReady, err, "the cluster has not got %s yet: %s; if this stays so, %s is a Kubernetes, but not Kedge's", what, text, address)
	case s.Code == http.StatusTooManyRequests || s.Code >= http.StatusInternalServerError:
		return problem(KindNotReady, err, "the API on %s is not ready (for %s): HTTP %d: %s", address, what, s.Code, text)
	}
	return problem(KindRefused, err, "%s refused %s: %s", address, what, text)
}
