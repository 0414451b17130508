// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// selection says which tests are wanted.
type selection struct {
	labels      string // Ginkgo's filter
	focus, skip string // regular expressions
	names       string // another one: see focusOf
}

// args are those of Ginkgo, to which several that focus mean any of them.
func (s selection) args(prefix string) []string {
	args := []string{prefix + "label-filter=" + s.labels}
	for _, f := range []string{s.focus, s.names} {
		if f != "" {
			args = append(args, prefix+"focus="+f)
		}
	}
	if s.skip != "" {
		args = append(args, prefix+"skip="+s.skip)
	}
	return args
}

// and narrows a selection by another filter.
func (s selection) and(labels string) selection {
	if s.labels != "" {
		labels = "(" + s.labels + ") && " + labels
	}
	s.labels = labels
	return s
}

// focusOf makes a regular expression of the names of tests, one in a line, which matches them and no others. Lines that
// begin with # are comments.
func focusOf(text string) string {
	var names []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			names = append(names, regexp.QuoteMeta(line)+"$")
		}
	}
	return strings.Join(names, "|")
}

// part is a run of the suite.
type part struct {
	name string
	selection
	procs int
	tests int // how many it has
}

// suite is upstream's.
type suite struct {
	kit, results        string
	kubectl, kubeconfig string
}

// parts are the runs that have tests: what may run at the same time, and what must not.
func (s *suite) parts(ctx context.Context, o options) ([]part, error) {
	parts := []part{
		{name: "parallel", selection: o.selection.and("!Serial && !Disruptive"), procs: o.procs},
		{name: "serial", selection: o.selection.and("(Serial || Disruptive)"), procs: 1},
	}
	for i := range parts {
		n, err := s.count(ctx, parts[i].selection)
		if err != nil {
			return nil, err
		}
		parts[i].tests = n
	}
	parts = slices.DeleteFunc(parts, func(p part) bool { return p.tests == 0 })
	if len(parts) == 0 {
		return nil, fmt.Errorf("no test is selected: %s", strings.Join(o.selection.args(""), " "))
	}
	return parts, nil
}

// count asks the suite for the tests of a selection, which takes no cluster.
func (s *suite) count(ctx context.Context, sel selection) (int, error) {
	report := filepath.Join(s.results, "dry-run.xml")
	cmd := exec.CommandContext(ctx, filepath.Join(s.kit, "e2e.test"), append(sel.args("--ginkgo."), "--ginkgo.dry-run", "--ginkgo.junit-report="+report)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("e2e.test: %w: %s", err, tail(out.String()))
	}
	defer os.Remove(report)
	results, err := readJUnit(report)
	return len(results), err
}

// run runs a part and returns what became of its tests.
func (s *suite) run(ctx context.Context, p part) ([]result, error) {
	log, err := os.Create(filepath.Join(s.results, p.name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	fmt.Printf("%s part: %d tests, %d at a time, log in %s\n", p.name, p.tests, p.procs, log.Name())
	args := slices.Concat([]string{
		"run", "-v", "--no-color", "--procs", strconv.Itoa(p.procs), "--timeout=5h", "--silence-skips", "--poll-progress-after=10m",
		"--output-dir", s.results, "--junit-report", p.name + ".xml",
	}, p.args("--"), []string{
		filepath.Join(s.kit, "e2e.test"), "--", "--kubeconfig", s.kubeconfig, "--kubectl-path", s.kubectl, "--provider=local",
		"--non-blocking-taints=node-role.kubernetes.io/control-plane", "--allowed-not-ready-nodes=0",
	})
	cmd := exec.CommandContext(ctx, filepath.Join(s.kit, "programs", "ginkgo"), args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "KUBECONFIG="+s.kubeconfig)
	// The processes that Ginkgo starts have to end with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	begin := time.Now()
	runErr := cmd.Run()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	fmt.Printf("%s part: %d s\n", p.name, int(time.Since(begin).Seconds()))
	results, err := readJUnit(filepath.Join(s.results, p.name+".xml"))
	if err != nil || len(results) == 0 {
		text, readErr := os.ReadFile(log.Name())
		return nil, errors.Join(fmt.Errorf("the suite has made no report: %s", tail(string(text))), runErr, err, readErr)
	}
	if runErr != nil && !slices.ContainsFunc(results, result.failed) {
		return nil, fmt.Errorf("ginkgo: %w, though no test failed: see %s", runErr, log.Name())
	}
	return results, nil
}

// tail gives the last lines of a text.
func tail(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}
