// SPDX-License-Identifier: Apache-2.0

package service

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

func TestAssigned(t *testing.T) {
	const unit = `[Service]
# ExecStart=/bin/false
ExecStart=
ExecStart=/usr/local/bin/kedge server \
	--data-dir /srv/k
ExecStartPost=/bin/true
`
	want := []string{"/usr/local/bin/kedge", "server", "--data-dir", "/srv/k"}
	if got := words(assigned(unit, "ExecStart")); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := assigned(unit, "ExecStop"); got != "" {
		t.Errorf("%q of a key that is not there", got)
	}
}

func TestWords(t *testing.T) {
	for line, want := range map[string][]string{
		"":                           nil,
		"  a\t b  ":                  {"a", "b"},
		`agent --node-label "a=b c"`: {"agent", "--node-label", "a=b c"},
		`x='y z'w ""`:                {"x=y zw", ""},
		`open "quote`:                {"open", "quote"},
	} {
		if got := words(line); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}

func FuzzWords(f *testing.F) {
	f.Add(`a "b c" 'd'`)
	f.Add(`"`)
	f.Fuzz(func(t *testing.T, line string) {
		if got := len(strings.Join(words(line), "")); got > len(strings.ToValidUTF8(line, "\uFFFD\uFFFD\uFFFD")) {
			t.Errorf("%q: more than there was", line)
		}
	})
}

func TestTerminate(t *testing.T) {
	cmd := exec.Command("sleep", "100")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = cmd.Wait() }() // its end by a signal is what is wanted
	if err := terminate(t.Context(), cmd.Process.Pid); err != nil {
		t.Error(err)
	}
	if err := terminate(t.Context(), cmd.Process.Pid); err != nil {
		t.Errorf("a process that is gone: %v", err)
	}
}
