// SPDX-License-Identifier: Apache-2.0

package check

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kedge-io/kedge/pkg/check"
)

// runCheck runs `kedge check` with these arguments and a configuration file that does not exist.
func runCheck(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	app := &cli.App{Name: "kedge", Writer: &out, ErrWriter: io.Discard, Commands: []*cli.Command{Command()},
		ExitErrHandler: func(*cli.Context, error) {}} // keep the test from ending
	err := app.RunContext(t.Context(), append([]string{"kedge", "check", "--data-dir", t.TempDir()}, args...))
	return out.String(), err
}

func TestOutputAndExitStatus(t *testing.T) {
	for name, args := range map[string][]string{
		"as it is": {},
		"failing":  {"--node-name", "Not_A_Name"},
		"agent":    {"--agent"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := runCheck(t, append(args, "-o", "json")...)
			var report check.Report
			if err := json.Unmarshal([]byte(out), &report); err != nil {
				t.Fatalf("no JSON: %v\n%s", err, out)
			}
			var exit cli.ExitCoder
			if failed := errors.As(err, &exit) && exit.ExitCode() == 1; failed != report.Failed() {
				t.Errorf("error %v with a report of status %s", err, report.Status)
			}
			if name == "failing" && !report.Failed() {
				t.Error("a bad configuration does not fail")
			}
			if hasAPI := strings.Contains(out, "6443/tcp"); hasAPI == (name == "agent") {
				t.Errorf("port of the API in the report: %t", hasAPI)
			}
		})
	}
	out, _ := runCheck(t) // whether it fails depends on the machine
	if !strings.Contains(out, "\nResult: ") || strings.Contains(out, "\x1b") {
		t.Errorf("not a plain text report:\n%s", out)
	}
}

// A first server's token may come later, that of a machine that joins may not; and nothing is changed.
func TestTokenFile(t *testing.T) {
	dir := t.TempDir()
	then := time.Now().Add(-time.Hour).Truncate(time.Second)
	if err := os.Chtimes(dir, then, then); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		want check.Status
		args []string
	}{
		{check.Warning, nil}, {check.Fail, []string{"--agent"}}, {check.Fail, []string{"--server", "https://192.0.2.1:6443"}},
	} {
		out, _ := runCheck(t, append(c.args, "--data-dir", filepath.Join(dir, "kedge"), "--token-file", "/nowhere/token", "-o", "json")...) // the rest depends on the machine
		var report check.Report
		if err := json.Unmarshal([]byte(out), &report); err != nil {
			t.Fatal(err)
		}
		probes := report.Groups[0].Probes
		i := slices.IndexFunc(probes, func(p check.ProbeReport) bool { return p.Name == "configuration" })
		if p := probes[i]; p.Status != c.want || !strings.Contains(p.Finding, "/nowhere/token") {
			t.Errorf("%s: %+v", c.args, p)
		}
	}
	if st, err := os.Stat(dir); err != nil || !st.ModTime().Equal(then) {
		t.Errorf("%v, %s; the directory was changed at %s", err, st.ModTime(), then)
	}
}

func TestRefusedArguments(t *testing.T) {
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"-o", "yaml"}, `unknown output format "yaml": text or json`},
		{[]string{"disk"}, `unexpected argument "disk"`},
	} {
		if out, err := runCheck(t, test.args...); err == nil || !strings.Contains(err.Error(), test.want) || out != "" {
			t.Errorf("%q: error %v, output %q; want %s", test.args, err, out, test.want)
		}
	}
}
