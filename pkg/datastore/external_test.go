// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
)

// TestHealthy asks what is like the client port of an etcd that wants to see a certificate.
func TestHealthy(t *testing.T) {
	files, strangers := testFiles(t, slog.New(slog.DiscardHandler)), testFiles(t, slog.New(slog.DiscardHandler))
	ca, err := os.ReadFile(files.CA)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	serve := func(status int) string {
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.Error(w, r.URL.Path+" no leader", status) }))
		s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
		s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
		s.StartTLS()
		t.Cleanup(s.Close)
		return s.URL
	}
	good, bad := serve(http.StatusOK), serve(http.StatusServiceUnavailable)
	gone := httptest.NewServer(nil)
	gone.Close()
	closed := strings.Replace(gone.URL, "http:", "https:", 1)
	for name, test := range map[string]struct {
		endpoints []string
		files     TLSFiles
		want      string // empty: healthy
	}{
		"one":                 {[]string{good}, files, ""},
		"one of several":      {[]string{closed, bad, good}, files, ""},
		"closed":              {[]string{closed}, files, "connection refused"},
		"no majority":         {[]string{bad}, files, "503 Service Unavailable: /health no leader"},
		"no certificate":      {[]string{good}, TLSFiles{CA: files.CA}, "certificate required"},
		"another's":           {[]string{good}, TLSFiles{CA: files.CA, Cert: strangers.Cert, Key: strangers.Key}, "tls: "},
		"it is another's":     {[]string{good}, TLSFiles{CA: strangers.CA, Cert: files.Cert, Key: files.Key}, "signed by unknown authority"},
		"a file is not there": {[]string{good}, TLSFiles{CA: "/nowhere", Cert: files.Cert, Key: files.Key}, "/nowhere"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Healthy(t.Context(), test.endpoints, test.files)
			if (test.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}
