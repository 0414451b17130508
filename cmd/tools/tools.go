// SPDX-License-Identifier: Apache-2.0

// Package tools holds the commands that come with Kedge but are not its own (kubectl, ctr), and version and completion.
package tools

import (
	"fmt"

	containerdversion "github.com/containerd/containerd/v2/version"
	"github.com/urfave/cli/v2"
	k8sversion "k8s.io/component-base/version"

	"github.com/kedge-io/kedge/pkg/version"
)

// Commands lists the sub-commands.
func Commands() []*cli.Command {
	return []*cli.Command{
		{
			Name: "kubectl", Usage: "run kubectl against this cluster", SkipFlagParsing: true, HideHelp: true,
			Action: func(c *cli.Context) error { return Kubectl(c.Context, c.Args().Slice()) },
		},
		{
			Name: "ctr", Usage: "run containerd's ctr against this node", SkipFlagParsing: true, HideHelp: true,
			Action: func(c *cli.Context) error { return Ctr(c.Context, c.Args().Slice()) },
		},
		{
			Name: "completion", Usage: "print a completion script for kedge, kubectl and an alias k", ArgsUsage: "bash|zsh|fish",
			Action: func(c *cli.Context) error { return completion(c.App.Writer, c.Args().First()) },
		},
		{
			Name: "version", Usage: "print the versions of Kedge and of what is in it",
			Action: func(c *cli.Context) error {
				_, err := fmt.Fprintf(c.App.Writer, "kedge %s %s\nkubernetes %s\ncontainerd %s\ngo %s\n",
					version.Version, version.Commit, k8sversion.Get().GitVersion, containerdversion.Version, k8sversion.Get().GoVersion)
				return err
			},
		},
	}
}
