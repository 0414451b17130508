// SPDX-License-Identifier: Apache-2.0

package node

import (
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	kubeproxyconfig "k8s.io/kubernetes/pkg/proxy/apis/config"
	proxymetrics "k8s.io/kubernetes/pkg/proxy/metrics"
)

// TestWroteRules goes by the metric that kube-proxy sets when it has written rules for a family.
func TestWroteRules(t *testing.T) {
	v4, v6 := netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd42::/56")
	expect := func(want string, cidrs ...netip.Prefix) {
		t.Helper()
		got := ""
		if err := wroteRules(cidrs); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%v: got %q, want %q", cidrs, got, want)
		}
	}
	expect("its first rules for IPv4 are not written yet", v4) // kube-proxy has not even begun
	proxymetrics.RegisterMetrics(kubeproxyconfig.ProxyModeNFTables)
	expect("its first rules for IPv4 are not written yet", v4, v6)
	proxymetrics.SyncProxyRulesLastTimestamp.WithLabelValues(string(corev1.IPv4Protocol)).SetToCurrentTime()
	expect("", v4)
	expect("its first rules for IPv6 are not written yet", v4, v6)
	proxymetrics.SyncProxyRulesLastTimestamp.WithLabelValues(string(corev1.IPv6Protocol)).SetToCurrentTime()
	expect("", v4, v6)
}
