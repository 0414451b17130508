// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"

	"github.com/kedge-io/kedge/scripts/image"
	"github.com/kedge-io/kedge/tests/registry"
)

func archive(t *testing.T, name string) string {
	t.Helper()
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "file"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "a.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := image.Write(f, image.Config{Name: name, Architecture: "amd64", Rootfs: root}); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// TestPull pulls with containerd's client, which is what pulls in a node.
func TestPull(t *testing.T) {
	for name, c := range map[string]struct {
		config   registry.Config
		password string
		wantErr  bool
	}{
		"plain":          {},
		"credentials":    {registry.Config{User: "u", Password: "p"}, "p", false},
		"wrong password": {registry.Config{User: "u", Password: "p"}, "q", true},
		"no password":    {registry.Config{User: "u", Password: "p"}, "", true},
		"tls":            {registry.Config{TLS: true}, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			c.config.Archives = []string{archive(t, "docker.io/library/thing:1")}
			s, err := registry.Start("127.0.0.1:0", c.config)
			if err != nil {
				t.Fatal(err)
			}
			transport := &http.Transport{}
			defer func() {
				transport.CloseIdleConnections()
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}()
			scheme := "http"
			if c.config.TLS {
				scheme = "https"
				pool := x509.NewCertPool()
				if !pool.AppendCertsFromPEM(s.CA()) {
					t.Fatal("no CA")
				}
				transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
			}
			client := &http.Client{Transport: transport}
			resolver := docker.NewResolver(docker.ResolverOptions{Hosts: func(string) ([]docker.RegistryHost, error) {
				return []docker.RegistryHost{{
					Client: client, Host: s.Addr(), Scheme: scheme, Path: "/v2",
					Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve,
					Authorizer: docker.NewDockerAuthorizer(docker.WithAuthClient(client), docker.WithAuthCreds(func(string) (string, string, error) {
						return c.config.User, c.password, nil
					})),
				}}, nil
			}})
			err = pull(t, resolver, "docker.io/library/thing:1")
			if (err != nil) != c.wantErr {
				t.Errorf("pull: %v; requests: %v", err, s.Requests())
			}
			if err := pull(t, resolver, "docker.io/library/other:1"); err == nil {
				t.Error("an image that is not there could be pulled")
			}
		})
	}
}

func pull(t *testing.T, r remotes.Resolver, ref string) error {
	name, desc, err := r.Resolve(t.Context(), ref)
	if err != nil {
		return err
	}
	f, err := r.Fetcher(t.Context(), name)
	if err != nil {
		return err
	}
	body, err := f.Fetch(t.Context(), desc)
	if err != nil {
		return err
	}
	return body.Close()
}
