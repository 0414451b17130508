// SPDX-License-Identifier: Apache-2.0

package apilb

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// NotReadyError is what a probe says of an API server that answers but cannot serve: it starts or ends, or its datastore is away.
type NotReadyError struct{ Reason string }

func (e *NotReadyError) Error() string { return "not ready: " + e.Reason }

// What the probe asks for. /readyz is the one path for which no other user than everybody is needed (system:public-info-viewer; of the
// single checks below it everybody gets 403, before they run), and which is exempt from flow control. It costs the API server no input or
// output except its two checks of etcd, each a read through the quorum; they share their result among all who ask within a second. One of
// the two is enough.
const (
	readyQuery = "exclude=etcd-readiness"
	aliveQuery = "exclude=etcd&exclude=etcd-readiness"
)

const (
	// slowAnswer is after how long the probe asks a second time, without etcd: with its quorum away, the check of etcd hangs longer than
	// a probe may take, and a server that answers must be told from one that is silent.
	slowAnswer = 250 * time.Millisecond
	// dialTimeout bounds connecting and, again, the TLS handshake, which go on after the probe that wanted them.
	dialTimeout = time.Second
	// idleTimeout drops the connections to servers that are no longer probed; it is longer than the time between two probes.
	idleTimeout = 30 * time.Second
)

type httpsProbe struct {
	transport *http.Transport
}

// HTTPSProbe asks an API server over HTTPS, on a connection that stays open. An answer of 401 or 403 is a good one: anonymous users may be
// switched off. The server's certificate has to come from ca, which is called at each handshake; its names do not matter, as servers are
// reached by addresses that certificates need not have, and nothing that is secret or believed passes: clients verify for themselves.
func HTTPSProbe(ca func() (*x509.CertPool, error)) func(ctx context.Context, address string) error {
	dialer := &net.Dialer{Timeout: dialTimeout}
	p := &httpsProbe{transport: &http.Transport{
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, dialTimeout)
			defer cancel()
			conn, err := dialHost(ctx, dialer, net.DefaultResolver, slowAnswer, address)
			if err != nil {
				return nil, err
			}
			return conn, nil
		},
		TLSClientConfig: &tls.Config{
			InsecureSkipVerify: true, // of the name; the rest is below
			VerifyConnection:   func(state tls.ConnectionState) error { return verify(ca, state) },
		},
		TLSHandshakeTimeout: dialTimeout,
		TLSNextProto:        map[string]func(string, *tls.Conn) http.RoundTripper{}, // no HTTP/2: one request at a time is what a probe is
		MaxIdleConnsPerHost: 1,
		IdleConnTimeout:     idleTimeout,
		DisableCompression:  true,
		ReadBufferSize:      1 << 10,
		WriteBufferSize:     1 << 10,
	}}
	return p.probe
}

// verify checks that the server's certificate comes from the CA.
func verify(ca func() (*x509.CertPool, error), state tls.ConnectionState) error {
	roots, err := ca()
	if err != nil {
		return fmt.Errorf("the CA to verify the server with: %w", err)
	}
	options := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool()}
	for _, cert := range state.PeerCertificates[1:] {
		options.Intermediates.AddCert(cert)
	}
	_, err = state.PeerCertificates[0].Verify(options)
	return err
}

func (p *httpsProbe) probe(ctx context.Context, address string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	alive := make(chan error, 1)
	second := time.AfterFunc(slowAnswer, func() { alive <- p.get(ctx, address, aliveQuery) })
	err := p.get(ctx, address, readyQuery)
	var waits *NotReadyError
	if second.Stop() || err == nil || errors.As(err, &waits) {
		return err
	}
	switch answer := <-alive; {
	case answer == nil:
		return &NotReadyError{Reason: "its datastore does not answer"}
	case errors.As(answer, &waits):
		return answer
	}
	return err
}

func (p *httpsProbe) get(ctx context.Context, address, query string) error {
	r := (&http.Request{
		Method: http.MethodGet, URL: &url.URL{Scheme: "https", Host: address, Path: "/readyz", RawQuery: query},
		Header: http.Header{"User-Agent": {"kedge-apilb"}},
	}).WithContext(ctx)
	answer, err := p.transport.RoundTrip(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	// To its end, so that the connection can be used again.
	body, err := io.ReadAll(io.LimitReader(answer.Body, 16<<10))
	if err != nil {
		return err
	}
	switch answer.StatusCode {
	case http.StatusOK, http.StatusUnauthorized, http.StatusForbidden:
		return nil
	}
	if failed := failedChecks(string(body)); failed != "" {
		return &NotReadyError{Reason: failed}
	}
	return &NotReadyError{Reason: answer.Status}
}

// failedChecks names what failed in an answer of /readyz, up to three of them.
func failedChecks(body string) string {
	var names []string
	for line := range strings.Lines(body) {
		name, ok := strings.CutPrefix(line, "[-]")
		if !ok {
			continue
		}
		if len(names) == 3 {
			names = append(names, "…")
			break
		}
		name, _, _ = strings.Cut(strings.TrimSpace(name), " ")
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}
