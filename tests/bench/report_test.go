// SPDX-License-Identifier: Apache-2.0

package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestReport(t *testing.T) {
	var res results
	for i, v := range []float64{12, 30, 10} {
		for _, side := range []string{"stock", "kedge"} {
			rec := &recorder{results: &res, side: side, run: i + 1}
			if side == "kedge" {
				v /= 4
			}
			rec.add("fresh pod", v)
		}
	}
	kedge := &recorder{results: &res, side: "kedge", run: 1}
	idle := reading{
		memory: []Memory{{Name: "all", Processes: 6, PSS: 454.56, Anonymous: 297, CPU: 3.7}},
		use:    use{cpu: 3.7, written: 0.2, device: 0.25, flushes: 31},
		syncs:  map[string]float64{"etcd fdatasync": 17, "kedge [node] fsync": 0.6},
	}
	kedge.reading("idle", idle)
	kedge.behind("idle", idle)
	var out strings.Builder
	if err := res.write(&out, options{output: filepath.Join(t.TempDir(), "result.json")}); err != nil {
		t.Fatal(err)
	}
	want := `
figure                               stock             kedge                kedge/stock
start, fresh data: first pod Running 12 s (10-30)      3 s (2.50-7.50)      0.25
no pods: PSS                         -                 455 MiB
no pods: anonymous memory            -                 297 MiB
no pods: processes                   -                 6
no pods: CPU per minute              -                 3.70 s
no pods: written per minute, by process - 0.20 MB
no pods: written per minute, at the disk - 0.25 MB
no pods: fsyncs per minute - 18
no pods: disk flushes per minute - 31

kedge run 1, no pods: processes, PSS, anonymous (MiB), CPU per minute (s)
  all                            6   454.6   297.0    3.70

kedge run 1, no pods: etcd fdatasync 17, kedge [node] fsync 1
`
	words := func(s string) []string {
		var lines []string
		for line := range strings.Lines(s) {
			lines = append(lines, strings.Join(strings.Fields(line), " "))
		}
		return lines
	}
	if d := cmp.Diff(words(want), words(out.String())); d != "" {
		t.Errorf("table (-want +got):\n%s", d)
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		sorted []float64
		want   float64
	}{{[]float64{3}, 3}, {[]float64{1, 4}, 2.5}, {[]float64{1, 2, 9}, 2}} {
		if got := median(c.sorted); got != c.want {
			t.Errorf("median(%v) = %v, want %v", c.sorted, got, c.want)
		}
	}
}

func TestCountCalls(t *testing.T) {
	trace := `# tracer: nop
#
# entries-in-buffer/entries-written: 4/4   #P:2
            etcd-4711    [001] ..... 81234.567890: sys_fdatasync(fd: 9)
 kedge [node]-12      [000] ..... 81234.600000: sys_fsync(fd: 4)
            etcd-4712    [000] ..... 81235.000000: sys_fdatasync(fd: 9)
           a-b 1-99      [000] ..... 81236.000000: sys_sync()
`
	want := map[string]int{"kedge [etcd] fdatasync": 1, "etcd fdatasync": 1, "kedge [node] fsync": 1, "a-b 1 sync": 1}
	if d := cmp.Diff(want, countCalls(trace, map[int]string{4711: "kedge [etcd]"})); d != "" {
		t.Errorf("calls (-want +got):\n%s", d)
	}
}
