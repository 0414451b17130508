// SPDX-License-Identifier: Apache-2.0

// Package server is the command `kedge server`.
package server

import (
	"github.com/urfave/cli/v2"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/server"
)

// Command runs a server until SIGTERM or SIGINT.
func Command() *cli.Command {
	return &cli.Command{
		Name:  "server",
		Usage: "run a server: control plane and node",
		Description: "Without --server it makes a cluster; with --server and --token it joins one. Either happens once: later starts go on as they were.\n" +
			"Options come from /etc/kedge/config.yaml, then /etc/kedge/config.yaml.d/*.yaml, then KEDGE_* variables, then flags.\n" +
			"Keys of the files are the names of the flags.",
		Flags:        config.Flags(config.RoleServer),
		OnUsageError: config.UsageError,
		Action: func(c *cli.Context) error {
			cfg, err := config.Load(c, config.RoleServer)
			if err != nil {
				return err
			}
			return server.Run(c.Context, cfg)
		},
	}
}
