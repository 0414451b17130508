// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"strings"
	"testing"
)

func TestCompare(t *testing.T) {
	order := []string{"v1.36.9+kedge1", "v1.37.0-rc.1+kedge1", "v1.37.0", "v1.37.0+kedge1", "v1.37.0+kedge2", "v1.37.0+kedge10", "v1.37.1+kedge1", "v1.38.0+kedge1"}
	for i, a := range order {
		for j, b := range order {
			va, err := ParseVersion(a)
			if err != nil {
				t.Fatal(err)
			}
			vb, err := ParseVersion(b)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := va.Compare(vb), max(-1, min(1, i-j)); got != want {
				t.Errorf("%s to %s: %d, want %d", a, b, got, want)
			}
		}
	}
}

func TestJudge(t *testing.T) {
	server := Facts{Server: true, Current: "v1.37.2+kedge1"}
	with := func(f Facts, change func(*Facts)) Facts { change(&f); return f }
	for name, c := range map[string]struct {
		facts Facts
		to    string
		want  string // part of the error; empty: it may
		hard  bool   // not even with force
	}{
		"revision":                 {server, "v1.37.2+kedge2", "", false},
		"patch":                    {server, "v1.37.3+kedge1", "", false},
		"minor":                    {server, "v1.38.0+kedge1", "", false},
		"the same":                 {server, "v1.37.2+kedge1", "already", false},
		"an older patch":           {server, "v1.37.1+kedge1", "", false},
		"an older minor":           {server, "v1.36.5+kedge1", "step back", false},
		"two minors":               {server, "v1.39.0+kedge1", "to a v1.38 first", false},
		"another major":            {server, "v2.0.0+kedge1", "another major", true},
		"no version":               {server, "latest", "not a version", true},
		"not ready":                {with(server, func(f *Facts) { f.Missing = "kubelet waiting" }), "v1.37.2+kedge2", "kubelet waiting", false},
		"an old server":            {with(server, func(f *Facts) { f.Servers = map[string]string{"s2": "v1.36.1+kedge1"} }), "v1.38.0+kedge1", "s2 runs", false},
		"an old kubelet":           {with(server, func(f *Facts) { f.Kubelets = map[string]string{"a1": "v1.34.1"} }), "v1.38.0+kedge1", "a1 runs", false},
		"a kubelet old enough":     {with(server, func(f *Facts) { f.Kubelets = map[string]string{"a1": "v1.35.1", "a2": "odd"} }), "v1.38.0+kedge1", "", false},
		"a server is down":         {with(server, func(f *Facts) { f.Servers, f.NotReady = map[string]string{"s2": "", "s3": ""}, []string{"s3"} }), "v1.37.2+kedge2", "majority", false},
		"the other of two is down": {with(server, func(f *Facts) { f.Servers, f.NotReady = map[string]string{"s2": ""}, []string{"s2"} }), "v1.37.2+kedge2", "", false},
		"back, not ready":          {with(server, func(f *Facts) { f.Back, f.Missing = true, "kubelet waiting" }), "v1.37.1+kedge1", "", false},
		"back, a server is down": {with(server, func(f *Facts) {
			f.Back, f.Servers, f.NotReady = true, map[string]string{"s2": "", "s3": ""}, []string{"s3"}
		}), "v1.37.2+kedge0", "", false},
		"back to an older minor":    {with(server, func(f *Facts) { f.Back, f.Missing = true, "kubelet waiting" }), "v1.36.5+kedge1", "step back", false},
		"agent":                     {Facts{Current: "v1.37.2+kedge1", Servers: map[string]string{"s1": "v1.37.2+kedge2"}}, "v1.37.2+kedge2", "", false},
		"agent, two minors":         {Facts{Current: "v1.37.2+kedge1", Servers: map[string]string{"s1": "v1.39.2+kedge2"}}, "v1.39.0+kedge1", "", false},
		"agent newer than a server": {Facts{Current: "v1.37.2+kedge1", Servers: map[string]string{"s1": "v1.38.0+kedge1", "s2": "v1.37.2+kedge1"}}, "v1.38.0+kedge1", "s2 runs", false},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.facts.Judge(c.to, false)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if _, err := c.facts.Judge(c.to, true); (err != nil) != c.hard {
				t.Errorf("with force: %v", err)
			}
		})
	}
}

func FuzzParseVersion(f *testing.F) {
	for _, s := range []string{"v1.37.2+kedge1", "v1.37.2", "v1.37.2-rc.1+kedge10", "1", "v1.2.3+kedge-1", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if v, err := ParseVersion(s); err == nil && v.Compare(v) != 0 {
			t.Errorf("%q differs from itself", s)
		}
	})
}
