// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/kedge-io/kedge/pkg/pki"
)

// takeUpTime is how long the API server may take to serve a new certificate: it is told by inotify, and looks every minute.
const takeUpTime = 90 * time.Second

// rotateCertificates renews leaf certificates, and says when the one that everybody sees is in use.
func (s *server) rotateCertificates(ctx context.Context, names []pki.Name, say func(string)) error {
	renewed, err := s.keys.Load().Rotate(names...)
	for _, n := range renewed {
		say(string(n) + " renewed")
	}
	if err != nil {
		return err
	}
	if !slices.Contains(renewed, pki.APIServer) || !s.cfg.HasControlPlane() {
		return nil
	}
	if err := s.apiServes(ctx); err != nil {
		return err
	}
	say("the API server serves the new certificate")
	return nil
}

// apiServes waits until this machine's API server shows the certificate that is on disk. An API server that is down will.
func (s *server) apiServes(ctx context.Context) error {
	file := s.pki.CertFile(pki.APIServer)
	want, err := tls.LoadX509KeyPair(file, file)
	if err != nil {
		return err
	}
	address := net.JoinHostPort(s.apiHost(), strconv.Itoa(s.cfg.HTTPSListenPort))
	// Only the certificate is looked at; nothing is sent.
	dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: time.Second}, Config: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}}
	err = wait.PollUntilContextTimeout(ctx, 200*time.Millisecond, takeUpTime, true, func(ctx context.Context) (bool, error) {
		conn, err := dialer.DialContext(ctx, "tcp", address)
		if err != nil {
			return false, nil
		}
		defer conn.Close()
		state := conn.(*tls.Conn).ConnectionState()
		return bytes.Equal(state.PeerCertificates[0].Raw, want.Certificate[0]), nil
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the certificates are on disk, but the API server at %s does not serve the new one after %s: see `kedge status`", address, takeUpTime)
	}
	return err
}
