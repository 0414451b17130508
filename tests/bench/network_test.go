// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseSyncs(t *testing.T) {
	const text = `# TYPE kubeproxy_sync_proxy_rules_duration_seconds histogram
kubeproxy_sync_proxy_rules_duration_seconds_bucket{ip_family="IPv4",le="+Inf"} 3
kubeproxy_sync_proxy_rules_duration_seconds_sum{ip_family="IPv4"} 0.75
kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"} 3
kubeproxy_sync_proxy_rules_duration_seconds_sum{ip_family="IPv6"} 9
kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv6"} 1
`
	got, err := parseSyncs(text, "sync_proxy_rules")
	if want := (histogram{sum: 0.75, count: 3}); err != nil || got != want {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	if _, err := parseSyncs(text, "sync_full_proxy_rules"); err == nil {
		t.Error("no error about what is not there")
	}
}

func TestParseBenchmark(t *testing.T) {
	tests := []struct {
		out  string
		want map[string]float64
	}{
		{"goos: linux\nBenchmarkEnforce-2 \t       1\t2512345678 ns/op\t       125.0 cpu-ms/all\t        2500 ms/all\nPASS\n",
			map[string]float64{"ns/op": 2512345678, "cpu-ms/all": 125, "ms/all": 2500}},
		{"PASS\n", nil},
		{"BenchmarkEnforce-2 1 x ns/op\n", nil},
	}
	for _, tt := range tests {
		got, err := parseBenchmark(tt.out)
		if (err != nil) != (tt.want == nil) {
			t.Errorf("%q: %v", tt.out, err)
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%q (-want +got):\n%s", tt.out, d)
		}
	}
}

// TestFigures: each has a name of its own, as values are looked up by it.
func TestFigures(t *testing.T) {
	names, texts := map[string]bool{}, map[string]bool{}
	for _, f := range figures() {
		if names[f.name] || texts[f.text] {
			t.Errorf("twice: %+v", f)
		}
		names[f.name], texts[f.text] = true, true
	}
}
