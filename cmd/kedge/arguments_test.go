// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

func TestFlagsFirst(t *testing.T) {
	app := &cli.App{Name: "kedge", Commands: []*cli.Command{
		{Name: "node", Subcommands: []*cli.Command{{Name: "remove", Flags: []cli.Flag{
			&cli.BoolFlag{Name: "drain", Aliases: []string{"d"}}, &cli.StringFlag{Name: "output", Aliases: []string{"o"}},
		}}}},
		{Name: "kubectl", SkipFlagParsing: true},
	}}
	for line, want := range map[string]string{
		"":                             "",
		"--help":                       "--help",
		"node":                         "node",
		"node --help":                  "node --help",
		"node remove n1":               "node remove -- n1",
		"node remove --drain n1":       "node remove --drain -- n1",
		"node remove n1 --drain":       "node remove --drain -- n1",
		"node remove n1 -d -o json n2": "node remove -d -o json -- n1 n2",
		"node remove n1 --output=json": "node remove --output=json -- n1",
		"node remove - --drain":        "node remove --drain -- -",
		"node remove n1 -- --drain":    "node remove -- n1 --drain",
		"node remove n1 --nope":        "node remove --nope -- n1",
		"node remove n1 -o":            "node remove -o -- n1",
		"node remove remove -d":        "node remove -d -- remove",
		"kubectl get pods -A":          "kubectl get pods -A",
		"node remove n --generate-bash-completion": "node remove n --generate-bash-completion",
	} {
		got := flagsFirst(app, slices.Concat([]string{"kedge"}, strings.Fields(line)))
		if got := strings.Join(got[1:], " "); got != want {
			t.Errorf("%s: got %q, want %q", line, got, want)
		}
	}
}
