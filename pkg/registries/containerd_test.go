// SPDX-License-Identifier: Apache-2.0

package registries

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/log"
	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"

	"github.com/kedge-io/kedge/tests/golden"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if err := log.SetLevel("error"); err != nil { // containerd tells of every host that it tries
		panic(err)
	}
	os.Exit(m.Run())
}

func TestGolden(t *testing.T) {
	inputs, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(inputs) == 0 {
		t.Fatal("no input:", err)
	}
	for _, path := range inputs {
		t.Run(filepath.Base(path), func(t *testing.T) {
			c, err := Load(path)
			if err != nil {
				t.Fatal(err)
			}
			files := c.Files()
			var got strings.Builder
			for _, name := range slices.Sorted(maps.Keys(files)) {
				fmt.Fprintf(&got, "=== %s\n%s", name, files[name])
			}
			if fragment := c.AuthTOML(); len(fragment) > 0 {
				fmt.Fprintf(&got, "=== containerd configuration\n%s", fragment)
			}
			for name, contents := range files {
				if err := toml.Unmarshal(contents, new(any)); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
			golden.Compare(t, strings.TrimSuffix(path, ".yaml")+".golden", got.String())
		})
	}
}

// registry is a registry with one image, library/a:1. It remembers who asked for what.
type registry struct {
	root     string // of the API
	realm    string // of the token server; empty: no authentication or basic
	user     string // user:password, or :refresh-token; empty: everybody
	missing  bool   // it has no image
	mu       sync.Mutex
	requests []string
}

const manifest = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}`

func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	r.requests = append(r.requests, req.Method+" "+req.URL.RequestURI())
	r.mu.Unlock()
	root := r.root
	if root == "" {
		root = "/v2"
	}
	authorization := req.Header.Get("Authorization")
	switch {
	case req.URL.Path == "/token":
		r.token(w, req)
	case r.realm != "" && authorization != "Bearer granted":
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="test"`, r.realm))
		w.WriteHeader(http.StatusUnauthorized)
	case r.realm == "" && r.user != "" && authorization != "Basic "+base64.StdEncoding.EncodeToString([]byte(r.user)):
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
	case !r.missing && strings.HasPrefix(req.URL.Path, root+"/library/a/manifests/"):
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		w.Header().Set("Docker-Content-Digest", fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(manifest))))
		w.Header().Set("Content-Length", fmt.Sprint(len(manifest)))
		if req.Method == http.MethodGet {
			_, _ = io.WriteString(w, manifest)
		}
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

// token answers the OAuth2 form (POST) and the older one (GET with basic authentication) of the token protocol:
// https://distribution.github.io/distribution/spec/auth/oauth/
func (r *registry) token(w http.ResponseWriter, req *http.Request) {
	user, password, _ := req.BasicAuth()
	if req.Method == http.MethodPost {
		user, password = req.PostFormValue("username"), req.PostFormValue("password")
		if req.PostFormValue("grant_type") == "refresh_token" {
			user, password = "", req.PostFormValue("refresh_token")
		}
	}
	if user+":"+password != r.user {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	_ = json.NewEncoder(w).Encode(map[string]string{"token": "granted", "access_token": "granted"})
}

// resolve asks containerd's own code to find an image with what Kedge generated.
func resolve(t *testing.T, c *Config, ref string) error {
	t.Helper()
	dir := t.TempDir()
	if _, err := c.Write(dir); err != nil {
		t.Fatal(err)
	}
	// As in containerd's internal/cri/server/images/image_pull.go, PullImage and ParseAuth.
	var fragment struct {
		Plugins map[string]struct {
			Registry struct {
				Configs map[string]struct {
					Auth struct{ Username, Password, Auth, IdentityToken string }
				}
			}
		}
	}
	if err := toml.Unmarshal(c.AuthTOML(), &fragment); err != nil {
		t.Fatal(err)
	}
	credentials := func(host string) (string, string, error) {
		a := fragment.Plugins["io.containerd.cri.v1.images"].Registry.Configs[host].Auth
		switch {
		case a.Username != "":
			return a.Username, a.Password, nil
		case a.IdentityToken != "":
			return "", a.IdentityToken, nil
		}
		decoded, err := base64.StdEncoding.DecodeString(a.Auth)
		user, password, _ := strings.Cut(string(decoded), ":")
		return user, password, err
	}
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: config.ConfigureHosts(context.Background(), config.HostOptions{
		HostDir: config.HostDirFromRoot(dir), Credentials: credentials,
	})})
	_, desc, err := resolver.Resolve(t.Context(), ref)
	if err != nil {
		return err
	}
	fetcher, err := resolver.Fetcher(t.Context(), ref)
	if err != nil {
		return err
	}
	content, err := fetcher.Fetch(t.Context(), desc)
	if err != nil {
		return err
	}
	defer content.Close()
	got, err := io.ReadAll(content)
	if err == nil && string(got) != manifest {
		t.Errorf("fetched %q", got)
	}
	return err
}

func mustParse(t *testing.T, format string, args ...any) *Config {
	t.Helper()
	c, err := parse("registries.yaml", fmt.Appendf(nil, format, args...))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestContainerdUsesMirrors(t *testing.T) {
	empty, full, rooted := &registry{missing: true}, &registry{}, &registry{root: "/v2/cache"}
	first, second, third := httptest.NewServer(empty), httptest.NewServer(full), httptest.NewServer(rooted)
	t.Cleanup(first.Close)
	t.Cleanup(second.Close)
	t.Cleanup(third.Close)
	host := strings.TrimPrefix(second.URL, "http://")
	for _, test := range []struct {
		name, yaml, ref string
		r               *registry
		query           string
	}{
		{"in order", "mirrors: {registry.test: {endpoint: [" + first.URL + ", " + second.URL + "]}}", "registry.test/library/a:1", full, "?ns=registry.test"},
		{"default", "mirrors: {'*': {endpoint: [" + second.URL + "]}}", "registry.test/library/a:1", full, "?ns=registry.test"},
		{"default also with settings of its own", "{mirrors: {'*': {endpoint: [" + second.URL + "]}}, configs: {registry.test: {tls: {insecure_skip_verify: true}}}}",
			"registry.test/library/a:1", full, "?ns=registry.test"},
		{"Docker Hub", "mirrors: {docker.io: {endpoint: [" + second.URL + "]}}", "docker.io/library/a:1", full, "?ns=docker.io"},
		{"Docker Hub under another name", "mirrors: {registry-1.docker.io: {endpoint: [" + second.URL + "]}}", "docker.io/library/a:1", full, "?ns=docker.io"},
		{"path", "mirrors: {registry.test: {endpoint: [" + third.URL + "/v2/cache/]}}", "registry.test/library/a:1", rooted, "?ns=registry.test"},
		{"registry with plain http", "mirrors: {'" + host + "': {endpoint: [" + second.URL + "]}}", host + "/library/a:1", full, ""},
		{"mirror before the registry", "mirrors: {'" + host + "': {endpoint: [" + first.URL + ", " + second.URL + "]}}", host + "/library/a:1", full, ""},
		{"registry before the mirror", "mirrors: {'" + host + "': {endpoint: [" + second.URL + ", " + first.URL + "]}}", host + "/library/a:1", full, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.r.requests = nil
			if err := resolve(t, mustParse(t, "%s", test.yaml), test.ref); err != nil {
				t.Fatal(err)
			}
			root := test.r.root
			if root == "" {
				root = "/v2"
			}
			want := []string{"HEAD " + root + "/library/a/manifests/1" + test.query}
			if diff := cmp.Diff(want, test.r.requests[:1]); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestContainerdUsesCredentials(t *testing.T) {
	const elsewhere = "127.0.0.1:1" // a registry that nobody can reach
	for _, form := range []struct{ name, user, yaml string }{
		{"username and password", "u:p", "{username: u, password: p}"},
		{"digits", "007:0123", "{username: 007, password: 0123}"},
		{"auth", "u:p:q", "{auth: dTpwOnE=}"},
		{"identity token", ":refresh", "{identity_token: refresh}"},
	} {
		for _, bearer := range []bool{false, true} {
			if !bearer && form.name == "identity token" {
				continue // has no meaning with basic authentication
			}
			t.Run(fmt.Sprintf("%s bearer=%v", form.name, bearer), func(t *testing.T) {
				r := &registry{user: form.user}
				s := httptest.NewTLSServer(r)
				defer s.Close()
				if bearer {
					r.realm = s.URL + "/token"
				}
				ca := filepath.Join(t.TempDir(), "ca.pem")
				if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
					t.Fatal(err)
				}
				u, err := url.Parse(s.URL)
				if err != nil {
					t.Fatal(err)
				}
				// The registry itself, and as a mirror of another.
				for _, ref := range []string{u.Host + "/library/a:1", elsewhere + "/library/a:1"} {
					mirrors := fmt.Sprintf("mirrors: {'%s': {endpoint: ['%s']}}\n", elsewhere, s.URL)
					configs := fmt.Sprintf("configs: {'%s': {tls: {ca_file: %s}, auth: %s}}\n", u.Host, ca, form.yaml)
					if err := resolve(t, mustParse(t, "%s%s", mirrors, configs), ref); err != nil {
						t.Errorf("%s: %v", ref, err)
					}
					anonymous := fmt.Sprintf("configs: {'%s': {tls: {ca_file: %s}}}\n", u.Host, ca)
					if err := resolve(t, mustParse(t, "%s%s", mirrors, anonymous), ref); err == nil {
						t.Errorf("%s: served without credentials; the test shows nothing", ref)
					}
				}
			})
		}
	}
}

func TestWrite(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "certs.d")
	read := func() map[string]string {
		files := map[string]string{}
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			if info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s can be read by others: %v", path, info.Mode())
			}
			name, err := filepath.Rel(dir, path)
			files[name] = ""
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		delete(files, ".")
		return files
	}
	write := func(c *Config, wantChanged bool, want ...string) {
		t.Helper()
		changed, err := c.Write(dir)
		if err != nil {
			t.Fatal(err)
		}
		if changed != wantChanged {
			t.Errorf("changed = %v", changed)
		}
		if diff := cmp.Diff(want, slices.Sorted(maps.Keys(read())), cmp.Transformer("empty", func(s []string) []string { return append([]string{}, s...) })); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	}
	write(&Config{}, false)
	one := mustParse(t, "mirrors: {a.test: {endpoint: [m.test]}, 'b.test:5000': {endpoint: [m.test]}}")
	write(one, true, "a.test", "a.test/hosts.toml", "b.test:5000", "b.test:5000/hosts.toml")
	write(one, false, "a.test", "a.test/hosts.toml", "b.test:5000", "b.test:5000/hosts.toml")
	write(mustParse(t, "mirrors: {a.test: {endpoint: [n.test]}}"), true, "a.test", "a.test/hosts.toml")

	other := filepath.Join(dir, "other.test")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(other, "hosts.toml"), []byte("# mine\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	write(&Config{}, true, "other.test", "other.test/hosts.toml")
	write(&Config{}, false, "other.test", "other.test/hosts.toml")
}
