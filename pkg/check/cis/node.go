// SPDX-License-Identifier: Apache-2.0

package cis

import (
	"fmt"
	"strings"

	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
)

// kubeletItems are the items of 4.2 and 4.3.
func kubeletItems() []check {
	config := func(look func(*kubeletconfig.KubeletConfiguration) Result) func(*machine) Result {
		return kubelet(func(m *machine) Result { return look(m.settings.Kubelet) })
	}
	return []check{
		{"4.2.1", "no requests without a user", config(func(c *kubeletconfig.KubeletConfiguration) Result {
			return when(!c.Authentication.Anonymous.Enabled, fmt.Sprintf("anonymous: %t", c.Authentication.Anonymous.Enabled), arg("kubelet", "anonymous-auth=false"))
		})},
		{"4.2.2", "not everything is allowed", config(func(c *kubeletconfig.KubeletConfiguration) Result {
			return when(c.Authorization.Mode == kubeletconfig.KubeletAuthorizationModeWebhook, "authorization: "+string(c.Authorization.Mode), arg("kubelet", "authorization-mode=Webhook"))
		})},
		{"4.2.3", "CA for clients", config(func(c *kubeletconfig.KubeletConfiguration) Result {
			return when(c.Authentication.X509.ClientCAFile != "", c.Authentication.X509.ClientCAFile, arg("kubelet", "client-ca-file=…"))
		})},
		{"4.2.4", "no read-only port", config(func(c *kubeletconfig.KubeletConfiguration) Result {
			return when(c.ReadOnlyPort == 0, fmt.Sprintf("readOnlyPort: %d", c.ReadOnlyPort), arg("kubelet", "read-only-port=0"))
		})},
		{"4.2.5", "idle streams end", config(func(c *kubeletconfig.KubeletConfiguration) Result {
			return when(c.StreamingConnectionIdleTimeout.Duration > 0, c.StreamingConnectionIdleTimeout.Duration.String(), arg("kubelet", "streaming-connection-idle-timeout=4h"))
		})},
		{"4.2.6", "chains of iptables", config(func(c *kubeletconfig.KubeletConfiguration) Result {
			return when(c.MakeIPTablesUtilChains, fmt.Sprintf("makeIPTablesUtilChains: %t", c.MakeIPTablesUtilChains), arg("kubelet", "make-iptables-util-chains=true"))
		})},
		{"4.2.7", "the node's name", kubelet(func(m *machine) Result {
			return manual("", "the name %s comes from --node-name or the host name; certificates are issued for it after the approver has compared it with the node", m.settings.Flags.HostnameOverride)
		})},
		{"4.2.8", "events are recorded", config(func(c *kubeletconfig.KubeletConfiguration) Result {
			return when(c.EventRecordQPS >= 0, fmt.Sprintf("eventRecordQPS: %d", c.EventRecordQPS), arg("kubelet", "event-qps=50"))
		})},
		{"4.2.9", "serving certificate", config(func(c *kubeletconfig.KubeletConfiguration) Result {
			if c.ServerTLSBootstrap {
				return pass("from the cluster (serverTLSBootstrap)")
			}
			return when(c.TLSCertFile != "" && c.TLSPrivateKeyFile != "", c.TLSCertFile, arg("kubelet", "tls-cert-file=…"))
		})},
		{"4.2.10", "its client certificate is renewed", config(func(c *kubeletconfig.KubeletConfiguration) Result {
			if c.RotateCertificates {
				return pass("rotateCertificates: true")
			}
			return pass("on a server Kedge renews it, at two thirds of its life")
		})},
		{"4.2.11", "its serving certificate is renewed", config(func(c *kubeletconfig.KubeletConfiguration) Result {
			on, given := c.FeatureGates["RotateKubeletServerCertificate"]
			return when(on || !given, "RotateKubeletServerCertificate is on", "take the feature gate out")
		})},
		{"4.2.12", "ciphers", config(func(c *kubeletconfig.KubeletConfiguration) Result { return ciphers(c.TLSCipherSuites, "kubelet") })},
		{"4.2.13", "limit of processes in a pod", config(func(c *kubeletconfig.KubeletConfiguration) Result {
			return when(c.PodPidsLimit > 0, fmt.Sprintf("podPidsLimit: %d", c.PodPidsLimit), arg("kubelet", "pod-max-pids=4096"))
		})},
		{"4.2.14", "seccomp by default", config(func(c *kubeletconfig.KubeletConfiguration) Result {
			return when(c.SeccompDefault, fmt.Sprintf("seccompDefault: %t", c.SeccompDefault), arg("kubelet", "seccomp-default=true"))
		})},
		{"4.3.1", "metrics on loopback", kubelet(func(m *machine) Result {
			a := m.settings.ProxyMetrics
			if m.node.ProxyMode == "" {
				return none("no kube-proxy on this machine")
			}
			ok := a == "" || strings.HasPrefix(a, "127.") || strings.HasPrefix(a, "[::1]") || strings.HasPrefix(a, "::1")
			if a == "" {
				a = "127.0.0.1:10249, the default"
			}
			return when(ok, a, arg("kube-proxy", "metrics-bind-address=127.0.0.1:10249"))
		})},
	}
}
