// SPDX-License-Identifier: Apache-2.0

// Package check is the subcommand `kedge check`.
package check

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/check"
	"github.com/kedge-io/kedge/pkg/check/cis"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/server"
)

// Command gives `kedge check`. It takes the configuration of `kedge server` and ends with status 1 when a probe
// failed; warnings leave it at 0.
func Command() *cli.Command {
	own := []cli.Flag{
		output.Flag(""),
		&cli.BoolFlag{Name: "agent", Usage: "the machine is to carry no control plane"},
		&cli.StringFlag{Name: "profile", Value: "machine", Usage: "`WHAT` to look at: machine, or cis: the Kedge that runs here, by the CIS Kubernetes Benchmark"},
	}
	return &cli.Command{
		Name:  "check",
		Usage: "probe whether this machine can run Kedge",
		Description: "Probes the machine and shows for everything that is wrong what was found and what to type.\n" +
			"It goes by the configuration of `kedge server` and takes the same flags. Nothing is changed.\n" +
			"With --profile cis it reports every item of the CIS Kubernetes Benchmark about the Kedge that runs on this machine.\n" +
			"Exit status: 1 when something failed, 0 otherwise, also with warnings.",
		Flags:  append(own, config.Flags(config.RoleServer)...),
		Action: run,
	}
}

func run(c *cli.Context) error {
	if c.Args().Present() {
		return fmt.Errorf("unexpected argument %q: only flags are accepted", c.Args().First())
	}
	switch profile := c.String("profile"); profile {
	case "cis":
		return runCIS(c)
	case "machine":
	default:
		return fmt.Errorf("--profile %q is unknown; accepted: machine, cis", profile)
	}
	var o check.Options
	load := config.LoadToCheck
	if c.Bool("agent") { // which joins
		load = func(c *cli.Context, role config.Role) (*config.Config, []error, error) {
			cfg, err := config.Load(c, role)
			return cfg, nil, err
		}
	}
	if cfg, later, err := load(c, config.RoleServer); err != nil {
		o.ConfigErr = err
		o.DataDir = c.String("data-dir") // empty if it was not given
	} else {
		o = server.CheckOptions(cfg)
		o.ConfigLater = errors.Join(later...)
	}
	o.ExpectRunning = true
	if c.Bool("agent") {
		o.Agent = true
		o.Ports = nil
	}
	report := check.Run(c.Context, o)
	text := func(w io.Writer) error { return report.WriteText(w, textOptions(c)) }
	if err := output.Write(c.App.Writer, c.String("output"), report, text); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	if report.Failed() {
		return cli.Exit("", 1)
	}
	return nil
}

// runCIS looks at what runs, wherever the configuration of this machine puts it.
func runCIS(c *cli.Context) error {
	o := cis.Options{RunDir: config.DefaultRunDir, Kubeconfig: config.DefaultKubeconfig}
	if cfg, err := config.Load(c, config.RoleServer); err == nil {
		o.RunDir, o.Kubeconfig = cfg.RunDir, cfg.WriteKubeconfig
	}
	report, err := cis.Run(c.Context, o)
	if err != nil {
		return err
	}
	if err := output.Write(c.App.Writer, c.String("output"), report, report.WriteText); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	if report.Failed() {
		return cli.Exit("", 1)
	}
	return nil
}

// textOptions: colours and the width of the window on a terminal, plain text elsewhere (and with NO_COLOR set, see
// https://no-color.org).
func textOptions(c *cli.Context) check.TextOptions {
	out, ok := c.App.Writer.(*os.File)
	if !ok || !term.IsTerminal(int(out.Fd())) {
		return check.TextOptions{}
	}
	o := check.TextOptions{Color: os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
	if width, _, err := term.GetSize(int(out.Fd())); err == nil {
		o.Width = min(width, 140)
	}
	return o
}
