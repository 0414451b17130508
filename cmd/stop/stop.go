// SPDX-License-Identifier: Apache-2.0

// Package stop is the command `kedge stop`.
package stop

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/service"
	"github.com/kedge-io/kedge/pkg/uninstall"
)

// Command stops Kedge on this machine, with its pods if asked for.
func Command() *cli.Command {
	return &cli.Command{
		Name:  "stop",
		Usage: "stop Kedge on this machine, and with --pods its pods",
		Description: "Without --pods they keep running, and the next start takes them over. With it they end as when the machine is shut down: preStop\n" +
			"hooks, SIGTERM, the time that each asks for, ordinary pods before critical ones; the next start starts them again. It works when\n" +
			"Kedge is stopped already, too.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "pods", Usage: "end all pods of this machine"},
			&cli.DurationFlag{Name: "timeout", Usage: "with --pods: kill what has not ended after `DURATION`", DefaultText: "shutdown-grace-period and shutdown-grace-period-critical"},
			&cli.BoolFlag{Name: "alone", Usage: "with --pods: only if Kedge does not run", Hidden: true}, // of agent.PodsUnit
			&cli.StringFlag{Name: "run-dir", Usage: "`DIR` of Kedge's sockets", Hidden: true},
		},
		Action: action,
	}
}

func action(c *cli.Context) error {
	if c.Args().Present() {
		return fmt.Errorf("unexpected argument %q: only flags are accepted", c.Args().First())
	}
	timeout := c.Duration("timeout")
	if timeout < 0 || c.IsSet("timeout") && timeout < time.Second {
		return errors.New("--timeout: at least a second")
	}
	if os.Geteuid() != 0 {
		return errors.New("only root can do that: run it with sudo")
	}
	var flags []string
	if dir := c.String("run-dir"); dir != "" {
		flags = []string{"--run-dir", dir}
	}
	places, err := uninstall.Locate(flags)
	if places.Config == nil {
		return err
	}
	if err != nil {
		fmt.Fprintln(c.App.ErrWriter, "kedge: some settings of this installation were not understood:", err)
	}
	if c.Bool("alone") {
		return uninstall.StopPodsAlone(c.Context, places, timeout, c.App.Writer)
	}
	pid := 0
	st, err := agent.GetStatus(c.Context, places.RunDir)
	if err == nil {
		pid = st.PID
	} else if !errors.Is(err, agent.ErrNotRunning) {
		return err
	}
	if !c.Bool("pods") {
		if err := service.Stop(c.Context, pid); err != nil {
			return err
		}
		_, err := fmt.Fprintln(c.App.Writer, "Kedge is stopped; pods keep running")
		return err
	}
	return uninstall.StopPods(c.Context, places, st, timeout, c.App.Writer)
}
