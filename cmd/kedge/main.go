// SPDX-License-Identifier: Apache-2.0

// Kedge is a Kubernetes distribution in one binary. This file decides what a process is: a child of the supervisor (kedge
// [etcd] and the like), one of the tools under its own name (kubectl, ctr), or a command line.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/kedge-io/kedge/cmd/agent"
	"github.com/kedge-io/kedge/cmd/certificate"
	"github.com/kedge-io/kedge/cmd/check"
	"github.com/kedge-io/kedge/cmd/doctor"
	"github.com/kedge-io/kedge/cmd/images"
	"github.com/kedge-io/kedge/cmd/manifests"
	"github.com/kedge-io/kedge/cmd/netpol"
	nodecmd "github.com/kedge-io/kedge/cmd/node"
	"github.com/kedge-io/kedge/cmd/secretsencrypt"
	"github.com/kedge-io/kedge/cmd/server"
	"github.com/kedge-io/kedge/cmd/snapshot"
	"github.com/kedge-io/kedge/cmd/status"
	"github.com/kedge-io/kedge/cmd/stop"
	"github.com/kedge-io/kedge/cmd/token"
	"github.com/kedge-io/kedge/cmd/tools"
	_ "github.com/kedge-io/kedge/cmd/tools/translations" // before kubectl is initialised
	"github.com/kedge-io/kedge/cmd/uninstall"
	upgradecmd "github.com/kedge-io/kedge/cmd/upgrade"
	machine "github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/controlplane"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/helm"
	"github.com/kedge-io/kedge/pkg/helm/release"
	"github.com/kedge-io/kedge/pkg/logging"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/supervise"
	"github.com/kedge-io/kedge/pkg/upgrade"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	err := run(ctx, os.Args)
	if errors.Is(err, machine.ErrRestart) {
		// In place: for the service manager, it is the same process.
		err = syscall.Exec("/proc/self/exe", os.Args, os.Environ())
	}
	if err != nil {
		var exit cli.ExitCoder
		if errors.As(err, &exit) {
			if text := exit.Error(); text != "" {
				fmt.Fprintln(os.Stderr, text)
			}
			os.Exit(exit.ExitCode())
		}
		// Not all libraries wrap it. What has several lines says itself what to do.
		if text := err.Error(); os.Geteuid() != 0 && !strings.Contains(text, "\n") && (errors.Is(err, fs.ErrPermission) || strings.Contains(text, "permission denied")) {
			err = fmt.Errorf("%w: only root can do that: run it with sudo", err)
		}
		fmt.Fprintln(os.Stderr, "kedge:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if name, ok := supervise.ChildName(args[0]); ok {
		return runChild(ctx, name, args[1:])
	}
	switch filepath.Base(args[0]) {
	case "kubectl":
		return tools.Kubectl(ctx, args[1:])
	case "ctr":
		return tools.Ctr(ctx, args[1:])
	}
	app := &cli.App{
		Name:  "kedge",
		Usage: "Kubernetes in one binary, for edge machines and home labs",
		Commands: slices.Concat([]*cli.Command{
			server.Command(),
			agent.Command(),
			token.Command(),
		}, nodecmd.Commands(), []*cli.Command{
			status.Command(),
			certificate.Command(),
			doctor.Command(),
			images.Command(),
			manifests.Command(),
			netpol.Command(),
			check.Command(),
			secretsencrypt.Command(),
			snapshot.Command(),
			stop.Command(),
			uninstall.Command(),
			upgradecmd.Command(),
		}, tools.Commands()),
		Suggest:                true,
		HideVersion:            true,
		EnableBashCompletion:   true,
		UseShortOptionHandling: false,
		ExitErrHandler:         func(*cli.Context, error) {}, // main does
		CommandNotFound: func(c *cli.Context, name string) {
			fmt.Fprintf(c.App.ErrWriter, "kedge: unknown command %q; see `kedge help`\n", name)
			os.Exit(2)
		},
	}
	return app.RunContext(ctx, flagsFirst(app, args))
}

// runChild is what the supervisor starts.
func runChild(ctx context.Context, name string, args []string) error {
	switch name {
	case "etcd":
		return child(ctx, args, func(c datastore.Config) logging.Config { return c.Logging }, datastore.Run)
	case "controlplane":
		return child(ctx, args, func(c controlplane.Config) logging.Config { return c.Logging }, controlplane.Run)
	case "containerd":
		return child(ctx, args, func(c node.ContainerdConfig) logging.Config { return c.Logging }, node.RunContainerd)
	case upgrade.GuardianName:
		return upgrade.Guard(ctx, args, logging.New(logging.Config{}))
	case "helm":
		return helm.Serve(ctx, release.Do)
	case "node":
		return child(ctx, args, func(c node.Config) logging.Config { return c.Logging }, node.Run)
	}
	return fmt.Errorf("there is no process %q", name)
}

func child[C any](ctx context.Context, args []string, logConfig func(C) logging.Config, run func(context.Context, C, *supervise.Child, *slog.Logger) error) error {
	var cfg C
	c, err := supervise.NewChild(args, &cfg)
	if err != nil {
		return err
	}
	name, _ := supervise.ChildName(os.Args[0])
	// It was started through /proc/self/exe, and that is what top would call it.
	if err := os.WriteFile("/proc/self/comm", []byte("kedge-"+name), 0); err != nil {
		return err
	}
	supervise.SettleMemory()
	log, err := logging.Child(logConfig(cfg), name)
	if err != nil {
		return err
	}
	err = run(ctx, cfg, c, log)
	if err != nil {
		c.End(err)
	}
	return err
}
