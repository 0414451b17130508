// SPDX-License-Identifier: Apache-2.0

package registries

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

func TestMissingFile(t *testing.T) {
	c, err := Load(filepath.Join(t.TempDir(), "registries.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Files()) != 0 || len(c.AuthTOML()) != 0 {
		t.Errorf("got %v, %s", c.Files(), c.AuthTOML())
	}
}

func TestRefused(t *testing.T) {
	notPEM := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(notPEM, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	mirror := func(endpoint string) string {
		return "mirrors:\n  docker.io:\n    endpoint:\n    - '" + endpoint + "'\n"
	}
	for _, test := range []struct {
		yaml string
		want []string // one problem a line
	}{
		{"mirrors: []", []string{"f:1: wrong type of value; accepted: a map"}},
		{"mirror: {}", []string{"f:1: unknown key mirror; known are mirrors"}},
		{"mirrors:\n  a:\n    endpoints: [b]\n", []string{"f:3: unknown key endpoints; known are mirrors (endpoint)"}},
		{"mirrors:\n  a:\n    endpoint: b\n", []string{"f:3: wrong type of value; accepted: a list"}},
		{"mirrors:\n  a:\n    endpoint:\n    - [b]\n", []string{"f:4: a list or map stands where a single value"}},
		{"mirrors:\n  a: {}\n  a: {}\n", []string{"f:3: mapping key \"a\" already defined at line 2"}},
		{"mirrors: {}\n---\nmirrors: {}\n", []string{"f: there is a second YAML document"}},
		{"mirrors: {", []string{"f: yaml: "}},
		{"mirrors:\n  docker.io: {}\n  index.docker.io: {}\n", []string{"f:3: mirrors of docker.io are given twice"}},
		{"mirrors:\n  https://a.test: {}\n", []string{`f:2: "https://a.test": write the registry as host or host:port`}},
		{"mirrors:\n  ..: {}\n", []string{`f:2: ".." is not a host name`}},
		{"mirrors:\n  a:99999: {}\n", []string{`"99999" is not a port`}},
		{"mirrors:\n  a:b:c: {}\n", []string{"is not a host name"}},
		{mirror("ftp://m.test"), []string{`f:4: endpoint of "docker.io": must begin with https:// or http://`}},
		{mirror("https://"), []string{"has no host"}},
		{mirror("https://u:p@m.test"), []string{"they belong into configs"}},
		{mirror("https://m.test?x"), []string{"has a query"}},
		{mirror("https://m test"), []string{"is not a URL"}},
		{mirror("https://m_test"), []string{"has an invalid host"}},
		{mirror("m.test'\n    - 'https://m.test/v2/"), []string{`f:5: endpoint "https://m.test/v2/" of "docker.io" is given twice`}},
		{"mirrors:\n  a:\n    endpoint:\n    - ''\n", []string{`f:4: endpoint of "a": has no host`}},
		{"mirrors:\n  a:\n    endpoint: [m.test]\n    rewrite:\n      '^x': y\n", []string{"f:5: rewrite is a feature of k3s's containerd"}},
		{"configs:\n  a: {auth: {}}\n", []string{"f:2: auth of \"a\": give either username and password, or auth, or identity_token"}},
		{"configs:\n  a: {auth: {username: u, password: p, auth: dTpw}}\n", []string{"give either"}},
		{"configs:\n  a: {auth: {username: u}}\n", []string{"username and password belong together"}},
		{"configs:\n  a: {auth: {auth: '%'}}\n", []string{"is not the base64 form"}},
		{"configs:\n  '*': {auth: {auth: dTpw}}\n", []string{"f:2: credentials must name the host"}},
		{"configs:\n  a: {tls: {insecure_skip_verify: maybe}}\n", []string{"f:2: wrong type of value; accepted: true or false"}},
		{"configs:\n  a: {tls: {ca_file: ca.pem}}\n", []string{`f:2: "ca.pem" is a relative path`}},
		{"configs:\n  a: {tls: {ca_file: /nonexistent/ca.pem}}\n", []string{"f:2: ca_file: open /nonexistent/ca.pem"}},
		{"configs:\n  a: {tls: {ca_file: " + notPEM + "}}\n", []string{"holds no certificate in PEM form"}},
		{"configs:\n  a: {tls: {cert_file: " + notPEM + "}}\n", []string{"cert_file and key_file belong together"}},
		{"configs:\n  a: {tls: {cert_file: " + notPEM + ", key_file: " + notPEM + "}}\n", []string{"f:2: cert_file and key_file: tls: failed to find any PEM data"}},
		{"mirrors:\n  ..: {}\n  a:\n    endpoint: ['ftp://x']\nconfigs:\n  a: {auth: {}}\n", []string{"f:2:", "f:4:", "f:6:"}},
	} {
		t.Run(strings.Join(test.want, " "), func(t *testing.T) {
			c, err := parse("f", []byte(test.yaml))
			if err == nil {
				t.Fatalf("accepted: %v", c.Files())
			}
			for _, part := range test.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error does not say %q:\n%v", part, err)
				}
			}
			if lines := strings.Split(err.Error(), "\n"); len(lines) > len(test.want) {
				t.Errorf("more lines than problems:\n%v", err)
			}
		})
	}
}

// Secrets do not get into errors, which are logged.
func TestErrorsDoNotTellSecrets(t *testing.T) {
	const secret = "hunter2"
	for _, yaml := range []string{
		"configs: {a: {auth: {password: " + secret + "}}}",
		"configs: {a: {auth: {auth: " + secret + "}}}",
		"configs: {a: {auth: {identity_token: " + secret + ", username: u}}}",
		"configs: {a: {auth: {password: [" + secret + "]}}}",
		"configs: {a: {auth: " + secret + "}}",
		"mirrors: {a: {endpoint: ['https://u:" + secret + "@m.test']}}",
	} {
		if _, err := parse("f", []byte(yaml)); err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", yaml, err)
		}
	}
}

// Whatever is accepted gives files that containerd can read, in directories directly below the one of the hosts.
func FuzzParse(f *testing.F) {
	for _, path := range []string{"testdata/mirrors.yaml", "testdata/empty.yaml"} {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("mirrors: {a: {endpoint: ['http://[::1]:5/é']}}\nconfigs: {a: {auth: {username: \"\\u0000\", password: \"\\\"'''\"}}}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parse("f", data)
		if err != nil {
			return
		}
		files := maps.Clone(c.Files())
		files["x/hosts.toml"] = c.AuthTOML()
		for name, contents := range files {
			if dir, file := filepath.Split(name); file != hostsFile || strings.Count(dir, "/") != 1 || strings.HasPrefix(dir, ".") {
				t.Errorf("file %q", name)
			}
			var document any
			if err := toml.Unmarshal(contents, &document); err != nil {
				var decode *toml.DecodeError
				if errors.As(err, &decode) {
					t.Errorf("%s: %s", name, decode.String())
				}
				t.Errorf("%s: %v\n%s", name, err, contents)
			}
		}
	})
}
