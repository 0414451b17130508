// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/drain"
)

func leave() *cli.Command {
	return &cli.Command{
		Name:  "leave",
		Usage: "take this machine out of its cluster and stop Kedge here",
		Description: "The cluster forgets the machine first: a server's datastore member, the Node. Then the pods and Kedge stop, and what made the\n" +
			"machine part of the cluster is removed from its disk; images and logs stay. Kedge has to run, and the cluster to answer; otherwise\n" +
			"run `kedge node remove` on a server.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "drain", Usage: "move this node's pods elsewhere first (on a server)"},
			&cli.DurationFlag{Name: "drain-timeout", Value: 5 * time.Minute, Usage: "give up draining after `DURATION`"},
			&cli.BoolFlag{Name: "force", Usage: "leave even if the datastore loses its majority"},
			&cli.StringFlag{Name: "kubeconfig", Value: config.DefaultKubeconfig, Usage: "an administrator's kubeconfig, `FILE`, for --drain"},
			&cli.StringFlag{Name: "run-dir", Usage: "`DIR` of Kedge's sockets", Value: agent.DefaultRunDir, Hidden: true},
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("unexpected argument %q: only flags are accepted", c.Args().First())
			}
			st, err := agent.GetStatus(c.Context, c.String("run-dir"))
			if err != nil {
				return err
			}
			if c.Bool("drain") {
				if st.Role == config.RoleAgent && !c.IsSet("kubeconfig") {
					return errors.New("an agent may not move pods: run `kedge node remove --drain " + st.Node + "` on a server, then `kedge leave` here, or give --kubeconfig")
				}
				config, err := clientcmd.BuildConfigFromFlags("", c.String("kubeconfig"))
				if err != nil {
					return err
				}
				client, err := kubernetes.NewForConfig(config)
				if err != nil {
					return err
				}
				if err := drain.Node(c.Context, client, st.Node, c.Duration("drain-timeout"), c.App.Writer); err != nil {
					return fmt.Errorf("drain: %w; the node is cordoned but still part of the cluster", err)
				}
			}
			return agent.Leave(c.Context, c.String("run-dir"), c.Bool("force"), c.App.Writer)
		},
	}
}
