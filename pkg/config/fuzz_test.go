// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"strings"
	"testing"
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
