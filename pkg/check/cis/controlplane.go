// SPDX-License-Identifier: Apache-2.0

package cis

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apiserver/pkg/apis/apiserver"
	apiserverv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"sigs.k8s.io/yaml"

	"github.com/kedge-io/kedge/pkg/pki"
)

func checks() []check {
	return slices.Concat(controlPlaneFiles(), apiServer(), loops(), etcd(), users(), nodeFiles(), kubeletItems(), policies())
}

// flag is an item about a flag of the API server.
func flag(name string, look func(value string) Result) func(*machine) Result {
	return plane(func(m *machine) Result { return look(m.api[name]) })
}

func arg(component, flag string) string { return fmt.Sprintf("--%s-arg %s", component, flag) }

// is wants a flag of the API server to have a value.
func is(name, want string) func(*machine) Result {
	return flag(name, func(v string) Result {
		return when(v == want, name+"="+v, arg("kube-apiserver", name+"="+want))
	})
}

// set wants a flag of the API server to be set.
func set(name string) func(*machine) Result {
	return flag(name, func(v string) Result {
		return when(v != "" && v != "[]", name+"="+v, arg("kube-apiserver", name+"=…"))
	})
}

// plugin wants an admission plugin not to be disabled.
func plugin(name string) func(*machine) Result {
	return flag("disable-admission-plugins", func(v string) Result {
		return when(!contains(v, name), name+" is active", "take "+name+" out of disable-admission-plugins")
	})
}

func enabled(m *machine, plugin string) bool {
	return contains(m.api["enable-admission-plugins"], plugin) && !contains(m.api["disable-admission-plugins"], plugin)
}

func atLeast(name string, least int) func(*machine) Result {
	return plane(func(m *machine) Result {
		n, err := strconv.Atoi(m.api[name])
		if m.api["audit-log-path"] == "" {
			return fail("--audit-log FILE sets it", "no audit log is written")
		}
		return when(err == nil && n >= least, name+"="+m.api[name], arg("kube-apiserver", fmt.Sprintf("%s=%d", name, least)))
	})
}

func apiServer() []check {
	return []check{
		{"1.2.1", "requests without a user", plane(anonymous)},
		{"1.2.2", "no file with static tokens", flag("token-auth-file", func(v string) Result {
			return when(v == "", "token-auth-file="+v, "take it out")
		})},
		{"1.2.3", "external addresses of Services", plane(func(m *machine) Result {
			if enabled(m, "DenyServiceExternalIPs") {
				return pass("DenyServiceExternalIPs is active")
			}
			return manual(arg("kube-apiserver", "enable-admission-plugins=DenyServiceExternalIPs"), "who may write Services may set externalIPs; refuse them if nobody needs them")
		})},
		{"1.2.4", "client certificate for kubelets", set("kubelet-client-certificate")},
		{"1.2.5", "kubelets are verified", set("kubelet-certificate-authority")},
		{"1.2.6", "not everything is allowed", authorizer(func(v string) bool { return !contains(v, "AlwaysAllow") })},
		{"1.2.7", "nodes are limited to what is theirs", authorizer(func(v string) bool { return contains(v, "Node") })},
		{"1.2.8", "RBAC", authorizer(func(v string) bool { return contains(v, "RBAC") })},
		{"1.2.9", "rate of events", plane(func(m *machine) Result {
			return when(enabled(m, "EventRateLimit"), "EventRateLimit: "+m.api["enable-admission-plugins"], "your admission-control-config-file needs a section EventRateLimit, and enable-admission-plugins that name")
		})},
		{"1.2.10", "AlwaysAdmit is not used", plane(func(m *machine) Result {
			return when(!contains(m.api["enable-admission-plugins"], "AlwaysAdmit"), m.api["enable-admission-plugins"], "take it out")
		})},
		{"1.2.11", "images are pulled for every pod", plane(func(m *machine) Result {
			if enabled(m, "AlwaysPullImages") {
				return pass("AlwaysPullImages is active")
			}
			return manual(arg("kube-apiserver", "enable-admission-plugins=AlwaysPullImages"), "pods may use images that others pulled with credentials; "+
				"with AlwaysPullImages nothing starts without a registry, which air-gapped clusters cannot have")
		})},
		{"1.2.12", "service accounts are checked", plugin("ServiceAccount")},
		{"1.2.13", "namespaces that end take nothing new", plugin("NamespaceLifecycle")},
		{"1.2.14", "kubelets change their own objects only", plane(func(m *machine) Result {
			return when(enabled(m, "NodeRestriction"), m.api["enable-admission-plugins"], arg("kube-apiserver", "enable-admission-plugins=NodeRestriction"))
		})},
		{"1.2.15", "no profiling", is("profiling", "false")},
		{"1.2.16", "audit log", flag("audit-log-path", func(v string) Result {
			return when(v != "", "audit-log-path="+v, "--audit-log /var/log/kedge/audit.log")
		})},
		{"1.2.17", "days that the audit log is kept", atLeast("audit-log-maxage", 30)},
		{"1.2.18", "files of the audit log", atLeast("audit-log-maxbackup", 10)},
		{"1.2.19", "size of the audit log", atLeast("audit-log-maxsize", 100)},
		{"1.2.20", "time limit of requests", flag("request-timeout", func(v string) Result {
			return when(v != "" && v != "0s", "request-timeout="+v, arg("kube-apiserver", "request-timeout=1m0s"))
		})},
		{"1.2.21", "tokens of deleted service accounts", is("service-account-lookup", "true")},
		{"1.2.22", "key of service accounts", set("service-account-key-file")},
		{"1.2.23", "client certificate for etcd", etcdTLS("etcd-certfile")},
		{"1.2.24", "serving certificate", set("tls-cert-file")},
		{"1.2.25", "CA for clients", set("client-ca-file")},
		{"1.2.26", "etcd is verified", etcdTLS("etcd-cafile")},
		{"1.2.27", "encryption at rest is configured", set("encryption-provider-config")},
		{"1.2.28", "encryption at rest is on", plane(encrypted)},
		{"1.2.29", "ciphers", flag("tls-cipher-suites", func(v string) Result { return ciphers(strings.Split(strings.Trim(v, "[]"), ","), "kube-apiserver") })},
		{"1.2.30", "tokens of pods end in time", is("service-account-extend-token-expiration", "false")},
	}
}

func authorizer(ok func(string) bool) func(*machine) Result {
	return flag("authorization-mode", func(v string) Result {
		return when(ok(v), "authorization-mode="+v, arg("kube-apiserver", "authorization-mode=Node,RBAC"))
	})
}

// anonymous: health alone, and what a machine with a join token asks.
func anonymous(m *machine) Result {
	file := m.api["authentication-config"]
	if file == "" {
		return when(m.api["anonymous-auth"] == "false", "anonymous-auth="+m.api["anonymous-auth"], "take your own authentication flags into a file for authentication-config, with conditions for anonymous requests")
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return fail("", "%v", err)
	}
	var c apiserverv1.AuthenticationConfiguration
	if err := yaml.Unmarshal(text, &c); err != nil {
		return fail("mend the file", "%s: %v", file, err)
	}
	if c.Anonymous == nil || !c.Anonymous.Enabled {
		return when(c.Anonymous != nil || m.api["anonymous-auth"] == "false", "anonymous requests: "+file, "anonymous: {enabled: false} in "+file)
	}
	var paths []string
	for _, condition := range c.Anonymous.Conditions {
		paths = append(paths, condition.Path)
	}
	return when(len(paths) > 0, "only for "+strings.Join(paths, ", "), "conditions for anonymous requests in "+file)
}

func etcdTLS(name string) func(*machine) Result {
	return plane(func(m *machine) Result {
		if servers := strings.Trim(m.api["etcd-servers"], "[]"); strings.HasPrefix(servers, "unix://") {
			return none("no network between them: %s, root's alone", servers)
		}
		return set(name)(m)
	})
}

// encrypted looks at the provider that writes Secrets.
func encrypted(m *machine) Result {
	text, err := os.ReadFile(m.api["encryption-provider-config"])
	if err != nil {
		return fail("", "%v", err)
	}
	var c apiserverv1.EncryptionConfiguration
	if err := yaml.Unmarshal(text, &c); err != nil || len(c.Resources) == 0 || len(c.Resources[0].Providers) == 0 {
		return fail("mend the file", "%s cannot be understood: %v", m.api["encryption-provider-config"], err)
	}
	first := c.Resources[0].Providers[0]
	return when(first.Identity == nil && first.AESGCM == nil, "Secrets are encrypted, with "+provider(first), "kedge secrets-encrypt enable")
}

func provider(p apiserverv1.ProviderConfiguration) string {
	switch {
	case p.Secretbox != nil:
		return "secretbox"
	case p.KMS != nil:
		return "kms"
	case p.AESCBC != nil:
		return "aescbc"
	case p.AESGCM != nil:
		return "aesgcm"
	}
	return "nothing"
}

func ciphers(have []string, component string) Result {
	strong := append(pki.StrongCiphers(), "TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256",
		"TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305", "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305")
	var weak []string
	for _, c := range have {
		if c != "" && !slices.Contains(strong, c) {
			weak = append(weak, c)
		}
	}
	switch {
	case len(have) == 0 || have[0] == "":
		return fail(arg(component, "tls-cipher-suites=…"), "the program's defaults")
	case len(weak) > 0:
		return fail(arg(component, "tls-cipher-suites=…"), "weak: %s", strings.Join(weak, ", "))
	}
	return pass("%d suites, all with forward secrecy and authenticated encryption", len(have))
}

// loops are the items of 1.3 and 1.4.
func loops() []check {
	manager := func(name string, look func(string) Result) func(*machine) Result {
		return plane(func(m *machine) Result { return look(m.kcm[name]) })
	}
	silent := func(flags func(*machine) map[string]string) func(*machine) Result {
		return plane(func(m *machine) Result {
			f := flags(m)
			if f["secure-port"] == "0" {
				return pass("it does not listen at all")
			}
			return when(f["bind-address"] == "127.0.0.1", "bind-address="+f["bind-address"], "bind-address=127.0.0.1")
		})
	}
	return []check{
		{"1.3.1", "pods that have ended", manager("terminated-pod-gc-threshold", func(v string) Result {
			n, err := strconv.Atoi(v)
			return when(err == nil && n > 0, "terminated-pod-gc-threshold="+v, arg("kube-controller-manager", "terminated-pod-gc-threshold=1000"))
		})},
		{"1.3.2", "no profiling", manager("profiling", func(v string) Result {
			return when(v == "false", "profiling="+v, arg("kube-controller-manager", "profiling=false"))
		})},
		{"1.3.3", "an identity for each controller", manager("use-service-account-credentials", func(v string) Result {
			return when(v == "true", "use-service-account-credentials="+v+" (one identity for the process, see docs/decisions/control-plane-identity.md)",
				arg("kube-controller-manager", "use-service-account-credentials=true"))
		})},
		{"1.3.4", "key for tokens", manager("service-account-private-key-file", func(v string) Result { return when(v != "", v, "") })},
		{"1.3.5", "CA for pods", manager("root-ca-file", func(v string) Result { return when(v != "", v, "") })},
		{"1.3.6", "serving certificates of kubelets are rotated", manager("feature-gates", func(v string) Result {
			return when(!strings.Contains(v, "RotateKubeletServerCertificate=false"), "RotateKubeletServerCertificate is on", "take the feature gate out")
		})},
		{"1.3.7", "it listens on loopback at the most", silent(func(m *machine) map[string]string { return m.kcm })},
		{"1.4.1", "no profiling", plane(func(m *machine) Result {
			return when(m.sched["profiling"] == "false", "profiling="+m.sched["profiling"], arg("kube-scheduler", "profiling=false"))
		})},
		{"1.4.2", "it listens on loopback at the most", silent(func(m *machine) map[string]string { return m.sched })},
	}
}

// etcd are the items of 2.
func etcd() []check {
	client := func(what string) func(*machine) Result {
		return member(func(m *machine) Result {
			if !m.etcd.ClientListen.IsValid() {
				return none("clients come through the socket %s, root's alone", m.etcd.Socket)
			}
			return pass("%s on %s, for servers without a member", what, m.etcd.ClientListen)
		})
	}
	given := func(flag, good string) func(*machine) Result {
		return member(func(m *machine) Result {
			for _, a := range m.etcd.Args {
				if name, value, _ := strings.Cut(strings.TrimLeft(a, "-"), "="); name == flag && value != "false" {
					return fail("take --etcd-arg "+flag+" out", "%s", a)
				}
			}
			return pass("%s", good)
		})
	}
	peers := member(func(m *machine) Result {
		return when(m.etcd.PeerCert != "" && m.etcd.PeerKey != "", "TLS with "+m.etcd.PeerCert, "")
	})
	return []check{
		{"2.1", "TLS for clients", client("TLS")},
		{"2.2", "clients show a certificate", client("client certificates")},
		{"2.3", "no self-made certificates for clients", given("auto-tls", "auto-tls is not set")},
		{"2.4", "TLS between members", peers},
		{"2.5", "members show a certificate", member(func(*machine) Result { return pass("always") })},
		{"2.6", "no self-made certificates between members", given("peer-auto-tls", "peer-auto-tls is not set")},
		{"2.7", "a CA of its own", member(func(m *machine) Result {
			if m.plane == nil {
				return pass("%s", m.etcd.PeerCA)
			}
			return when(m.etcd.PeerCA != m.plane.Files.ClientCA && m.etcd.PeerCA != m.plane.Files.ServerCA, m.etcd.PeerCA, "")
		})},
	}
}

// users are the items of 3.
func users() []check {
	external := func(m *machine) bool {
		if m.api["oidc-issuer-url"] != "" || m.api["authentication-token-webhook-config-file"] != "" {
			return true
		}
		text, err := os.ReadFile(m.api["authentication-config"])
		var c apiserver.AuthenticationConfiguration
		return err == nil && yaml.Unmarshal(text, &c) == nil && len(c.JWT) > 0
	}
	people := func(what string) func(*machine) Result {
		return plane(func(m *machine) Result {
			if external(m) {
				return manual("", "users can come from an identity provider; %s", what)
			}
			return manual(arg("kube-apiserver", "oidc-issuer-url=…"), "%s; with more than one administrator use an identity provider (OIDC)", what)
		})
	}
	policy := plane(func(m *machine) Result {
		if m.api["audit-log-path"] == "" && m.api["audit-webhook-config-file"] == "" {
			return fail("--audit-log /var/log/kedge/audit.log", "no audit log is written")
		}
		if m.plane.Hardening.AuditPolicy == "" && m.plane.Hardening.AuditLog != "" {
			return pass("Kedge's own policy: all changes, all access to Secrets, without contents (%s)", m.api["audit-policy-file"])
		}
		return manual("compare it with what you have to prove", "the policy is yours: %s", m.api["audit-policy-file"])
	})
	return []check{
		{"3.1.1", "client certificates are not for people", people("the administrator's kubeconfig holds a certificate that cannot be withdrawn: for emergencies")},
		{"3.1.2", "service accounts are not for people", people("see that nobody uses a service account's token as their own")},
		{"3.1.3", "bootstrap tokens are not for people", people("join tokens let in machines and give no other access; kedge token list shows them")},
		{"3.2.1", "audit policy", policy},
		{"3.2.2", "what the audit policy covers", policy},
	}
}
