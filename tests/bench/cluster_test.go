// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestIsVoter(t *testing.T) {
	const body = `{"members":[{"name":"s1","id":"1","peerURLs":["https://10.0.0.1:2380"],"learner":false},{"name":"s2","id":"2","learner":true}]}`
	for _, c := range []struct {
		body, name string
		want       bool
	}{
		{body, "s1", true},
		{body, "s2", false}, // it learns
		{body, "s3", false},
		{`{"members":[]}`, "s1", false},
		{`Service Unavailable`, "s1", false},
		{``, "", false},
	} {
		if got := isVoter([]byte(c.body), c.name); got != c.want {
			t.Errorf("isVoter(%s, %s) = %t", c.body, c.name, got)
		}
	}
}

// TestLosses: each has a line of the table, and they are what their names say.
func TestLosses(t *testing.T) {
	for _, l := range losses() {
		named := slices.ContainsFunc(figures(), func(f figure) bool { return f.name == "failover "+l.kind })
		if !named || l.together && l.leader {
			t.Errorf("%+v: has a line of the table: %t", l, named)
		}
	}
}

func TestTogether(t *testing.T) {
	one := reading{
		memory: []Memory{{Name: "all", Processes: 5, PSS: 400, Anonymous: 250}, {Name: "kedge", Processes: 5, PSS: 400, Anonymous: 250}},
		use:    use{cpu: 3, written: 0.5, device: 0.75, flushes: 30},
		syncs:  map[string]float64{"etcd fdatasync": 18, "node fsync": 1},
	}
	other := reading{
		memory: []Memory{{Name: "all", Processes: 6, PSS: 300, Anonymous: 200}},
		use:    use{cpu: 2, written: 0.25, device: 0.25, flushes: 20},
		syncs:  map[string]float64{"etcd fdatasync": 12},
	}
	uncounted := one
	uncounted.syncs = nil
	options := cmp.AllowUnexported(reading{}, use{})
	for _, c := range []struct {
		name string
		of   []reading
		want reading
	}{
		{"two", []reading{one, other}, reading{
			memory: []Memory{{Name: "all", Processes: 11, PSS: 700, Anonymous: 450}},
			use:    use{cpu: 5, written: 0.75, device: 1, flushes: 50},
			syncs:  map[string]float64{"etcd fdatasync": 30, "node fsync": 1},
		}},
		{"no system calls", []reading{uncounted}, reading{memory: one.memory[:1], use: one.use}},
		{"none", nil, reading{memory: []Memory{{Name: "all"}}}},
	} {
		if d := cmp.Diff(c.want, together(c.of), options); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
	}
	if one.syncs["etcd fdatasync"] != 18 {
		t.Error("the sum changed what it was made of")
	}
}

func TestUse(t *testing.T) {
	before, after := use{cpu: 10, written: 1, device: 2, flushes: 100}, use{cpu: 12, written: 1.5, device: 4, flushes: 130}
	want := use{cpu: 4, written: 1, device: 4, flushes: 60}
	if d := cmp.Diff(want, after.plus(before.times(-1)).times(2), cmp.AllowUnexported(use{})); d != "" {
		t.Errorf("of half a minute (-want +got):\n%s", d)
	}
}

func TestIncrease(t *testing.T) {
	old, again, ended := process{7, "1", "etcd"}, process{7, "2", "etcd"}, process{8, "1", "kubelet"}
	before := map[process]float64{old: 5, ended: 9}
	got := increase(before, map[process]float64{old: 6, again: 2})
	if d := cmp.Diff(map[string]float64{"etcd": 3}, got); d != "" { // 1 by the old process, 2 by the new one with its number
		t.Errorf("increase (-want +got):\n%s", d)
	}
	if got := total(map[string]float64{"etcd": 3, "kubelet": 0.5}); got != 3.5 {
		t.Errorf("total: %v", got)
	}
}

func TestShare(t *testing.T) {
	r := reading{use: use{cpu: 5}, memory: []Memory{{Name: "all"}, {Name: "etcd"}, {Name: "kubelet"}}}
	r.share(map[string]float64{"etcd": 1.5, "ended": 1}, 2)
	want := []Memory{{Name: "all", CPU: 5}, {Name: "etcd", CPU: 3}, {Name: "kubelet"}}
	if d := cmp.Diff(want, r.memory); d != "" {
		t.Errorf("processor time (-want +got):\n%s", d)
	}
}

func TestStat(t *testing.T) {
	const stat = "4711 (a) b) S 1 4711 4711 0 -1 4194560 100 0 0 0 250 50 7 8 20 0 12 0 123456 1 2"
	if got := cpuTicks(stat); got != 300 {
		t.Errorf("processor time %v, want 250 + 50", got)
	}
	if got := startTicks(stat); got != "123456" {
		t.Errorf("start %s", got)
	}
}

// TestOwnPrograms: what a machine runs is a copy, with links and modes, and nothing of an earlier run is left.
func TestOwnPrograms(t *testing.T) {
	from := t.TempDir()
	o := options{units: filepath.Join(t.TempDir(), "units")}
	for _, err := range []error{
		os.MkdirAll(filepath.Join(from, "tools"), 0o755),
		os.WriteFile(filepath.Join(from, "kubelet"), []byte("K"), 0o755),
		os.WriteFile(filepath.Join(from, "tools", "xtables"), []byte("X"), 0o755),
		os.Symlink("xtables", filepath.Join(from, "tools", "iptables")),
		os.WriteFile(filepath.Join(from, "kube-apiserver"), []byte("A"), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		dir, err := ownPrograms(o, "m1", from, "kubelet", "tools")
		if err != nil {
			t.Fatal(err)
		}
		for file, want := range map[string]string{"kubelet": "K", "tools/iptables": "X"} {
			if got, err := os.ReadFile(filepath.Join(dir, file)); err != nil || string(got) != want {
				t.Errorf("%s: %q, %v", file, got, err)
			}
		}
		st, err := os.Stat(filepath.Join(dir, "kubelet"))
		if err != nil || st.Mode().Perm()&0o111 == 0 {
			t.Errorf("kubelet cannot be executed: %v, %v", st, err)
		}
		if _, err := os.Stat(filepath.Join(dir, "kube-apiserver")); err == nil {
			t.Error("something was copied that was not asked for")
		}
		if err := os.WriteFile(filepath.Join(dir, "tools", "old"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := ownPrograms(o, "m1", from, "missing"); err == nil {
		t.Error("a missing program was not noticed")
	}
}

func TestParts(t *testing.T) {
	o, err := parse([]string{"-parts", "cluster size"})
	if err != nil || !o.has("cluster") || o.has("start") {
		t.Errorf("parse: %+v, %v", o, err)
	}
	if o, err := parse(nil); err != nil || !o.has("cluster") || !o.has("pods") {
		t.Errorf("parse without flags: %+v, %v", o, err)
	}
	if _, err := parse([]string{"-parts", "clusters"}); err == nil {
		t.Error("an unknown part was accepted")
	}
	seen := map[string]bool{}
	for _, f := range figures() {
		if seen[f.name] || seen[f.text] {
			t.Errorf("two lines for %q or %q", f.name, f.text)
		}
		seen[f.name], seen[f.text] = true, true
	}
}
