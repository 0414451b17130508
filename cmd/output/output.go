// SPDX-License-Identifier: Apache-2.0

// Package output is what the commands have in common that print text for people and JSON for programs.
package output

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"
)

// Flag is --output, whose value is "text" or "json"; another one is refused before the command does anything. prefix begins its usage,
// for instance with what it is the format of.
func Flag(prefix string) cli.Flag {
	return &cli.StringFlag{
		Name: "output", Aliases: []string{"o"}, Value: "text", Usage: prefix + "`FORMAT`: text or json",
		Action: func(_ *cli.Context, format string) error {
			if format != "text" && format != "json" {
				return fmt.Errorf("unknown output format %q: text or json", format)
			}
			return nil
		},
	}
}

// Write writes a command's result in a format of the flag: v as JSON, indented so that people can read it as well, or what text writes.
func Write(w io.Writer, format string, v any, text func(io.Writer) error) error {
	if format != "json" {
		return text(w)
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}
