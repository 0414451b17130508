// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// state is what became of a test.
type state string

const (
	passed  state = "passed"
	failed  state = "failed"
	skipped state = "skipped"
)

// result is that of one test.
type result struct {
	name    string
	state   state
	message string
	seconds float64
}

func (r result) failed() bool { return r.state == failed }

// testCase is one of a JUnit file. Ginkgo lists all tests that there are, with a status for those that were not selected.
type testCase struct {
	Name    string   `xml:"name,attr"`
	Seconds float64  `xml:"time,attr"`
	Failure *outcome `xml:"failure"`
	Error   *outcome `xml:"error"`
	Skipped *outcome `xml:"skipped"`
}

type outcome struct {
	Message string `xml:"message,attr"`
}

// readJUnit reads the results of the tests that were selected. What runs before and after them counts when it failed.
func readJUnit(file string) ([]result, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var doc struct {
		Suites []struct {
			Cases []testCase `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal(text, &doc); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var results []result
	for _, s := range doc.Suites {
		for _, c := range s.Cases {
			if r, ok := resultOf(c); ok {
				results = append(results, r)
			}
		}
	}
	return results, nil
}

func resultOf(c testCase) (result, bool) {
	name, isTest := strings.CutPrefix(c.Name, "[It] ")
	r := result{name: withoutLabels(name), state: passed, seconds: c.Seconds}
	switch {
	case c.Failure != nil:
		r.state, r.message = failed, c.Failure.Message
	case c.Error != nil:
		r.state, r.message = failed, c.Error.Message
	case c.Skipped != nil:
		reason, ok := strings.CutPrefix(c.Skipped.Message, "skipped - ")
		if !ok {
			return r, false // not selected
		}
		r.state, r.message = skipped, reason
	}
	return r, isTest || r.state == failed
}

// withoutLabels removes the list of labels that Ginkgo appends to a name: the first of them is in the name already.
func withoutLabels(name string) string {
	i := strings.LastIndex(name, " [")
	if i < 0 || !strings.HasSuffix(name, "]") {
		return name
	}
	label, _, _ := strings.Cut(name[i+2:len(name)-1], ", ")
	if !strings.Contains(name[:i], "["+label+"]") {
		return name
	}
	return name[:i]
}

// errFailed tells that tests failed.
var errFailed = errors.New("tests failed")

// summarize writes what failed and was skipped and why, the slowest tests, and the counts in the last line. The names of what
// failed go to failed.txt in dir, too.
func summarize(w io.Writer, dir string, results []result) error {
	slices.SortFunc(results, func(a, b result) int { return cmp.Compare(b.seconds, a.seconds) })
	for _, r := range results[:min(5, len(results))] {
		fmt.Fprintf(w, "slow: %4.0f s  %s\n", r.seconds, r.name)
	}
	slices.SortFunc(results, func(a, b result) int { return cmp.Compare(a.name, b.name) })
	counts := map[state]int{}
	var names strings.Builder
	for _, r := range results {
		counts[r.state]++
		if r.state == failed {
			names.WriteString(r.name + "\n")
		}
	}
	for _, s := range []state{skipped, failed} {
		for _, r := range results {
			if r.state == s {
				message := strings.Join(strings.Fields(r.message), " ")
				fmt.Fprintf(w, "%s: %s\n    %s\n", s, r.name, message[:min(300, len(message))])
			}
		}
	}
	err := os.WriteFile(filepath.Join(dir, "failed.txt"), []byte(names.String()), 0o644)
	if counts[skipped] > 0 {
		fmt.Fprintf(w, "%d skipped by themselves\n", counts[skipped])
	}
	fmt.Fprintf(w, "results in %s\n%d passed, %d failed\n", dir, counts[passed], counts[failed])
	if counts[failed] > 0 || counts[passed] == 0 {
		return errors.Join(errFailed, err)
	}
	return err
}
