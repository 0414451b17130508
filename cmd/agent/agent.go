// SPDX-License-Identifier: Apache-2.0

// Package agent is the command `kedge agent`.
package agent

import (
	"github.com/urfave/cli/v2"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/config"
)

// Command runs an agent until SIGTERM or SIGINT.
func Command() *cli.Command {
	return &cli.Command{
		Name:  "agent",
		Usage: "run a node without control plane, in the cluster of --server",
		Description: "With --server and --token it joins the cluster; once it is part of it, neither is needed any more.\n" +
			"Options come from /etc/kedge/config.yaml, then /etc/kedge/config.yaml.d/*.yaml, then KEDGE_* variables, then flags.\n" +
			"Keys of the files are the names of the flags.",
		Flags:        config.Flags(config.RoleAgent),
		OnUsageError: config.UsageError,
		Action: func(c *cli.Context) error {
			cfg, err := config.Load(c, config.RoleAgent)
			if err != nil {
				return err
			}
			return agent.Run(c.Context, cfg)
		},
	}
}
