// SPDX-License-Identifier: Apache-2.0

package check

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"

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
