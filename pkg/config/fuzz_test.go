// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"net/url"
	"strconv"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/pkg/join"
)

// A configuration file is either accepted or refused with the file's name in every line of the error; what is accepted
// is accepted a second time with the same result.
func FuzzFile(f *testing.F) {
	for _, text := range []string{
		"node-name: a\nnode-ip: [192.0.2.7, '2001:db8::7']\ntls-san+: a,b\n",
		"kubelet-arg:\n- max-pods=200\n- --v=2\nwrite-kubeconfig-mode: 0644\n",
		"cluster-cidr: 10.42.0.0/16\nservice-node-port-range: 1-2\n--- \n",
		"a: &a [*a]\n", "<<: {a: b}\n", "? [a]\n: b\n", "\xff", "node-label: !!binary YT1i",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		read := func() (*Config, error) {
			values := fileValues{}
			errs := []error{values.parse("FILE", data)}
			s := &Config{}
			for _, o := range options() {
				if given := values[o.name]; len(given) > 0 {
					errs = append(errs, o.set(s, given))
				}
			}
			return s, errors.Join(errs...)
		}
		s, err := read()
		if err != nil {
			if !strings.HasPrefix(err.Error(), "FILE:") {
				t.Errorf("error without its place: %v", err)
			}
			return
		}
		m, _ := testMachine()
		_ = s.complete(m, map[string]string{"node-ip": "default of node-ip"})
		_ = s.validate(m, map[string]string{})
	})
}

// A list in an environment variable comes apart at its commas and nowhere else.
func FuzzEnvironmentList(f *testing.F) {
	for _, text := range []string{"a,b", `a\,b,c`, `\`, `,`, `\\,`, " a , b "} {
		f.Add(text)
	}
	o := componentArgs("kubelet", func(s *Config) *Args { return &s.KubeletArgs })
	f.Fuzz(func(t *testing.T, text string) {
		values := o.envValues(text)
		if want := strings.Count(text, ",") - strings.Count(text, `\,`) + 1; len(values) != want {
			t.Errorf("%q: %d values, want %d", text, len(values), want)
		}
		for _, v := range values {
			if v.text != strings.TrimSpace(v.text) || v.source != "KEDGE_KUBELET_ARG" {
				t.Errorf("%q: %+v", text, v)
			}
		}
	})
}

// What is taken for the address of a server is one for package join, too, and has one form.
func FuzzServerURL(f *testing.F) {
	for _, text := range []string{
		"192.0.2.1", "https://a.example", "A.example:443", "https://[2001:db8::1]:6443/", "[fe80::1%25eth0]:6443", "h.", "h:", "h:06443", "h:0", "0.0.0.0",
		"a_b", "https://u@h", "https://h/x", "https://h?", "https://h#", "http://h", "2001:db8::1", "[::ffff:192.0.2.1]:1", " h", "h:٣",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for name, parse := range map[string]func(string) (string, error){"serverURL": serverURL, "endpointURL": endpointURL} {
			got, err := parse(text)
			if err != nil {
				if got != "" || !strings.Contains(err.Error(), strconv.Quote(text)) {
					t.Errorf("%s: %q: got %q, %v", name, text, got, err)
				}
				continue
			}
			if again, err := parse(got); err != nil || again != got {
				t.Errorf("%s: %q becomes %q, and that %q (%v)", name, text, got, again, err)
			}
			u, err := url.Parse(got)
			if err != nil || u.Scheme != "https" || u.Port() == "" || got != "https://"+u.Host {
				t.Errorf("%s: %q becomes %q (%v)", name, text, got, err)
			}
			if forJoin, err := join.ParseServer(got); err != nil || forJoin != got {
				t.Errorf("%s: %q becomes %q, and for package join %q (%v)", name, text, got, forJoin, err)
			}
		}
	})
}

// A duration is not negative, and understood in the form in which it is printed.
func FuzzDuration(f *testing.F) {
	for _, text := range []string{"0", "0s", "90s", "1h30m", "-1s", "5", "", "1e3s", "2562047h47m16.854775807s", "1µs"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		d, err := duration(text)
		if err != nil {
			if d != 0 || !strings.Contains(err.Error(), "is not a duration") {
				t.Errorf("%q: %v, %v", text, d, err)
			}
			return
		}
		if again, err := duration(d.String()); d < 0 || err != nil || again != d {
			t.Errorf("%q is %v, and that %v (%v)", text, d, again, err)
		}
	})
}
