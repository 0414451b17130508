// SPDX-License-Identifier: Apache-2.0

package registries

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/util/validation"
)

// Load reads registries.yaml. A missing file is an empty configuration. The error names everything that is wrong, one
// problem a line, as file:line.
func Load(path string) (*Config, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &Config{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("registry configuration: %w", err)
	}
	return parse(path, data)
}

// The form of the file, see https://docs.k3s.io/installation/private-registry.
type (
	document struct {
		Mirrors map[text]mirrorEntry `yaml:"mirrors"`
		Configs map[text]hostEntry   `yaml:"configs"`
	}
	mirrorEntry struct {
		Endpoint []text          `yaml:"endpoint"`
		Rewrite  map[text]string `yaml:"rewrite"`
	}
	hostEntry struct {
		Auth *authEntry `yaml:"auth"`
		TLS  *tlsEntry  `yaml:"tls"`
	}
	authEntry struct {
		Username      text `yaml:"username"`
		Password      text `yaml:"password"`
		Auth          text `yaml:"auth"`
		IdentityToken text `yaml:"identity_token"`
	}
	tlsEntry struct {
		CAFile             text `yaml:"ca_file"`
		CertFile           text `yaml:"cert_file"`
		KeyFile            text `yaml:"key_file"`
		InsecureSkipVerify bool `yaml:"insecure_skip_verify"`
	}
)

// text is a scalar with the line that it stands in. A password of digits stays as it was written.
type text struct {
	value string
	line  int
}

// UnmarshalYAML accepts any scalar.
func (t *text) UnmarshalYAML(node *yaml.Node) error {
	if node.Kind != yaml.ScalarNode {
		return &yaml.TypeError{Errors: []string{fmt.Sprintf("line %d: a list or map stands where a single value is expected", node.Line)}}
	}
	t.value, t.line = node.Value, node.Line
	return nil
}

// parser collects what is wrong with a file.
type parser struct {
	path string
	errs []error
}

func (p *parser) fail(t text, format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%s:%d: %w", p.path, t.line, fmt.Errorf(format, args...)))
}

func parse(path string, data []byte) (*Config, error) {
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true)
	var doc document
	if err := decoder.Decode(&doc); err != nil && !errors.Is(err, io.EOF) {
		return nil, explain(path, err)
	}
	if err := decoder.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: there is a second YAML document; there must be only one", path)
	}

	p := &parser{path: path}
	c := &Config{mirrors: map[string][]endpoint{}, hosts: map[string]host{}}
	for _, key := range inOrder(doc.Mirrors) {
		name := registryName(key.value)
		if _, twice := c.mirrors[name]; twice {
			p.fail(key, "mirrors of %s are given twice under different names", name)
		}
		p.checkHost(key)
		c.mirrors[name] = p.mirror(key, doc.Mirrors[key])
	}
	for _, key := range inOrder(doc.Configs) {
		name := hostName(key.value)
		if _, twice := c.hosts[name]; twice {
			p.fail(key, "%s is given twice under different names", name)
		}
		p.checkHost(key)
		entry := doc.Configs[key]
		if key.value == wildcard && entry.Auth != nil {
			p.fail(key, "credentials must name the host that they are for, %q is possible for tls only", wildcard)
		}
		c.hosts[name] = host{auth: p.auth(key, entry.Auth), tls: p.tls(key, entry.TLS)}
	}
	if err := errors.Join(p.errs...); err != nil {
		return nil, err
	}
	return c, nil
}

func inOrder[V any](m map[text]V) []text {
	keys := make([]text, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b text) int { return a.line - b.line })
	return keys
}

// explain turns the YAML decoder's errors into file:line form.
func explain(path string, err error) error {
	var types *yaml.TypeError
	if !errors.As(err, &types) {
		return fmt.Errorf("%s: %w", path, err)
	}
	line := regexp.MustCompile(`^line (\d+): (.*)$`)
	field := regexp.MustCompile(`^field (.*) not found in type .*$`)
	wrong := regexp.MustCompile(`^cannot unmarshal !!\S+(?: .*)? into (.*)$`) // the value may be a secret
	var errs []error
	for _, message := range types.Errors {
		where := path
		if m := line.FindStringSubmatch(message); m != nil {
			where, message = path+":"+m[1], m[2]
		}
		message = field.ReplaceAllString(message, "unknown key $1; known are mirrors (endpoint), configs (auth, tls), "+
			"auth (username, password, auth, identity_token) and tls (ca_file, cert_file, key_file, insecure_skip_verify)")
		if m := wrong.FindStringSubmatch(message); m != nil {
			message = "wrong type of value; accepted: a map"
			switch {
			case m[1] == "bool":
				message = "wrong type of value; accepted: true or false"
			case strings.HasPrefix(m[1], "[]"):
				message = "wrong type of value; accepted: a list"
			}
		}
		errs = append(errs, fmt.Errorf("%s: %s", where, message))
	}
	return errors.Join(errs...)
}

// checkHost accepts "*" and host[:port]. The name becomes a directory.
func (p *parser) checkHost(key text) {
	if key.value == wildcard {
		return
	}
	if strings.Contains(key.value, "/") {
		p.fail(key, "%q: write the registry as host or host:port, without scheme and path", key.value)
		return
	}
	name := key.value
	if h, port, err := net.SplitHostPort(name); err == nil {
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
			p.fail(key, "%q: %q is not a port", key.value, port)
		}
		name = h
	} else {
		name = strings.TrimSuffix(strings.TrimPrefix(name, "["), "]")
	}
	if _, err := netip.ParseAddr(name); err != nil && len(validation.IsDNS1123Subdomain(name)) > 0 {
		p.fail(key, "%q is not a host name, an address, or one of these with a port", key.value)
	}
}

func (p *parser) mirror(key text, entry mirrorEntry) []endpoint {
	for _, pattern := range inOrder(entry.Rewrite) {
		p.fail(pattern, "rewrite is a feature of k3s's containerd and not possible here; if it only adds a prefix, give an endpoint with a path: https://HOST/v2/PREFIX")
	}
	var list []endpoint
	for _, given := range entry.Endpoint {
		e, err := parseEndpoint(given.value)
		if err != nil {
			p.fail(given, "endpoint of %q: %w", key.value, err) // without the endpoint: it may hold a password
			continue
		}
		if slices.ContainsFunc(list, func(other endpoint) bool { return other.url.String() == e.url.String() }) {
			p.fail(given, "endpoint %q of %q is given twice", given.value, key.value)
			continue
		}
		list = append(list, e)
	}
	return list
}

// parseEndpoint accepts a URL. Without a scheme it is https, or http for this machine on an unusual port; a path other
// than /v2 is taken for the root of the registry's API. Both are what k3s does.
func parseEndpoint(given string) (endpoint, error) {
	full := given
	if !strings.Contains(given, "://") {
		full = "https://" + given
	}
	u, err := url.Parse(full)
	if err != nil {
		return endpoint{}, errors.New("is not a URL")
	}
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return endpoint{}, errors.New("must begin with https:// or http://")
	case u.Hostname() == "":
		return endpoint{}, errors.New("has no host")
	case u.User != nil:
		return endpoint{}, errors.New("holds credentials; they belong into configs")
	case u.RawQuery != "" || u.Fragment != "" || u.ForceQuery:
		return endpoint{}, errors.New("has a query or fragment")
	}
	check := &parser{}
	if check.checkHost(text{value: u.Host}); len(check.errs) > 0 {
		return endpoint{}, errors.New("has an invalid host")
	}
	if full != given && u.Port() != "" && u.Port() != "443" && isLocal(u.Hostname()) {
		u.Scheme = "http"
	}
	u.Host = hostName(u.Host)
	switch path := strings.TrimRight(u.Path, "/"); path {
	case "", "/v2":
		u.Path, u.RawPath = "/v2", ""
		return endpoint{url: u}, nil
	default:
		u.Path, u.RawPath = path, ""
		return endpoint{url: u, override: true}, nil
	}
}

func isLocal(name string) bool {
	if name == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(name)
	return err == nil && a.IsLoopback()
}

func (p *parser) auth(key text, entry *authEntry) *auth {
	if entry == nil {
		return nil
	}
	a := &auth{entry.Username.value, entry.Password.value, entry.Auth.value, entry.IdentityToken.value}
	forms := 0
	for _, given := range []bool{a.Username != "" || a.Password != "", a.Auth != "", a.IdentityToken != ""} {
		if given {
			forms++
		}
	}
	switch {
	case forms != 1:
		p.fail(key, "auth of %q: give either username and password, or auth, or identity_token", key.value)
	case a.Auth != "":
		decoded, err := base64.StdEncoding.DecodeString(a.Auth)
		if user, password, ok := strings.Cut(string(decoded), ":"); err != nil || !ok || user == "" || password == "" {
			p.fail(entry.Auth, "auth of %q is not the base64 form of username:password", key.value)
		}
	case a.IdentityToken == "" && (a.Username == "" || a.Password == ""):
		p.fail(key, "auth of %q: username and password belong together", key.value)
	}
	return a
}

func (p *parser) tls(key text, entry *tlsEntry) *tlsSettings {
	if entry == nil {
		return nil
	}
	t := &tlsSettings{entry.CAFile.value, entry.CertFile.value, entry.KeyFile.value, entry.InsecureSkipVerify}
	for _, file := range []text{entry.CAFile, entry.CertFile, entry.KeyFile} {
		if file.value != "" && !filepath.IsAbs(file.value) {
			p.fail(file, "%q is a relative path; give an absolute one", file.value)
			return t
		}
	}
	if t.caFile != "" {
		pem, err := os.ReadFile(t.caFile)
		if err != nil {
			p.fail(entry.CAFile, "ca_file: %w", err)
		} else if !x509.NewCertPool().AppendCertsFromPEM(pem) {
			p.fail(entry.CAFile, "ca_file: %s holds no certificate in PEM form", t.caFile)
		}
	}
	if t.certFile == "" && t.keyFile == "" {
		return t
	}
	if t.certFile == "" || t.keyFile == "" {
		p.fail(key, "tls of %q: cert_file and key_file belong together", key.value)
	} else if _, err := tls.LoadX509KeyPair(t.certFile, t.keyFile); err != nil {
		p.fail(entry.CertFile, "cert_file and key_file: %w", err)
	}
	return t
}
