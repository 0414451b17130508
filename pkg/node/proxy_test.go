// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/json"
	"net/netip"
	"testing"

	"k8s.io/kubernetes/pkg/proxy/healthcheck"
)

// What kube-proxy answers at /livez, before and after its first rules.
func TestWroteRules(t *testing.T) {
	v4, v6 := netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd42::/56")
	const healthyV4 = `{"lastUpdated":"2026-11-28T08:00:00Z","currentTime":"2026-11-28T08:00:00Z","healthy":true,"status":{"IPv4":{"lastUpdated":"2026-11-28T08:00:00Z","healthy":true}}}`
	for _, test := range []struct {
		name, answer string
		cidrs        []netip.Prefix
		want         string
	}{
		{"nothing yet", `{"lastUpdated":"0001-01-01T00:00:00Z","currentTime":"2026-11-28T08:00:00Z","healthy":true}`, []netip.Prefix{v4}, "its first rules for IPv4 are not written yet"},
		{"one family", healthyV4, []netip.Prefix{v4}, ""},
		{"one of two families", healthyV4, []netip.Prefix{v4, v6}, "its first rules for IPv6 are not written yet"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var health healthcheck.ProxyHealth
			if err := json.Unmarshal([]byte(test.answer), &health); err != nil {
				t.Fatal(err)
			}
			got := ""
			if err := wroteRules(health, test.cidrs); err != nil {
				got = err.Error()
			}
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}
