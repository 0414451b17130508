// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	const p = `"Package":"github.com/kedge-io/kedge/pkg/x"`
	for name, c := range map[string]struct {
		in                      string
		passed, failed, skipped int
		want, not               []string
	}{
		"passed": {
			in:     `{"Action":"output",` + p + `,"Test":"TestA","Output":"=== RUN   TestA\n"}` + "\n" + `{"Action":"pass",` + p + `,"Test":"TestA","Elapsed":1}` + "\n" + `{"Action":"pass",` + p + `,"Elapsed":1.5}`,
			passed: 1, want: []string{"ok    pkg/x (1 tests, 1.5s)"}, not: []string{"TestA"},
		},
		"subtests": {
			in: `{"Action":"pass",` + p + `,"Test":"TestA/one"}` + "\n" + `{"Action":"output",` + p + `,"Test":"TestA/two","Output":"    x_test.go:1: why\n"}` + "\n" +
				`{"Action":"fail",` + p + `,"Test":"TestA/two"}` + "\n" + `{"Action":"fail",` + p + `,"Test":"TestA"}` + "\n" + `{"Action":"fail",` + p + `}`,
			passed: 1, failed: 1, want: []string{"FAIL  pkg/x TestA/two", "x_test.go:1: why", "FAIL  pkg/x ("},
		},
		"parent fails by itself": {
			in:     `{"Action":"pass",` + p + `,"Test":"TestA/one"}` + "\n" + `{"Action":"fail",` + p + `,"Test":"TestA"}`,
			passed: 1, failed: 1,
		},
		"skipped": {
			in:      `{"Action":"output",` + p + `,"Test":"TestA","Output":"    x_test.go:1: needs root\n"}` + "\n" + `{"Action":"skip",` + p + `,"Test":"TestA"}`,
			skipped: 1, want: []string{"1 skipped:", "needs root"},
		},
		"build failed": {
			in: `{"ImportPath":"github.com/kedge-io/kedge/pkg/x","Action":"build-output","Output":"x.go:1: syntax error\n"}` + "\n" +
				`{"Action":"fail",` + p + `,"FailedBuild":"github.com/kedge-io/kedge/pkg/x"}`,
			failed: 1, want: []string{"syntax error"},
		},
		"died": {
			in:     `{"Action":"output",` + p + `,"Test":"TestA","Output":"=== RUN   TestA\n"}` + "\n" + `{"Action":"output",` + p + `,"Output":"panic: test timed out\n"}` + "\n" + `{"Action":"fail",` + p + `}`,
			failed: 1, want: []string{"DIED  pkg/x TestA", "panic: test timed out"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			r := newReport(&out, false)
			if err := r.read(strings.NewReader(c.in)); err != nil {
				t.Fatal(err)
			}
			r.summary()
			if r.passed != c.passed || r.failed != c.failed || r.skipped != c.skipped {
				t.Errorf("%d passed, %d failed, %d skipped; want %d, %d, %d", r.passed, r.failed, r.skipped, c.passed, c.failed, c.skipped)
			}
			for _, w := range c.want {
				if !strings.Contains(out.String(), w) {
					t.Errorf("no %q in:\n%s", w, out.String())
				}
			}
			for _, w := range c.not {
				if strings.Contains(out.String(), w) {
					t.Errorf("%q in:\n%s", w, out.String())
				}
			}
		})
	}
}
