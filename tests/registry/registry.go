// SPDX-License-Identifier: Apache-2.0

// Package registry is a container registry for tests: the pull half of the OCI distribution specification 1.1, served
// from image archives, with basic authentication and TLS if wanted.
package registry

import (
	"archive/tar"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Config says how a registry is served.
type Config struct {
	// Archives are image archives with an OCI layout. An image is served under the path and tag of its name, whatever
	// host that has: docker.io/library/busybox:1 as /v2/library/busybox.
	Archives []string
	// User and Password make every request without them fail with 401.
	User, Password string
	// TLS serves HTTPS with a certificate of a fresh authority.
	TLS bool
	// Charts are served as OCI artifacts /v2/charts/NAME:VERSION, and by a chart repository at /.
	Charts []Chart
}

// Server is a running registry.
type Server struct {
	listener net.Listener
	http     http.Server
	done     chan error
	caPEM    []byte

	mu  sync.Mutex
	log []string
}

// Start serves on addr, as "10.101.0.1:5000" (port 0 takes a free one), until Close.
func Start(addr string, c Config) (*Server, error) {
	content, err := open(c.Archives)
	if err != nil {
		return nil, err
	}
	handler := http.NewServeMux()
	handler.Handle("/v2/", content)
	if err := content.addCharts(handler, c.Charts); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	s := &Server{listener: l, done: make(chan error, 1)}
	if c.TLS {
		host, _, err := net.SplitHostPort(l.Addr().String())
		if err != nil {
			return nil, errors.Join(err, l.Close())
		}
		cert, err := s.certificate(host)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("certificate for the registry: %w", err), l.Close())
		}
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12})
	}
	s.http = http.Server{Handler: s.logged(authenticated(handler, c.User, c.Password)), ReadHeaderTimeout: 10 * time.Second}
	go func() { s.done <- s.http.Serve(l) }()
	return s, nil
}

// Addr returns the address as host:port.
func (s *Server) Addr() string { return s.listener.Addr().String() }

// CA returns the authority's certificate in PEM; nil without TLS.
func (s *Server) CA() []byte { return s.caPEM }

// Requests returns the requests so far, as "GET /v2/library/busybox/manifests/1 200".
func (s *Server) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.log...)
}

// Close ends the registry.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if serveErr := <-s.done; !errors.Is(serveErr, http.ErrServerClosed) {
		err = errors.Join(err, serveErr)
	}
	return err
}

func (s *Server) logged(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := &recorder{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(rec, r)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.log = append(s.log, fmt.Sprintf("%s %s %d", r.Method, r.URL.Path, rec.status))
	})
}

type recorder struct {
	http.ResponseWriter
	status int
}

// WriteHeader implements [http.ResponseWriter].
func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

func authenticated(next http.Handler, user, password string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, ok := r.BasicAuth(); user != "" && (!ok || u != user || p != password) {
			w.Header().Set("WWW-Authenticate", `Basic realm="tests"`)
			fail(w, http.StatusUnauthorized, "UNAUTHORIZED")
			return
		}
		next.ServeHTTP(w, r)
	})
}

// content is what the archives hold. Test images are small: it is kept in memory.
type content struct {
	blobs map[digest.Digest][]byte
	types map[digest.Digest]string // of manifests
	tags  map[string]digest.Digest // "library/busybox:1"
}

func open(archives []string) (*content, error) {
	c := &content{blobs: map[digest.Digest][]byte{}, types: map[digest.Digest]string{}, tags: map[string]digest.Digest{}}
	for _, file := range archives {
		if err := c.add(file); err != nil {
			return nil, fmt.Errorf("image archive %s: %w", file, err)
		}
	}
	return c, nil
}

func (c *content) add(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch dir, name := path.Split(h.Name); {
		case dir == "blobs/sha256/":
			b, err := io.ReadAll(tr)
			if err != nil {
				return err
			}
			c.blobs[digest.NewDigestFromEncoded(digest.SHA256, name)] = b
		case h.Name == v1.ImageIndexFile:
			var index v1.Index
			if err := json.NewDecoder(tr).Decode(&index); err != nil {
				return fmt.Errorf("index: %w", err)
			}
			for _, m := range index.Manifests {
				ref := m.Annotations["io.containerd.image.name"]
				_, name, ok := strings.Cut(ref, "/")
				if !ok {
					return fmt.Errorf("an image has the name %q, not HOST/PATH:TAG", ref)
				}
				c.tags[name] = m.Digest
				c.types[m.Digest] = m.MediaType
			}
		}
	}
}

// ServeHTTP implements the pull endpoints of the distribution specification.
func (c *content) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		fail(w, http.StatusMethodNotAllowed, "UNSUPPORTED")
		return
	}
	name, ok := strings.CutPrefix(r.URL.Path, "/v2/")
	if !ok {
		fail(w, http.StatusNotFound, "UNSUPPORTED")
		return
	}
	if name == "" {
		fmt.Fprint(w, "{}")
		return
	}
	dir, ref := path.Split(name)
	repo, isManifest := strings.CutSuffix(dir, "/manifests/")
	d := digest.Digest(ref)
	if tagged, ok := c.tags[repo+":"+ref]; ok && isManifest {
		d = tagged
	}
	blob, ok := c.blobs[d]
	if !ok {
		fail(w, http.StatusNotFound, "MANIFEST_UNKNOWN")
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if isManifest {
		w.Header().Set("Content-Type", c.types[d])
	}
	w.Header().Set("Docker-Content-Digest", d.String())
	http.ServeContent(w, r, "", time.Time{}, strings.NewReader(string(blob)))
}

func fail(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"not served here"}]}`, code)
}

// certificate makes an authority and a leaf for one host.
func (s *Server) certificate(host string) (tls.Certificate, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test registry CA"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: host},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{net.ParseIP(host)},
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	s.caPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
