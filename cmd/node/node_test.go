// SPDX-License-Identifier: Apache-2.0

package node

import (
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

// Flags are taken before and behind the name.
func TestInterspersed(t *testing.T) {
	for line, want := range map[string]string{
		"n1":                                   "[n1] drain=false timeout=5m0s",
		"--drain n1":                           "[n1] drain=true timeout=5m0s",
		"n1 --drain":                           "[n1] drain=true timeout=5m0s",
		"--drain n1 --drain-timeout 1m":        "[n1] drain=true timeout=1m0s",
		"n1 --drain=false --drain-timeout=90s": "[n1] drain=false timeout=1m30s",
		"n1 n2 --drain":                        "[n1 n2] drain=true timeout=5m0s",
		"n1 --nope":                            "flag provided but not defined: -nope",
	} {
		remove := remove().Subcommands[0]
		var got string
		remove.Action = func(c *cli.Context) error {
			args, err := interspersed(c)
			if err != nil {
				got = err.Error()
				return nil
			}
			got = "[" + strings.Join(args, " ") + "] drain=" + map[bool]string{true: "true", false: "false"}[c.Bool("drain")] +
				" timeout=" + c.Duration("drain-timeout").String()
			return nil
		}
		app := &cli.App{Name: "kedge", Commands: []*cli.Command{remove}}
		if err := app.Run(slices.Concat([]string{"kedge", "remove"}, strings.Fields(line))); err != nil || got != want {
			t.Errorf("%s: got %q, %v, want %q", line, got, err, want)
		}
	}
}
