// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/trace/noop"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	auditinternal "k8s.io/apiserver/pkg/apis/audit"
	"k8s.io/apiserver/pkg/audit/policy"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	x509request "k8s.io/apiserver/pkg/authentication/request/x509"
	"k8s.io/apiserver/pkg/endpoints/filters"
	"k8s.io/apiserver/pkg/endpoints/request"
	genericfilters "k8s.io/apiserver/pkg/server/filters"
	listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
)

// authority signs the test's certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{}
	a.cert, a.key = a.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

func (a *authority) sign(t *testing.T, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(1)
	template.NotBefore, template.NotAfter = time.Unix(0, 0), time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

func (a *authority) leaf(t *testing.T, template *x509.Certificate) tls.Certificate {
	t.Helper()
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	cert, key := a.sign(t, template)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

// serverTLS is the API server's side, which asks for certificates but does not insist.
func (a *authority) serverTLS(t *testing.T) *tls.Config {
	t.Helper()
	cert := a.leaf(t, &x509.Certificate{Subject: pkix.Name{CommonName: "apiserver"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"api"}})
	return &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert, NextProtos: []string{"h2", "http/1.1"}}
}

// nodeTLS is that of the user NAME in the group.
func (a *authority) nodeTLS(t *testing.T, user, group string) *tls.Config {
	t.Helper()
	cert := a.leaf(t, &x509.Certificate{Subject: pkix.Name{CommonName: user, Organization: []string{group}}})
	return &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: a.pool()}
}

// bed is an API server's front with the filters that matter, and nodes.
type bed struct {
	t      *testing.T
	ca     *authority
	nodes  cache.Indexer
	server *Server
	log    *logs
	front  *httptest.Server
}

func newBed(t *testing.T, change ...func(*Server)) *bed {
	t.Helper()
	noLeaks(t)
	b := &bed{t: t, ca: newAuthority(t), nodes: cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{}), log: &logs{}}
	b.server = NewServer(ServerConfig{Nodes: listers.NewNodeLister(b.nodes), Log: b.log.logger()})
	for _, f := range change {
		f(b.server)
	}
	b.front = httptest.NewUnstartedServer(b.ca.filters(b.server))
	b.front.TLS = b.ca.serverTLS(t)
	b.front.EnableHTTP2 = true
	b.front.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	b.front.StartTLS()
	t.Cleanup(b.front.Close)
	t.Cleanup(b.server.Close)
	return b
}

// filters is the part of the API server's chain that wraps the response or ends requests.
func (a *authority) filters(h http.Handler) http.Handler {
	longRunning := func(*http.Request, *request.RequestInfo) bool { return false }
	auth := authenticator.Request(x509request.New(x509.VerifyOptions{Roots: a.pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, x509request.CommonNameUserConversion))
	h = filters.WithAudit(h, noAudit{}, policy.NewFakePolicyRuleEvaluator(auditinternal.LevelRequestResponse, nil), longRunning)
	h = filters.WithTracing(h, noop.NewTracerProvider())
	h = filters.WithAuthentication(h, auth, http.NotFoundHandler(), nil, nil)
	h = filters.WithWarningRecorder(h)
	h = genericfilters.WithTimeoutForNonLongRunningRequests(h, longRunning)
	h = genericfilters.WithHTTPLogging(h)
	h = filters.WithLatencyTrackers(h)
	h = filters.WithRequestInfo(h, &request.RequestInfoFactory{APIPrefixes: sets.NewString("api", "apis"), GrouplessAPIPrefixes: sets.NewString("api")})
	h = genericfilters.WithPanicRecovery(h, &request.RequestInfoFactory{})
	return filters.WithAuditInit(h)
}

// noAudit is an audit log that nobody reads: what counts is that the filter wraps responses.
type noAudit struct{}

func (noAudit) ProcessEvents(...*auditinternal.Event) bool { return true }

func (b *bed) address() string { return b.front.Listener.Addr().String() }

// addNode makes a Node object.
func (b *bed) addNode(name, podCIDR string, addresses ...corev1.NodeAddress) {
	b.t.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDR: podCIDR, PodCIDRs: []string{podCIDR}}, Status: corev1.NodeStatus{Addresses: addresses}}
	if err := b.nodes.Add(n); err != nil {
		b.t.Fatal(err)
	}
}

func internal(ip string) corev1.NodeAddress {
	return corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: ip}
}

// join runs a node's side until the test's end, or until the returned function is called.
func (b *bed) join(node string, change ...func(*Client)) (*Client, func()) {
	b.t.Helper()
	cfg := b.ca.nodeTLS(b.t, nodeUserPrefix+node, nodesGroup)
	c := NewClient(ClientConfig{
		TLS:   func() (*tls.Config, error) { return cfg, nil },
		Allow: func(a netip.AddrPort) bool { return a.Addr().IsLoopback() && a.Port() != 22 },
		Log:   b.log.logger().With("node", node),
	})
	c.SetServers([]string{b.address()})
	for _, f := range change {
		f(c)
	}
	return c, b.run(c)
}

func (b *bed) run(c *Client) func() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := c.Run(ctx); err != nil {
			b.t.Error(err)
		}
	}()
	stop := func() { cancel(); <-done }
	b.t.Cleanup(stop)
	return stop
}

// open waits until exactly these nodes have a tunnel.
func (b *bed) open(nodes ...string) {
	b.t.Helper()
	eventually(b.t, "sessions of "+strings.Join(nodes, ", "), func() bool { return slices.Equal(b.server.Sessions(), nodes) })
}

// dial connects, or fails the test.
func (b *bed) dial(addr string) net.Conn {
	b.t.Helper()
	conn, err := b.server.Dial(b.t.Context(), "tcp", addr)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { conn.Close() })
	return conn
}

// blackHole never answers.
func blackHole(ctx context.Context, _, _ string) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func noDirect(s *Server) { s.direct = blackHole }

func alwaysTunnel(s *Server) { s.cfg.Mode = Always }

// listen serves connections at an address of the loopback network.
func listen(t *testing.T, addr string, serve func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var open sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	open.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			open.Go(func() {
				defer context.AfterFunc(ctx, func() { conn.Close() })()
				defer conn.Close()
				serve(conn.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { l.Close(); cancel(); open.Wait() })
	return l.Addr().String()
}

func echo(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) }

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("not within 15 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// noLeaks fails the test if it leaves goroutines behind. It is called before anything is started.
func noLeaks(t *testing.T) {
	t.Helper()
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; {
			if time.Now().After(end) {
				stacks := make([]byte, 1<<20)
				t.Errorf("%d goroutines before, %d after:\n%s", before, runtime.NumGoroutine(), stacks[:runtime.Stack(stacks, true)])
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
}

// logs keeps what was logged.
type logs struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if os.Getenv("TUNNEL_LOG") != "" {
		os.Stderr.Write(p)
	}
	return l.text.Write(p)
}

func (l *logs) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func (l *logs) lines(with string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var found []string
	for line := range strings.Lines(l.text.String()) {
		if strings.Contains(line, with) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return found
}
