// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// report is what Ginkgo writes, shortened.
const report = `<?xml version="1.0" encoding="UTF-8"?>
<testsuites tests="5" failures="2">
  <testsuite name="Kubernetes e2e suite">
    <testcase name="[SynchronizedBeforeSuite]" status="passed" time="1"></testcase>
    <testcase name="[It] [sig-a] Pods should run [Conformance] [sig-a, Conformance]" status="passed" time="5.5"></testcase>
    <testcase name="[It] [sig-a] Pods should stop [Serial] [sig-a, Serial]" status="skipped" time="0"><skipped message="skipped"></skipped></testcase>
    <testcase name="[It] [sig-a] Pods should fly [LinuxOnly] [sig-a]" status="skipped" time="0"><skipped message="skipped - no wings"></skipped></testcase>
    <testcase name="[It] [sig-a] Pods should sing (a, b) [sig-a]" status="failed" time="7"><failure message="out of&#xA;tune" type="failed">trace</failure></testcase>
    <testcase name="[SynchronizedAfterSuite]" status="panicked" time="1"><error message="boom"></error></testcase>
  </testsuite>
</testsuites>`

func TestSummary(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "parallel.xml")
	if err := os.WriteFile(file, []byte(report), 0o644); err != nil {
		t.Fatal(err)
	}
	results, err := readJUnit(file)
	if err != nil {
		t.Fatal(err)
	}
	want := []result{
		{"[sig-a] Pods should run [Conformance]", passed, "", 5.5},
		{"[sig-a] Pods should fly [LinuxOnly]", skipped, "no wings", 0},
		{"[sig-a] Pods should sing (a, b)", failed, "out of\ntune", 7},
		{"[SynchronizedAfterSuite]", failed, "boom", 1},
	}
	if diff := cmp.Diff(want, results, cmp.AllowUnexported(result{})); diff != "" {
		t.Error(diff)
	}
	var out strings.Builder
	if err := summarize(&out, dir, results); !errors.Is(err, errFailed) {
		t.Errorf("error: %v", err)
	}
	if !strings.HasSuffix(out.String(), "\n1 passed, 2 failed\n") || !strings.Contains(out.String(), "\n    out of tune\n") {
		t.Error(out.String())
	}
	names, err := os.ReadFile(filepath.Join(dir, "failed.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if want := "[SynchronizedAfterSuite]\n[sig-a] Pods should sing (a, b)\n"; string(names) != want {
		t.Errorf("failed.txt: %s", names)
	}
}

// TestNoTests: a run in which nothing was tested is no success.
func TestNoTests(t *testing.T) {
	for name, results := range map[string][]result{"none": nil, "skipped": {{state: skipped}}} {
		if err := summarize(&strings.Builder{}, t.TempDir(), results); !errors.Is(err, errFailed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := summarize(&strings.Builder{}, t.TempDir(), []result{{state: passed}}); err != nil {
		t.Error(err)
	}
}

func TestFocus(t *testing.T) {
	focus := regexp.MustCompile(focusOf("# comment\n\n[sig-a] Pods should sing (a, b)\n  [sig-b] Other.  \n"))
	for name, want := range map[string]bool{
		"[sig-a] Pods should sing (a, b)":           true,
		"[sig-a] Pods should sing (a, b) and dance": false,
		"[sig-b] Other.":                            true,
		"[sig-b] Others":                            false,
		"# comment":                                 false,
	} {
		if focus.MatchString(name) != want {
			t.Errorf("%q matches: %v", name, !want)
		}
	}
}
