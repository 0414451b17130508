// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/tests/golden"
)

// TestHardeningFiles: the files that the API server's flags name. That it accepts them is tested in tests/hardening.
func TestHardeningFiles(t *testing.T) {
	c := testConfig(t)
	c.Hardening = Hardening{AuditLog: "/a", PodSecurity: config.PodSecurityBaseline, PodSecurityExempt: []string{"kube-system"}}
	var text strings.Builder
	for _, o := range []object{authenticationConfig(), c.admissionConfig(), auditPolicy()} {
		b, err := yaml.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		text.WriteString("---\n" + string(b))
	}
	golden.Compare(t, "testdata/hardening.yaml", text.String())
	c.RunDir = t.TempDir()
	c.Hardening.AuditLog = filepath.Join(t.TempDir(), "new", "audit.log")
	if err := c.writeHardening(); err != nil {
		t.Error(err)
	}
}

// TestHardeningFlags: what the operator sets is not contradicted by a file of Kedge's.
func TestHardeningFlags(t *testing.T) {
	for args, want := range map[string]string{
		"":                                    "authentication-config admission-control-config-file EventRateLimit",
		"oidc-issuer-url=https://x":           "admission-control-config-file EventRateLimit",
		"anonymous-auth=false":                "admission-control-config-file EventRateLimit",
		"--authentication-config=/mine":       "admission-control-config-file EventRateLimit",
		"admission-control-config-file=/mine": "authentication-config",
	} {
		c := testConfig(t)
		if args != "" {
			c.APIServerArgs = []string{args}
		}
		pairs := c.hardeningFlags()
		var got []string
		for _, name := range []string{"authentication-config", "admission-control-config-file"} {
			if slices.Contains(pairs, name) {
				got = append(got, name)
			}
		}
		if slices.ContainsFunc(pairs, func(s string) bool { return strings.Contains(s, "EventRateLimit") }) {
			got = append(got, "EventRateLimit")
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q: %v, want %s", args, got, want)
		}
	}
	c := testConfig(t)
	c.APIServerArgs = []string{"admission-control-config-file=/mine"}
	c.Hardening.PodSecurity = config.PodSecurityRestricted
	if err := CheckArgs(c); err == nil || !strings.Contains(err.Error(), "exclude each other") {
		t.Errorf("pod-security beside an own file: %v", err)
	}
}
