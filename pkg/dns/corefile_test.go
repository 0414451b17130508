// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"bytes"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/kedge-io/kedge/tests/golden"
	"github.com/kedge-io/kedge/tests/testlog"
)

// upstreamDirectives is CoreDNS's own order, before registerDirectives replaces it.
var upstreamDirectives = slices.Clone(dnsserver.Directives)

func testConfig(dir string) Config {
	cfg, err := Config{
		NodeName: "node-1", ClusterDomain: "cluster.local", Addr: testDNSAddr, Dir: dir,
		ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")},
	}.withDefaults()
	if err != nil {
		panic(err)
	}
	return cfg
}

// checkCorefile assembles a Corefile and lets CoreDNS check it, without opening anything.
func checkCorefile(t *testing.T, cfg Config, upstreams []string, custom customConfig) []byte {
	t.Helper()
	if err := registerDirectives(); err != nil {
		t.Fatal(err)
	}
	text, err := corefile(cfg, upstreams, custom)
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(cfg, testlog.New(t))
	if err != nil {
		t.Fatal(err)
	}
	blocks, err := caddyfile.Parse("Corefile", bytes.NewReader(text), directives())
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	a := &attempt{server: s, dir: custom.root(cfg.Dir)}
	for _, b := range blocks {
		a.blocks = append(a.blocks, b.Keys)
	}
	attempts.Store(cfg.listen(), a)
	defer attempts.Delete(cfg.listen())
	// The addresses are not this machine's; do as if they were open already.
	s.engine.listeners = map[listener]struct{}{{"dns", cfg.Addr.String(), "53"}: {}}
	err = caddy.ValidateAndExecuteDirectives(caddy.CaddyfileInput{Filepath: "Corefile", Contents: text, ServerTypeName: "dns"}, nil, true)
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return text
}

func TestCorefile(t *testing.T) {
	v6 := testConfig("/d")
	v6.Addr, v6.MetricsAddr = netip.MustParseAddr("fd00:43::10"), ""
	tests := []struct {
		name      string
		cfg       Config
		upstreams []string
		custom    map[string]string
	}{
		{name: "default", cfg: testConfig("/d"), upstreams: []string{"192.168.1.1:53", "[fe80::1%eth0]:53"}},
		{name: "no-upstream", cfg: testConfig("/d")},
		{name: "ipv6-no-metrics", cfg: v6, upstreams: []string{"[2001:db8::1]:53"}},
		{name: "custom", cfg: testConfig("/d"), upstreams: []string{"192.168.1.1:53"}, custom: map[string]string{
			"b.override": "rewrite name a.example b.example\n", "a.override": "log\n",
			"z.server": "z.example:53 {\n  forward . 9.9.9.9\n}\n", "zone.db": "$ORIGIN example.\n",
		}},
		{name: "override-defaults", cfg: testConfig("/d"), upstreams: []string{"192.168.1.1:53"}, custom: map[string]string{
			"x.override": "errors\ncache 300\nforward corp.example 9.9.9.8\nforward . 9.9.9.9 {\n  max_concurrent 10\n}\n",
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			store := customStore{dir: t.TempDir()}
			custom, err := store.stage(newCustomConfig(tt.custom, nil))
			if err != nil {
				t.Fatal(err)
			}
			text := checkCorefile(t, tt.cfg, tt.upstreams, custom)
			got := strings.ReplaceAll(string(text), store.dir, "/d")
			golden.Compare(t, "testdata/Corefile."+tt.name, got)
		})
	}
}

// TestDocumentedExamples: what the user documentation shows is accepted.
func TestDocumentedExamples(t *testing.T) {
	doc, err := os.ReadFile("../../docs/dns.md")
	if err != nil {
		t.Fatal(err)
	}
	examples := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllSubmatch(doc, -1)
	if len(examples) == 0 {
		t.Fatal("no example found")
	}
	for _, example := range examples {
		var cm corev1.ConfigMap
		if err := yaml.UnmarshalStrict(example[1], &cm); err != nil {
			t.Fatal(err)
		}
		if cm.Namespace != CustomNamespace || cm.Name != CustomName {
			t.Errorf("ConfigMap %s/%s", cm.Namespace, cm.Name)
		}
		cfg := testConfig(t.TempDir())
		custom, err := (customStore{dir: cfg.Dir}).stage(newCustomConfig(cm.Data, nil))
		if err != nil {
			t.Fatal(err)
		}
		checkCorefile(t, cfg, []string{"192.168.1.1:53"}, custom)
	}
}

func TestDirectives(t *testing.T) {
	if err := registerDirectives(); err != nil {
		t.Fatal(err)
	}
	own := []string{dirKedge, dirCluster, dirUnresolved}
	var upstream []string
	for _, d := range directives() {
		if _, err := caddy.DirectiveAction("dns", d); err != nil {
			t.Errorf("directive %s is listed but not linked: %v", d, err)
		}
		if !slices.Contains(own, d) {
			upstream = append(upstream, d)
		}
	}
	var want []string
	for _, d := range upstreamDirectives {
		if slices.Contains(upstream, d) {
			want = append(want, d)
		}
	}
	if d := cmp.Diff(want, upstream); d != "" {
		t.Errorf("not CoreDNS's order of execution (-CoreDNS +ours):\n%s", d)
	}
	for _, d := range []string{"kubernetes", "loop", "debug", "reload", "health", "ready", "pprof"} {
		if slices.Contains(directives(), d) {
			t.Errorf("%s must not be available, see the package's doc", d)
		}
	}
}

// FuzzOverride: no override makes the assembly panic or produce a Corefile that differs in the main block's frame.
func FuzzOverride(f *testing.F) {
	for _, seed := range []string{"log", "forward . 9.9.9.9 {\n policy random\n}\n", "}\nexample.org {\n whoami\n", "(snip) {\n log\n}", "forward", "import x", "{", "\"", "forward . {\n{\n"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		cfg := testConfig(t.TempDir())
		custom, err := (customStore{dir: cfg.Dir}).stage(newCustomConfig(map[string]string{"x.override": text}, nil))
		if err != nil {
			t.Fatal(err)
		}
		out, err := corefile(cfg, nil, custom)
		if err == nil && !bytes.Contains(out, []byte("bind 10.43.0.10")) {
			t.Errorf("no bind in\n%s", out)
		}
	})
}
