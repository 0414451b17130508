// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	bootstrapapi "k8s.io/cluster-bootstrap/token/api"
	"sigs.k8s.io/yaml"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/pki"
)

// Hardening is what an operator may choose about the safety of the API; zero values are safe and quiet.
type Hardening struct {
	AuditLog          string             `json:"auditLog,omitempty"`    // path; empty: none
	AuditPolicy       string             `json:"auditPolicy,omitempty"` // path; empty: Kedge's own
	PodSecurity       config.PodSecurity `json:"podSecurity,omitempty"`
	PodSecurityExempt []string           `json:"podSecurityExempt,omitempty"`
}

// Limits of the audit log: what the CIS benchmark asks for.
const (
	auditDays  = "30"
	auditFiles = "10"
	auditSize  = "100" // MB of each
)

// Limits of the rate of events that one API server takes. A storm of them, from a pod that fails all the time or from malice, is not to keep
// the datastore from its work; ordinary clusters stay far below.
const (
	eventQPS   = 500
	eventBurst = 5000
)

// gives says whether the operator gives a flag of the API server that begins so.
func (c Config) gives(prefix string) bool {
	return slices.ContainsFunc(c.APIServerArgs, func(arg string) bool { return strings.HasPrefix(strings.TrimLeft(arg, "-"), prefix) })
}

func (c Config) authenticationFile() string { return filepath.Join(c.RunDir, "authentication.yaml") }
func (c Config) admissionFile() string      { return filepath.Join(c.RunDir, "admission.yaml") }
func (c Config) auditPolicyFile() string {
	if c.Hardening.AuditPolicy != "" {
		return c.Hardening.AuditPolicy
	}
	return filepath.Join(c.RunDir, "audit-policy.yaml")
}

// ownsAuthentication: an operator's own settings of the same thing and Kedge's file exclude each other.
func (c Config) ownsAuthentication() bool {
	return !c.gives("authentication-config=") && !c.gives("anonymous-auth") && !c.gives("oidc-")
}

func (c Config) ownsAdmission() bool { return !c.gives("admission-control-config-file=") }

// hardeningFlags are name-value pairs of the API server.
func (c Config) hardeningFlags() []string {
	pairs := []string{
		"tls-cipher-suites", strings.Join(pki.StrongCiphers(), ","),
		// Tokens of pods end when they say so. Clients that never read them again are those of 2020 and before.
		"service-account-extend-token-expiration", "false",
	}
	admission := "NodeRestriction"
	if c.ownsAdmission() {
		admission += ",EventRateLimit"
		pairs = append(pairs, "admission-control-config-file", c.admissionFile())
	}
	pairs = append(pairs, "enable-admission-plugins", admission)
	if c.ownsAuthentication() {
		pairs = append(pairs, "authentication-config", c.authenticationFile())
	}
	if c.Hardening.AuditLog != "" {
		pairs = append(pairs, "audit-log-path", c.Hardening.AuditLog, "audit-policy-file", c.auditPolicyFile(),
			"audit-log-maxage", auditDays, "audit-log-maxbackup", auditFiles, "audit-log-maxsize", auditSize)
	}
	return pairs
}

// checkHardening refuses what would be left out silently.
func (c Config) checkHardening() error {
	if level := c.Hardening.PodSecurity; level != "" && level != config.PodSecurityPrivileged && !c.ownsAdmission() {
		return fmt.Errorf("pod-security=%s and kube-apiserver-arg admission-control-config-file exclude each other: put the plugin PodSecurity into that file", level)
	}
	return nil
}

// object is YAML in the making.
type object = map[string]any

// anonymousPaths are what may be asked without saying who asks: health, as load balancers do, and what a machine with a join token needs
// to find out whether this is the cluster of its token; and where a node whose certificate has expired proves itself by its key.
func anonymousPaths() []string {
	return []string{"/livez", "/readyz", "/healthz", "/version", join.PathRenew,
		"/api/v1/namespaces/" + metav1.NamespacePublic + "/configmaps/" + bootstrapapi.ConfigMapClusterInfo}
}

func authenticationConfig() object {
	var conditions []object
	for _, path := range anonymousPaths() {
		conditions = append(conditions, object{"path": path})
	}
	return object{"apiVersion": "apiserver.config.k8s.io/v1", "kind": "AuthenticationConfiguration",
		"anonymous": object{"enabled": true, "conditions": conditions}}
}

func (c Config) admissionConfig() object {
	plugins := []object{{"name": "EventRateLimit", "configuration": object{
		"apiVersion": "eventratelimit.admission.k8s.io/v1alpha1", "kind": "Configuration",
		"limits": []object{{"type": "Server", "qps": eventQPS, "burst": eventBurst}},
	}}}
	if level := c.Hardening.PodSecurity; level != "" && level != config.PodSecurityPrivileged {
		plugins = append(plugins, object{"name": "PodSecurity", "configuration": object{
			"apiVersion": "pod-security.admission.config.k8s.io/v1", "kind": "PodSecurityConfiguration",
			"defaults":   object{"enforce": level, "enforce-version": "latest", "audit": level, "audit-version": "latest", "warn": level, "warn-version": "latest"},
			"exemptions": object{"namespaces": c.Hardening.PodSecurityExempt},
		}})
	}
	return object{"apiVersion": "apiserver.config.k8s.io/v1", "kind": "AdmissionConfiguration", "plugins": plugins}
}

// auditPolicy is Kedge's own: every change, and every access to Secrets, who and when but not what is in it; nothing of the cluster's
// own ceaseless reading and of its leases.
func auditPolicy() object {
	return object{"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": []string{"RequestReceived"}, "rules": []object{
		{"level": "None", "nonResourceURLs": []string{"/livez*", "/readyz*", "/healthz*", "/version", "/openapi/*", "/metrics"}},
		{"level": "None", "resources": []object{{"group": "coordination.k8s.io", "resources": []string{"leases"}}, {"group": "", "resources": []string{"events", "nodes/status"}},
			{"group": "events.k8s.io", "resources": []string{"events"}}}},
		{"level": "None", "users": []string{"system:kedge:controller", "system:apiserver"}, "verbs": []string{"get", "list", "watch"}},
		{"level": "None", "userGroups": []string{"system:nodes"}, "verbs": []string{"get", "list", "watch"}},
		// Contents of these are never written, whatever the rules below become.
		{"level": "Metadata", "resources": []object{{"group": "", "resources": []string{"secrets", "configmaps", "serviceaccounts/token"}},
			{"group": "authentication.k8s.io", "resources": []string{"tokenreviews"}}}},
		{"level": "Metadata", "verbs": []string{"create", "update", "patch", "delete", "deletecollection", "connect"}},
		{"level": "Metadata", "resources": []object{{"group": "", "resources": []string{"pods/exec", "pods/attach", "pods/portforward", "pods/proxy", "services/proxy", "nodes/proxy"}}}},
		{"level": "Metadata"},
	}}
}

// writeHardening writes the files that the flags name.
func (c Config) writeHardening() error {
	files := map[string]object{c.admissionFile(): c.admissionConfig(), c.authenticationFile(): authenticationConfig()}
	if c.Hardening.AuditLog != "" {
		if err := os.MkdirAll(filepath.Dir(c.Hardening.AuditLog), 0o700); err != nil {
			return fmt.Errorf("audit-log: %w", err)
		}
		if c.Hardening.AuditPolicy == "" {
			files[c.auditPolicyFile()] = auditPolicy()
		}
	}
	for path, content := range files {
		text, err := yaml.Marshal(content)
		if err == nil {
			err = os.WriteFile(path, text, 0o600)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Flags are the effective values of a component's flags, by name.
type Flags map[string]string

// EffectiveFlags gives the values that the components of a process with this configuration run with, defaults included.
func EffectiveFlags(cfg Config) (apiserver, controllerManager, scheduler Flags, err error) {
	p, err := newPlane(cfg)
	if err != nil {
		return nil, nil, nil, err
	}
	return valuesOf(p.apiserver.Flags()), valuesOf(p.controllerManagerFlagSets()), valuesOf(*p.scheduler.Flags), nil
}
