// SPDX-License-Identifier: Apache-2.0

// Package node has the commands that take a machine out of a cluster: `kedge node remove`, from another machine, and `kedge leave`.
package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/urfave/cli/v2"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/drain"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/join/authority"
)

// Commands of this package.
func Commands() []*cli.Command { return []*cli.Command{remove(), leave()} }

func remove() *cli.Command {
	return &cli.Command{
		Name:  "node",
		Usage: "remove a machine from the cluster",
		Subcommands: []*cli.Command{{
			Name: "remove", Usage: "take a node or server out of the cluster", ArgsUsage: "NAME",
			Description: "Removes the server's datastore member, the Node, and what else the cluster knows of the machine. It says first what it is\n" +
				"going to do, and refuses what would cost the datastore its majority. A machine that still runs stops being part of the cluster;\n" +
				"what is on its disk stays. On the machine itself `kedge leave` does the same and cleans up.",
			Flags: []cli.Flag{
				&cli.BoolFlag{Name: "drain", Usage: "move the node's pods elsewhere first"},
				&cli.DurationFlag{Name: "drain-timeout", Value: 5 * time.Minute, Usage: "give up draining after `DURATION`"},
				&cli.BoolFlag{Name: "force", Usage: "remove a server even if the datastore loses its majority"},
				&cli.BoolFlag{Name: "dry-run", Usage: "only say what would be done"},
				&cli.StringFlag{Name: "kubeconfig", Value: config.DefaultKubeconfig, Usage: "an administrator's kubeconfig, `FILE`"},
			},
			Action: func(c *cli.Context) error {
				if c.NArg() != 1 {
					return errors.New("usage: kedge node remove [flags] NAME")
				}
				r, err := remover(c.String("kubeconfig"))
				if err != nil {
					return err
				}
				return removal{r, c.App.Writer, c.Bool("drain"), c.Duration("drain-timeout"), c.Bool("force"), c.Bool("dry-run")}.run(c.Context, c.Args().First())
			},
		}},
	}
}

func remover(kubeconfig string) (*authority.Remover, error) {
	if _, err := os.Stat(kubeconfig); err != nil {
		return nil, fmt.Errorf("an administrator's kubeconfig is needed: run this on a server, or give --kubeconfig: %w", err)
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	config.Timeout = 30 * time.Second
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	api, err := join.NewAPI(config)
	return &authority.Remover{Client: client, API: api}, err
}

type removal struct {
	*authority.Remover
	out            io.Writer
	drain          bool
	timeout        time.Duration
	force, dryOnly bool
}

func (r removal) run(ctx context.Context, name string) error {
	plan, err := r.Plan(ctx, name)
	if err != nil {
		return err
	}
	fmt.Fprintln(r.out, plan)
	if r.dryOnly {
		return nil
	}
	if plan.BreaksQuorum() && !r.force {
		return fmt.Errorf("nothing was done: without %s the datastore would have no majority; bring the others back first, or use --force", name)
	}
	if r.drain && plan.Node {
		if err := drain.Node(ctx, r.Client, name, r.timeout, r.out); err != nil {
			return fmt.Errorf("drain %s: %w; the node is cordoned but not removed: try again, or remove it without --drain", name, err)
		}
	}
	if err := r.Remove(ctx, name, r.force); apierrors.IsConflict(err) {
		return fmt.Errorf("nothing was done: %w; --force removes it all the same", err)
	} else if err != nil {
		return err
	}
	_, err = fmt.Fprintf(r.out, "%s has been removed. If it is to come back, start Kedge there with a valid token.\n", name)
	return err
}
