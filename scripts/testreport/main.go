// SPDX-License-Identifier: Apache-2.0

// Command testreport runs go test and shows what a person wants to know: a line for each package, the output of what
// failed, why tests were skipped, and the counts.
//
//	testreport [-v] [-count FILE] [--] ARGUMENTS OF GO TEST...
//
// With -v every finished test gets a line at once, which long scenarios need. FILE gets a line "PASSED FAILED" appended.
// The exit status is that of go test.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

func main() {
	verbose := flag.Bool("v", false, "a line for every test when it is finished")
	count := flag.String("count", "", "append the counts to this `FILE`")
	flag.Parse()
	failed, err := run(*verbose, *count, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
	}
	if failed || err != nil {
		os.Exit(1)
	}
}

func run(verbose bool, count string, args []string) (failed bool, err error) {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return true, err
	}
	if err := cmd.Start(); err != nil {
		return true, err
	}
	r := newReport(os.Stdout, verbose)
	readErr := r.read(out)
	runErr := cmd.Wait()
	if runErr != nil && r.failed == 0 {
		r.failed = 1 // go test itself failed
	}
	r.summary()
	if count != "" {
		err = appendTo(count, fmt.Sprintf("%d %d\n", r.passed, r.failed))
	}
	var exit *exec.ExitError
	if errors.As(runErr, &exit) {
		runErr = nil // told by failed
	}
	return r.failed > 0, errors.Join(readErr, runErr, err)
}

func appendTo(file, line string) error {
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line)
	return errors.Join(err, f.Close())
}

// event is a line of go test -json: see go doc test2json.
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build output
	Test        string
	Elapsed     float64 // seconds
	Output      string
	FailedBuild string
}

type key struct{ pkg, test string }

// report counts tests that have no subtests; one that has counts only when it failed by itself.
type report struct {
	w       io.Writer
	verbose bool

	output  map[key]*strings.Builder
	parents map[key]bool
	broken  map[key]bool // a subtest failed
	counts  map[string]int
	skips   []string

	passed, failed, skipped int
}

func newReport(w io.Writer, verbose bool) *report {
	return &report{w: w, verbose: verbose, output: map[key]*strings.Builder{}, parents: map[key]bool{}, broken: map[key]bool{}, counts: map[string]int{}}
}

func (r *report) read(in io.Reader) error {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if jsonErr := json.Unmarshal(line, &e); jsonErr != nil {
				fmt.Fprintf(r.w, "%s", line) // not from go test
			} else {
				r.add(e)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (r *report) add(e event) {
	k := key{e.Package, e.Test}
	if e.Action == "build-output" {
		k = key{pkg: e.ImportPath}
	}
	switch e.Action {
	case "output", "build-output":
		if r.output[k] == nil {
			r.output[k] = &strings.Builder{}
		}
		r.output[k].WriteString(e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			r.endPackage(e)
		} else {
			r.endTest(e, k)
		}
		delete(r.output, k)
	}
}

func (r *report) endTest(e event, k key) {
	if i := strings.LastIndexByte(e.Test, '/'); i > 0 {
		parent := key{e.Package, e.Test[:i]}
		r.parents[parent] = true
		r.broken[parent] = r.broken[parent] || e.Action == "fail" || r.broken[k]
	}
	took := time.Duration(e.Elapsed * float64(time.Second)).Round(10 * time.Millisecond)
	switch e.Action {
	case "pass":
		if r.parents[k] {
			return
		}
		r.passed++
		r.counts[e.Package]++
		if r.verbose {
			fmt.Fprintf(r.w, "  ok    %s %s\n", e.Test, took)
		}
	case "fail":
		if !r.parents[k] || !r.broken[k] {
			r.failed++
		}
		fmt.Fprintf(r.w, "  FAIL  %s %s (%s)\n%s", short(e.Package), e.Test, took, indent(r.text(k)))
	case "skip":
		r.skipped++
		r.skips = append(r.skips, fmt.Sprintf("%s %s: %s", short(e.Package), e.Test, reason(r.text(k))))
	}
}

func (r *report) endPackage(e event) {
	k := key{pkg: e.Package}
	switch {
	case e.Action == "fail":
		if e.FailedBuild != "" {
			r.failed++
			fmt.Fprintf(r.w, "%s", indent(r.text(key{pkg: e.FailedBuild})))
		}
		fmt.Fprintf(r.w, "FAIL  %s (%.1fs)\n%s", short(e.Package), e.Elapsed, indent(r.text(k)))
	case e.Action == "pass":
		fmt.Fprintf(r.w, "ok    %s (%d tests, %.1fs)\n", short(e.Package), r.counts[e.Package], e.Elapsed)
	}
}

func (r *report) summary() {
	// Tests without an end: the process died, e.g. by a timeout.
	for k, out := range r.output {
		if k.test != "" && strings.Contains(out.String(), "=== RUN") {
			fmt.Fprintf(r.w, "  DIED  %s %s\n%s", short(k.pkg), k.test, indent(out.String()))
			r.failed++
		}
	}
	if len(r.skips) > 0 {
		fmt.Fprintf(r.w, "%d skipped:\n", r.skipped)
		for _, s := range r.skips {
			fmt.Fprintln(r.w, "  "+s)
		}
	}
	fmt.Fprintf(r.w, "%d passed, %d failed\n", r.passed, r.failed)
}

func (r *report) text(k key) string {
	if r.output[k] == nil {
		return ""
	}
	return r.output[k].String()
}

// indent drops what go test says about itself.
func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		switch s := strings.TrimSpace(line); {
		case s == "", s == "PASS", s == "FAIL", strings.HasPrefix(s, "=== "), strings.HasPrefix(s, "--- "), strings.HasPrefix(s, "FAIL\t"), strings.HasPrefix(s, "ok  \t"):
		default:
			b.WriteString("        " + strings.TrimRight(line, "\n") + "\n")
		}
	}
	return b.String()
}

// reason is what a test said to t.Skip.
func reason(text string) string {
	return strings.Join(strings.Fields(strings.ReplaceAll(indent(text), "\n", " ")), " ")
}

func short(pkg string) string { return strings.TrimPrefix(pkg, "github.com/kedge-io/kedge/") }
