// SPDX-License-Identifier: Apache-2.0

package apilb

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestHTTPSProbe(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	other := newAuthority(t)
	tests := []struct {
		name     string
		status   int
		prepare  func(*apiServer)
		ca       func() (*x509.CertPool, error)
		want     string // part of the error; empty: ready
		notReady bool
	}{
		{name: "ready", status: 200},
		{name: "anonymous users are off", status: 401},
		{name: "anonymous users may do nothing", status: 403},
		{name: "a check fails", status: 500, want: "not ready: etcd, shutdown", notReady: true},
		{name: "something else answers", status: 404, want: "not ready: 404 Not Found", notReady: true},
		{name: "overloaded", status: 429, want: "not ready: 429", notReady: true},
		{name: "datastore away", status: 200, prepare: func(s *apiServer) { s.noEtcd.Store(true) }, want: "its datastore does not answer", notReady: true},
		{name: "datastore away and ending", status: 500, prepare: func(s *apiServer) { s.noEtcd.Store(true) }, want: "not ready: etcd, shutdown", notReady: true},
		{name: "silent", status: 200, prepare: (*apiServer).hold, want: "deadline exceeded"},
		{name: "closed", status: 200, prepare: (*apiServer).die, want: "connection refused"},
		{name: "of another cluster", status: 200, ca: other.ca, want: "certificate signed by unknown authority"},
		{name: "without a CA", status: 200, ca: func() (*x509.CertPool, error) { return nil, errors.New("no file") }, want: "CA to verify the server with: no file"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newAPIServer(t, a, "one", "127.0.0.1:0")
			s.status.Store(int64(test.status))
			if test.prepare != nil {
				test.prepare(s)
			}
			if test.ca == nil {
				test.ca = a.ca
			}
			ctx, cancel := context.WithTimeout(t.Context(), defaultTiming().timeout)
			defer cancel()
			err := HTTPSProbe(test.ca)(ctx, s.address)
			var notReady *NotReadyError
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) || errors.As(err, &notReady) != test.notReady {
				t.Errorf("got error %v", err)
			}
		})
	}
}

// Probes share one connection, also after an answer that was not the best; a server that fell silent gets a new one.
func TestProbeConnection(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := newAPIServer(t, a, "one", "127.0.0.1:0")
	probe := HTTPSProbe(a.ca)
	for i := range 20 {
		if i == 10 {
			s.status.Store(500)
		}
		if err := probe(t.Context(), s.address); (err != nil) != (i >= 10) {
			t.Fatal(err)
		}
	}
	if got := s.handshakes.Load(); got != 1 {
		t.Errorf("%d handshakes for 20 probes", got)
	}
	s.status.Store(200)
	s.hold()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := probe(ctx, s.address); err == nil {
		t.Error("no error")
	}
	s.release()
	if err := probe(t.Context(), s.address); err != nil {
		t.Error(err)
	}
	if got := s.handshakes.Load(); got != 2 {
		t.Errorf("%d handshakes", got)
	}
}

func TestFailedChecks(t *testing.T) {
	for body, want := range map[string]string{
		"":                           "",
		"ok":                         "",
		"[+]a ok\n[-]b failed: x\n":  "b",
		"[-]a\n[-]b x\n[-]c\n[-]d":   "a, b, c, …",
		"internal server error: [-]": "",
	} {
		if got := failedChecks(body); got != want {
			t.Errorf("%q: got %q, want %q", body, got, want)
		}
	}
}

// The CPU time that a minute of probes takes: server and client together, as both are in this process.
func BenchmarkProbe(b *testing.B) {
	a := newAuthority(b)
	s := newAPIServer(b, a, "one", "127.0.0.1:0")
	probe := HTTPSProbe(a.ca)
	if err := probe(b.Context(), s.address); err != nil {
		b.Fatal(err)
	}
	var before, after unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &before)
	for b.Loop() {
		if err := probe(b.Context(), s.address); err != nil {
			b.Fatal(err)
		}
	}
	unix.Getrusage(unix.RUSAGE_SELF, &after)
	cpu := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
	b.ReportMetric(float64(cpu)/float64(b.N)/1000, "cpu-µs/op")
}
