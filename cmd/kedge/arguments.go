// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// flagsFirst puts the flags of a command before its arguments: people type `kedge node remove NAME --force`, and the library takes what follows
// the first argument for arguments. What follows -- stays where it is. args begins with the program's name.
func flagsFirst(app *cli.App, args []string) []string {
	commands, at := app.Commands, 1
	var command *cli.Command
	for ; at < len(args); at++ {
		i := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(args[at]) })
		if i < 0 {
			break
		}
		command = commands[i]
		commands = command.Subcommands
	}
	completion := args[len(args)-1] == "--generate-bash-completion"
	if command == nil || command.SkipFlagParsing || len(command.Subcommands) > 0 || completion {
		return args
	}
	head := args[:at]
	var flags, rest []string
	for ; at < len(args); at++ {
		name := strings.TrimLeft(args[at], "-")
		switch {
		case args[at] == "--":
			return slices.Concat(head, flags, []string{"--"}, rest, args[at+1:])
		case name == args[at] || name == "": // an argument, or standard input
			rest = append(rest, args[at])
		default:
			flags = append(flags, args[at])
			if takesValue(command, name) && at+1 < len(args) {
				at++
				flags = append(flags, args[at])
			}
		}
	}
	if len(rest) > 0 {
		flags = append(flags, "--")
	}
	return slices.Concat(head, flags, rest)
}

// takesValue says whether the word after a flag belongs to it.
func takesValue(command *cli.Command, flag string) bool {
	if strings.Contains(flag, "=") {
		return false
	}
	for _, f := range command.Flags {
		if slices.Contains(f.Names(), flag) {
			_, isBool := f.(*cli.BoolFlag)
			return !isBool
		}
	}
	return false
}
