// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// sleepUntilRelease moves a bubble's clock, which begins in 2000, to where it counts; see wallClock.
func sleepUntilRelease() {
	release := wallClock()
	time.Sleep(time.Until(release) + time.Hour)
}

// start runs p until the test, or the returned function, ends it.
func start(t *testing.T, p *PKI) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

func TestRunRenewsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sleepUntilRelease()
		dir := t.TempDir()
		cfg := testConfig(dir)
		cfg.OnRenew = func(n Name) { t.Errorf("OnRenew(%s)", n) }
		p := mustEnsure(t, cfg)
		before := snapshot(t, dir)
		stop := start(t, p)

		time.Sleep(243 * day)
		synctest.Wait()
		if got := changed(before, snapshot(t, dir)); len(got) > 0 {
			t.Errorf("written before two thirds were over: %v", got)
		}
		time.Sleep(8*time.Hour + 2*checkInterval) // 2/3 of 365 days are 243 days and 8 hours
		synctest.Wait()
		got := changed(before, snapshot(t, dir))
		if len(got) != len(p.specs)+1 || got[0] != "etc/kubeconfig.yaml" {
			t.Errorf("renewed %v, want all %d leaves and the admin kubeconfig", got, len(p.specs))
		}
		for _, s := range p.Status() {
			if want := 364; !s.Name.isCA() && (s.DaysLeft != want || s.Warning != "") {
				t.Errorf("after renewal: %+v", s)
			}
		}
		stop()
		// The kubeconfig holds the certificate that is on disk.
		config, err := clientcmd.BuildConfigFromFlags("", cfg.AdminKubeconfigPath)
		if err != nil {
			t.Fatal(err)
		}
		if pem := snapshot(t, dir)["pki/admin.pem"]; pem != string(config.CertData)+string(config.KeyData) {
			t.Error("admin kubeconfig and admin.pem differ")
		}
	})
}

func TestYearSwitchedOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sleepUntilRelease()
		dir := t.TempDir()
		cfg := testConfig(dir)
		old := mustEnsure(t, cfg)
		before := snapshot(t, dir)
		time.Sleep(3 * 365 * day)
		var log bytes.Buffer
		cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
		p := mustEnsure(t, cfg)
		if got := changed(before, snapshot(t, dir)); len(got) != len(p.specs)+1 {
			t.Errorf("renewed %v", got)
		}
		if !strings.Contains(log.String(), `reason="expired on 2027-11-01`) {
			t.Errorf("log: %s", log.String())
		}
		if p.CAHash() != old.CAHash() {
			t.Error("CAHash changed")
		}
		handshake(t, p, APIServer, Admin, ServerCA, ClientCA, "localhost")
	})
}

// TestClockJumps: time passes while timers stand still.
func TestClockJumps(t *testing.T) {
	dir := t.TempDir()
	var restarts []Name
	cfg := testConfig(dir)
	cfg.OnRenew = func(n Name) { restarts = append(restarts, n) }
	p := mustEnsure(t, cfg)
	before := snapshot(t, dir)
	now := wallClock()
	state := renewal{loopback: now, reread: now, warned: now}
	for _, step := range []struct {
		jump     time.Duration
		renewed  int
		restarts int
	}{
		{time.Minute, 0, 0},
		{400 * day, len(p.specs) + 1, 0}, // woken up after more than a year
		{400 * day, len(p.specs) + 1, 1}, // 800 days: the loopback certificate, too
		{-800 * day, 0, 2},               // set back: not valid yet for the API server's loopback
		{time.Minute, 0, 2},
	} {
		now = now.Add(step.jump)
		p.tick(&state, now, now)
		after := snapshot(t, dir)
		if got := changed(before, after); len(got) != step.renewed {
			t.Errorf("after a jump by %v: renewed %v, want %d files", step.jump, got, step.renewed)
		}
		before = after
		if len(restarts) != step.restarts {
			t.Errorf("after a jump by %v: restarts %v, want %d", step.jump, restarts, step.restarts)
		}
	}
}

// TestClockNotSet: a first start in the year 2000 gives certificates that are valid then and when the clock has been set.
func TestClockNotSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := mustEnsure(t, testConfig(t.TempDir()))
		handshake(t, p, APIServer, Admin, ServerCA, ClientCA, "localhost")
		sleepUntilRelease()
		time.Sleep(200 * day)
		handshake(t, p, APIServer, Admin, ServerCA, ClientCA, "localhost")
	})
}

func TestRunRepairsAndRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sleepUntilRelease()
		dir := t.TempDir()
		var log syncBuffer
		cfg := testConfig(dir)
		cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
		p := mustEnsure(t, cfg)
		defer start(t, p)()
		path := p.CertFile(KubeletServing)
		// A directory in the place of a file: cannot be read, cannot be replaced.
		if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(rereadInterval + retryInterval + 5*checkInterval)
		synctest.Wait()
		if n := strings.Count(log.String(), "cannot renew certificates"); n != 2 {
			t.Errorf("%d failures were logged, want 2: %s", n, log.String())
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(retryInterval)
		synctest.Wait()
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("not repaired: %v, %v", info, err)
		}
	})
}

func TestAuthorityEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sleepUntilRelease()
		dir := t.TempDir()
		var log syncBuffer
		cfg := testConfig(dir)
		cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
		mustEnsure(t, cfg)
		time.Sleep(9*365*day - day)
		p := mustEnsure(t, cfg)
		if s := log.String(); strings.Contains(s, "ends soon") {
			t.Errorf("warned too early: %s", s)
		}
		stop := start(t, p)
		time.Sleep(3 * day)
		synctest.Wait()
		if s := log.String(); !strings.Contains(s, "ends soon") || !strings.Contains(s, "server-ca.crt") {
			t.Errorf("no warning: %s", s)
		}
		if s := p.Status()[0]; s.Name != ServerCA || s.DaysLeft != 363 || !strings.Contains(s.Warning, "server-ca.crt") {
			t.Errorf("status %+v", s)
		}
		stop()
		time.Sleep(365 * day)
		if _, err := Ensure(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "server-ca.crt has expired on 2036") {
			t.Errorf("error %v", err)
		}
		// The way out that the message names.
		for _, name := range authorityNames() {
			if err := os.Remove(p.CertFile(name)); err != nil {
				t.Fatal(err)
			}
		}
		renewed := mustEnsure(t, cfg)
		handshake(t, renewed, APIServer, Admin, ServerCA, ClientCA, "localhost")
		if renewed.CAHash() != p.CAHash() {
			t.Error("CAHash changed")
		}
	})
}

// syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}
func (s *syncBuffer) String() string { s.mu.Lock(); defer s.mu.Unlock(); return s.b.String() }

// TestUsersReload proves with the users' own code that no leaf needs a restart: the API server's and the kubelet's
// loader of serving certificates, client-go's of client certificates, and etcd's of both.
func TestUsersReload(t *testing.T) {
	cfg := testConfig(t.TempDir())
	p := mustEnsure(t, cfg)

	serving, err := dynamiccertificates.NewDynamicServingContentFromFiles("test", p.CertFile(APIServer), p.KeyFile(APIServer))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { serving.Run(ctx, 1) })
	defer wg.Wait()
	defer cancel()
	reloaded := make(chan struct{}, 10)
	serving.AddListener(listener(func() { reloaded <- struct{}{} }))

	etcdTLS := transport.TLSInfo{
		CertFile: p.CertFile(EtcdPeer), KeyFile: p.KeyFile(EtcdPeer), TrustedCAFile: p.CertFile(EtcdCA), ClientCertAuth: true,
	}
	listen, err := transport.NewListener("127.0.0.1:0", "https", &etcdTLS)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.TLS.PeerCertificates[0].SerialNumber)
	})}
	wg.Go(func() {
		if err := server.Serve(listen); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	defer server.Close()
	// client-go connects with the same leaf, by reference to its file.
	client, err := rest.HTTPClientFor(&rest.Config{TLSClientConfig: rest.TLSClientConfig{
		CAFile: p.CertFile(EtcdCA), CertFile: p.CertFile(EtcdPeer), KeyFile: p.KeyFile(EtcdPeer),
	}})
	if err != nil {
		t.Fatal(err)
	}
	serials := func() (serverSerial, clientSerial string, err error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+listen.Addr().String(), nil)
		if err != nil {
			return "", "", err
		}
		req.Close = true // a new handshake each time
		resp, err := client.Do(req)
		if err != nil {
			return "", "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return resp.TLS.PeerCertificates[0].SerialNumber.String(), string(body), err
	}
	old := p.leaves[EtcdPeer].SerialNumber.String()
	if s, c, err := serials(); err != nil || s != old || c != old {
		t.Fatalf("serials %s and %s, %v, want %s", s, c, err, old)
	}

	now := wallClock()
	state := renewal{loopback: now, reread: now, warned: now}
	p.tick(&state, now.Add(250*day), now) // everything is due

	select {
	case <-reloaded:
	case <-time.After(30 * time.Second):
		t.Error("the API server's loader did not notice the new file")
	}
	if got, _ := serving.CurrentCertKeyContent(); !strings.HasPrefix(string(got), "-----BEGIN CERTIFICATE") ||
		string(got) != snapshot(t, cfg.Dir)["apiserver.pem"] {
		t.Error("the API server's loader holds something else than the file")
	}
	// client-go reads its files at most once a second. The handshake that finds a new certificate closes all
	// connections, itself too: one request fails.
	want := p.leaves[EtcdPeer].SerialNumber.String()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		s, c, err := serials()
		if err == nil && s != want {
			t.Fatalf("etcd's server presents %s, want %s", s, want)
		}
		if err == nil && c == want {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("client-go presents %s, want %s; %v", c, want, err)
		}
	}
}

type listener func()

func (l listener) Enqueue() { l() }
