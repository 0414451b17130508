// SPDX-License-Identifier: Apache-2.0

package check

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kedge-io/kedge/tests/golden"
)

// TestGolden holds the text and the JSON of a report that has everything in it.
func TestGolden(t *testing.T) {
	probes := []Probe{
		{Name: "root", Group: "Machine", Fatal: true},
		{Name: "memory", Group: "Machine"},
		{Name: "swap", Group: "Machine"},
		{Name: "ports", Group: "Network", Fatal: true},
		{Name: "resolv-conf", Group: "Network"},
		{Name: "conntrack", Group: "Network"},
	}
	results := map[string]ProbeReport{
		"root":   {Name: "root", Fatal: true, Elapsed: time.Millisecond, Result: Result{Status: Pass, Finding: "uid 0"}},
		"memory": {Name: "memory", Elapsed: time.Millisecond, Result: Result{Status: Info, Finding: "much, and a finding that is so long that it cannot be shown in one line of a hundred columns but goes on in the next"}},
		"swap":   {Name: "swap", Elapsed: time.Millisecond, Result: Result{Status: Warning, Finding: "/var/swap", Remedy: "$ swapoff -a && echo a command is never broken into two lines, however long it may be, since people copy it\nand edit /etc/fstab."}},
		"ports": {Name: "ports", Fatal: true, Elapsed: time.Millisecond, Result: combine([]Item{
			{Name: "6443/tcp", Result: Result{Status: Fail, Finding: "in use by k3s (pid 7)", Remedy: "$ ss -lntp 'sport = :6443'"}},
			{Name: "a name that needs a line for itself", Result: Result{Status: Pass, Finding: "free"}},
		}, "all free")},
		"resolv-conf": {Name: "resolv-conf", Elapsed: time.Millisecond, Result: combine([]Item{{Name: "hidden", Result: Result{Status: Pass, Finding: "free"}}}, "all well")},
		"conntrack":   {Name: "conntrack", Elapsed: time.Millisecond, Result: unprobed(errors.New("no such file"))},
	}
	report := newReport(probes, results)
	report.Host, report.System = "edge-1", "linux/arm64, kernel 6.12.1"
	for name, write := range map[string]func(*bytes.Buffer) error{
		"report.txt":       func(b *bytes.Buffer) error { return report.WriteText(b, TextOptions{}) },
		"report-color.txt": func(b *bytes.Buffer) error { return report.WriteText(b, TextOptions{Color: true, Width: 60}) },
		"report.json": func(b *bytes.Buffer) error {
			enc := json.NewEncoder(b) // as cmd/output does
			enc.SetIndent("", "  ")
			enc.SetEscapeHTML(false)
			return enc.Encode(report)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var got bytes.Buffer
			if err := write(&got); err != nil {
				t.Fatal(err)
			}
			golden.Compare(t, "testdata/"+name, got.String())
		})
	}
	if !report.Failed() {
		t.Error("a report with a failed probe does not count as failed")
	}
}

func TestFatalError(t *testing.T) {
	err := &FatalError{Failures: []ProbeReport{
		{Name: "root", Result: Result{Status: Fail, Finding: "running as uid 1000", Remedy: "$ sudo kedge server"}},
		{Name: "ports", Result: combine([]Item{
			{Name: "6443/tcp", Result: Result{Status: Fail, Finding: "in use by k3s", Remedy: "$ ss -lntp"}},
			{Name: "2380/tcp", Result: Result{Status: Pass, Finding: "free"}},
		}, "")},
	}}
	want := `this machine cannot run Kedge as it is (2 failed):
- root: running as uid 1000
    $ sudo kedge server
- ports 6443/tcp: in use by k3s
    $ ss -lntp
` + "`kedge check` shows the whole picture"
	if diff := cmp.Diff(want, err.Error()); diff != "" {
		t.Error(diff)
	}
}

func TestRunOne(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	for name, test := range map[string]struct {
		run  func(context.Context, Options) Result
		want Result
	}{
		"result": {func(context.Context, Options) Result { return Result{Status: Pass, Finding: "well"} }, Result{Status: Pass, Finding: "well"}},
		"panic":  {func(context.Context, Options) Result { panic("index") }, Result{Status: Unknown, Finding: "the probe broke off: index"}},
		"hangs":  {func(context.Context, Options) Result { <-release; return Result{} }, Result{Status: Unknown, Finding: "could not be probed: no answer within 5ms"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := runOne(t.Context(), Probe{Name: name, Run: test.run}, Options{}, 5*time.Millisecond)
			if diff := cmp.Diff(test.want, got.Result); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestProbesAreDocumented keeps docs/check.md complete: a heading for each probe, and none for anything else.
func TestProbesAreDocumented(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "check.md"))
	if err != nil {
		t.Fatal(err)
	}
	var documented, known []string
	for _, m := range regexp.MustCompile("(?m)^### ([a-z0-9-]+)(.*)$").FindAllStringSubmatch(string(page), -1) {
		documented = append(documented, m[1]+m[2])
	}
	for _, p := range Probes() {
		name := p.Name
		if p.Fatal {
			name += " (fatal)"
		}
		known = append(known, name)
	}
	if diff := cmp.Diff(known, documented); diff != "" {
		t.Errorf("headings of docs/check.md (+) and probes (-):\n%s", diff)
	}
}

func TestProbeNames(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range Probes() {
		if seen[p.Name] || strings.ToLower(p.Name) != p.Name || p.Run == nil || p.Group == "" {
			t.Errorf("probe %q is a duplicate or incomplete", p.Name)
		}
		if p.Fatal && p.alone {
			t.Errorf("probe %s measures time and cannot be fatal: it would delay every start", p.Name)
		}
		seen[p.Name] = true
	}
}

// TestRunFatal runs the fatal probes for real and holds them to their time. What they find depends on the machine.
func TestRunFatal(t *testing.T) {
	best := time.Hour
	for range 20 { // on a busy machine some are slow for reasons of their own
		start := time.Now()
		if err := RunFatal(t.Context(), Options{DataDir: t.TempDir()}); err != nil {
			var fatal *FatalError
			if !errors.As(err, &fatal) || len(fatal.Failures) == 0 {
				t.Fatalf("not a FatalError with failures: %v", err)
			}
		}
		if best = min(best, time.Since(start)); best < 50*time.Millisecond {
			break
		}
	}
	if best > 100*time.Millisecond {
		t.Errorf("the fatal probes take %s, which delays every start; at most 100ms", best)
	}
}

// TestRun runs all probes for real: each must give an answer, and nothing may be left behind.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	before := threads(t)
	report := Run(t.Context(), Options{DataDir: filepath.Join(dir, "not", "yet")})
	n := 0
	for _, g := range report.Groups {
		for _, p := range g.Probes {
			n++
			if p.Finding == "" && len(p.Items) == 0 || !slices.Contains(statuses(), p.Status) {
				t.Errorf("probe %s says nothing: %+v", p.Name, p)
			}
			if strings.Contains(p.Finding, "broke off") {
				t.Errorf("probe %s: %s", p.Name, p.Finding)
			}
		}
	}
	if n != len(Probes()) {
		t.Errorf("%d results of %d probes", n, len(Probes()))
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind in the data directory: %v (%v)", left, err)
	}
	// Threads that were in other namespaces must be gone or back: none may serve the rest of the process.
	for ns, task := range threads(t) {
		if _, known := before[ns]; !known {
			t.Errorf("thread %s stayed in %s", task, ns)
		}
	}
}

// threads gives the network and mount namespaces that the threads of this process are in. A thread that is about to
// end is waited for.
func threads(t *testing.T) map[string]string {
	t.Helper()
	var found map[string]string
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		found = map[string]string{}
		for _, kind := range []string{"net", "mnt"} {
			links, err := filepath.Glob("/proc/self/task/*/ns/" + kind)
			if err != nil {
				t.Fatal(err)
			}
			for _, link := range links {
				if target, err := os.Readlink(link); err == nil {
					found[target] = link
				}
			}
		}
		if len(found) == 2 {
			break
		}
	}
	return found
}
