// SPDX-License-Identifier: Apache-2.0

package cis

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestItems: every item is there once, with a title and in order, and looks at a machine without anything.
func TestItems(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range checks() {
		if !regexp.MustCompile(`^\d(\.\d+){1,2}$`).MatchString(c.id) || c.title == "" || seen[c.id] {
			t.Errorf("item %q %q", c.id, c.title)
		}
		seen[c.id] = true
		if _, ok := sections()[c.id[:strings.LastIndexByte(c.id, '.')]]; !ok {
			t.Errorf("item %s has no section", c.id)
		}
		if r := c.look(&machine{}); r.Status != NotApplicable || r.Finding == "" {
			t.Errorf("%s without a Kedge: %+v", c.id, r)
		}
	}
	// The numbers of items in each section of the benchmark.
	for section, last := range map[string]int{"1.1": 21, "1.2": 30, "1.3": 7, "1.4": 2, "2": 7, "3.1": 3, "3.2": 2, "4.1": 10, "4.2": 14, "4.3": 1,
		"5.1": 13, "5.2": 12, "5.3": 2, "5.4": 2, "5.5": 1, "5.6": 4} {
		n := 0
		for id := range seen {
			if id[:strings.LastIndexByte(id, '.')] == section {
				n++
			}
		}
		if n != last {
			t.Errorf("section %s has %d items instead of %d", section, n, last)
		}
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, perm os.FileMode) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, perm); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, perm); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good, loose := write("good.key", 0o400), write("loose.key", 0o640)
	for _, tt := range []struct {
		patterns []string
		want     Status
		finding  string
	}{
		{[]string{good}, Pass, good},
		{[]string{loose}, Fail, loose + " is 0640"},
		{[]string{filepath.Join(dir, "*.key")}, Fail, "loose.key is 0640"},
		{[]string{filepath.Join(dir, "*.pem")}, NotApplicable, "there is no"},
	} {
		if r := mode(0o600, tt.patterns...); r.Status != tt.want || !strings.Contains(r.Finding, tt.finding) {
			t.Errorf("%v: %+v", tt.patterns, r)
		}
	}
	if err := os.Chown(loose, 1, 0); err == nil { // as root
		if r := owner(good, loose); r.Status != Fail || !strings.Contains(r.Finding, "belongs to 1:0") {
			t.Errorf("%+v", r)
		}
	}
}

func TestCiphers(t *testing.T) {
	for list, want := range map[string]Status{
		"TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": Pass, "": Fail, "TLS_RSA_WITH_AES_128_CBC_SHA": Fail,
		"TLS_AES_128_GCM_SHA256,TLS_ECDHE_RSA_WITH_3DES_EDE_CBC_SHA": Fail,
	} {
		if r := ciphers(strings.Split(list, ","), "kubelet"); r.Status != want {
			t.Errorf("%s: %+v", list, r)
		}
	}
}

func TestReportText(t *testing.T) {
	r := Report{Benchmark: Benchmark, Node: "n1", Count: map[Status]int{Fail: 1, Pass: 1}, Items: []Item{
		{"1.2.1", "one", pass("good")}, {"1.2.2", "two", fail("do this", "bad")},
	}}
	var b strings.Builder
	if err := r.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"1.2 API server", "1.2.1  pass   one: good", "1.2.2  FAIL   two: bad", "> do this", "1 pass, 1 fail"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
	if !r.Failed() {
		t.Error("it did not fail")
	}
}
