// SPDX-License-Identifier: Apache-2.0

package apilb

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/tests/testlog"
)

// TestMain lets the test binary be an API server in a process of its own, which can be frozen.
func TestMain(m *testing.M) {
	if cert := os.Getenv("APILB_TEST_SERVER"); cert != "" {
		if err := childServer([]byte(cert)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// authority is a CA and a certificate of it for API servers.
type authority struct {
	pool *x509.CertPool
	cert tls.Certificate
}

func (a *authority) ca() (*x509.CertPool, error) { return a.pool, nil }

func newAuthority(t testing.TB) *authority {
	t.Helper()
	make := func(template, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if parent == nil {
			parent, signer = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert, key
	}
	end := time.Now().Add(time.Hour)
	ca, caKey := make(&x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotAfter: end,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	leaf, key := make(&x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "apiserver"}, NotAfter: end, DNSNames: []string{"kubernetes"},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, ca, caKey)
	a := &authority{pool: x509.NewCertPool(), cert: tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}}
	a.pool.AddCert(ca)
	return a
}

// apiServer is a TLS server that answers /readyz as an API server does, and everything else with its name.
type apiServer struct {
	name       string
	address    string
	server     *http.Server
	listener   net.Listener
	handshakes atomic.Int64
	probes     atomic.Int64
	status     atomic.Int64 // of /readyz
	noEtcd     atomic.Bool  // the check of etcd hangs

	mu   sync.Mutex
	held chan struct{} // while it is not nil, nothing is read from any connection
}

func newAPIServer(t testing.TB, a *authority, name, address string) *apiServer {
	t.Helper()
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s := &apiServer{name: name, address: listener.Addr().String(), listener: listener}
	s.status.Store(http.StatusOK)
	config := &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		s.handshakes.Add(1)
		return &a.cert, nil
	}}
	s.server = &http.Server{Handler: s, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	var running sync.WaitGroup
	running.Go(func() { s.server.Serve(tls.NewListener(heldListener{listener, s}, config)) })
	t.Cleanup(func() { s.release(); s.die(); running.Wait() })
	return s
}

// die closes the port and all connections.
func (s *apiServer) die() {
	s.server.Close()
	s.listener.Close() // the server may not have begun to use it
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/readyz" {
		io.WriteString(w, s.name)
		return
	}
	s.probes.Add(1)
	if s.noEtcd.Load() && !slices.Contains(r.URL.Query()["exclude"], "etcd") {
		<-r.Context().Done()
		return
	}
	status := int(s.status.Load())
	if status == http.StatusInternalServerError {
		http.Error(w, "[+]ping ok\n[-]etcd failed: reason withheld\n[-]shutdown failed: reason withheld\nreadyz check failed", status)
		return
	}
	w.WriteHeader(status)
	io.WriteString(w, "ok")
}

// hold makes the server silent: it accepts connections and never says a word, neither on them nor on those there are.
func (s *apiServer) hold() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held == nil {
		s.held = make(chan struct{})
	}
}

func (s *apiServer) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held != nil {
		close(s.held)
		s.held = nil
	}
}

type heldListener struct {
	net.Listener
	s *apiServer
}

func (l heldListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &heldConn{conn, l.s}, nil
}

type heldConn struct {
	net.Conn
	s *apiServer
}

func (c *heldConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.s.mu.Lock()
	held := c.s.held
	c.s.mu.Unlock()
	if held != nil {
		<-held
	}
	return n, err
}

// childServer serves with a backlog for one connection. It prints its address and ends with its standard input.
func childServer(config []byte) error {
	var c struct{ Cert, Key []byte }
	if err := json.Unmarshal(config, &c); err != nil {
		return err
	}
	key, err := x509.ParseECPrivateKey(c.Key)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return err
	}
	if err := unix.Listen(fd, 0); err != nil {
		return err
	}
	listener, err := net.FileListener(os.NewFile(uintptr(fd), "listener"))
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr())
	go func() { io.Copy(io.Discard, os.Stdin); os.Exit(0) }()
	server := &http.Server{
		Handler:  http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "child") }),
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
	}
	return server.Serve(tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{c.Cert}, PrivateKey: key}}}))
}

// freeze stops a process and waits until all of its threads have stopped: none may take one more connection.
func freeze(t *testing.T, p *os.Process) {
	t.Helper()
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := unix.Waitid(unix.P_PID, p.Pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
}

// startChild starts an API server as a process of its own.
func startChild(t *testing.T, a *authority) (process *os.Process, address string) {
	t.Helper()
	key, err := x509.MarshalECPrivateKey(a.cert.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(map[string][]byte{"Cert": a.cert.Certificate[0], "Key": key})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "APILB_TEST_SERVER="+string(config))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGCONT)
		stdin.Close()
		cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return cmd.Process, strings.TrimSpace(line)
}

// closedPort is an address at which nobody listens.
func closedPort(t testing.TB) string {
	t.Helper()
	// Bound and not listening: it is refused, and nobody else gets it.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint("127.0.0.1:", name.(*unix.SockaddrInet4).Port)
}

// harness is a balancer that runs.
type harness struct {
	*Balancer
	t    testing.TB
	tls  *tls.Config
	stop func()
}

// start runs a balancer. change, if not nil, sees it before it runs.
func start(t testing.TB, a *authority, cfg Config, change func(*Balancer)) *harness {
	t.Helper()
	cfg.Listen = "127.0.0.1:0"
	if cfg.File == "" {
		cfg.File = filepath.Join(t.TempDir(), "servers.json")
	}
	if cfg.Probe == nil {
		cfg.Probe = HTTPSProbe(a.ca)
	}
	if cfg.Logger == nil {
		cfg.Logger = testlog.New(t)
	}
	b, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(b)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	h := &harness{Balancer: b, t: t, tls: &tls.Config{RootCAs: a.pool, ServerName: "kubernetes"}}
	h.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		for _, s := range b.Servers() {
			if s.Connections != 0 {
				t.Errorf("after the end: %+v", s)
			}
		}
	})
	t.Cleanup(h.stop)
	eventually(t, "listening", func() bool { return b.Addr() != "127.0.0.1:0" })
	return h
}

// use sets the servers and makes their order that of the arguments.
func (h *harness) use(addresses ...string) {
	h.t.Helper()
	if err := h.SetServers(addresses); err != nil {
		h.t.Fatal(err)
	}
}

// nodeFor finds a node name that prefers the servers in the order given.
func nodeFor(addresses ...string) string {
	for i := 0; ; i++ {
		node := fmt.Sprint("node-", i)
		if slices.IsSortedFunc(addresses, func(x, y string) int {
			if place(node, x) < place(node, y) {
				return -1
			}
			return 1
		}) {
			return node
		}
	}
}

// session is a client's connection through the balancer.
type session struct {
	t    testing.TB
	conn *tls.Conn
	in   *bufio.Reader
}

// connect makes a connection, or returns an error within limit.
func (h *harness) connect(limit time.Duration) (*session, error) {
	conn, err := net.DialTimeout("tcp", h.Addr(), limit)
	if err != nil {
		return nil, err
	}
	s := &session{t: h.t, conn: tls.Client(conn, h.tls)}
	s.in = bufio.NewReader(s.conn)
	conn.SetDeadline(time.Now().Add(limit))
	if err := s.conn.Handshake(); err != nil {
		conn.Close()
		return nil, err
	}
	conn.SetDeadline(time.Time{})
	h.t.Cleanup(func() { conn.Close() })
	return s, nil
}

func (h *harness) mustConnect() *session {
	h.t.Helper()
	s, err := h.connect(30 * time.Second)
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

// who asks for the server's name.
func (s *session) who() (string, error) {
	if _, err := io.WriteString(s.conn, "GET /who HTTP/1.1\r\nHost: kubernetes\r\n\r\n"); err != nil {
		return "", err
	}
	answer, err := http.ReadResponse(s.in, nil)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	return string(body), err
}

func (s *session) is(name string) {
	s.t.Helper()
	if got, err := s.who(); err != nil || got != name {
		s.t.Fatalf("got server %q, want %q: %v", got, name, err)
	}
}

// ended waits for the connection to be closed by the balancer.
func (s *session) ended(limit time.Duration) error {
	s.conn.SetReadDeadline(time.Now().Add(limit))
	_, err := s.in.ReadByte()
	if err == nil {
		return fmt.Errorf("the server said something")
	}
	if os.IsTimeout(err) {
		return fmt.Errorf("still open after %v", limit)
	}
	return nil
}

func (h *harness) server(address string) Server {
	for _, s := range h.Servers() {
		if s.Address == address {
			return s
		}
	}
	return Server{}
}

func (h *harness) settled(address string) {
	h.t.Helper()
	eventually(h.t, address+" is in use and ready", func() bool { s := h.server(address); return s.Active && s.Healthy })
}

// eventually waits for a condition, not for a time.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 seconds: %s", what)
		}
	}
}

// noGoroutines waits until no goroutine is left in the package's code.
func noGoroutines(t *testing.T) {
	t.Helper()
	var stacks string
	eventually(t, "no goroutine of the package is left", func() bool {
		buf := make([]byte, 1<<20)
		stacks = string(buf[:runtime.Stack(buf, true)])
		return !strings.Contains(stacks, "apilb.(*Balancer)") && !strings.Contains(stacks, "apilb.race")
	})
}
