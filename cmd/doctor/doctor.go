// SPDX-License-Identifier: Apache-2.0

// Package doctor is the command `kedge doctor`.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/doctor"
)

// Exit statuses.
const (
	exitProblems = 3
	exitWarnings = 4
)

// Command finds out what is wrong with the cluster.
func Command() *cli.Command {
	return &cli.Command{
		Name:  "doctor",
		Usage: "find out what is wrong with this machine and its cluster, and what to do about it",
		Description: "Asks all nodes, through the API and the connections that nodes keep open to servers: versions, clocks, certificates, disks, datastore, the ways\n" +
			"between all nodes, MTU, DNS, services, conntrack, and pods that cannot start. It changes nothing. On a machine without an administrator's\n" +
			"kubeconfig, and while the API is down, only this machine is looked at.\n\n" +
			"Exit status: 0 nothing found, 3 problems, 4 warnings only, 1 it could not look.",
		Flags: []cli.Flag{
			output.Flag(""),
			&cli.StringFlag{Name: "bundle", Usage: "write all that was found out, and the logs, without secrets, into `FILE` (tar.zst) for those who help"},
			&cli.BoolFlag{Name: "local", Usage: "look at this machine only"},
			&cli.StringFlag{Name: "kubeconfig", Value: config.DefaultKubeconfig, Usage: "an administrator's kubeconfig, `FILE`"},
			&cli.StringFlag{Name: "run-dir", Usage: "`DIR` of Kedge's sockets", Value: agent.DefaultRunDir, Hidden: true},
		},
		Action: run,
	}
}

func run(c *cli.Context) error {
	if c.Args().Present() {
		return fmt.Errorf("unexpected argument %q: only flags are accepted; all nodes are looked at", c.Args().First())
	}
	facts, err := collect(c)
	if err != nil {
		return err
	}
	findings := doctor.Judge(facts)
	if file := c.String("bundle"); file != "" {
		if err := writeBundle(file, doctor.Bundle{Facts: facts, Findings: findings}); err != nil {
			return err
		}
		fmt.Fprintf(c.App.ErrWriter, "%s has been written. Look through it before you hand it on.\n", file)
	}
	all := map[string]any{"findings": findings, "nodes": facts.Reports, "silent": facts.Silent, "skew": facts.Skew}
	if err := output.Write(c.App.Writer, c.String("output"), all, func(w io.Writer) error { return write(w, facts, findings) }); err != nil {
		return err
	}
	switch {
	case len(findings) == 0:
		return nil
	case findings[0].Level == doctor.Problem:
		return cli.Exit("", exitProblems)
	}
	return cli.Exit("", exitWarnings)
}

// collect asks the cluster; if that cannot be, this machine alone.
func collect(c *cli.Context) (doctor.Facts, error) {
	kubeconfig, runDir := c.String("kubeconfig"), c.String("run-dir")
	log := c.String("bundle") != ""
	self, err := agent.GetStatus(c.Context, runDir)
	if err != nil && !errors.Is(err, agent.ErrNotRunning) {
		return doctor.Facts{}, err
	}
	running := err == nil
	reason := ""
	if _, err := os.Stat(kubeconfig); err == nil && !c.Bool("local") {
		facts, err := collectAll(c.Context, kubeconfig, runDir, self, log)
		if err == nil {
			if !running {
				facts.Silent["this machine"] = agent.ErrNotRunning.Error()
			}
			return facts, nil
		}
		reason = err.Error()
	} else if err != nil && !c.Bool("local") {
		fmt.Fprintln(c.App.ErrWriter, "There is no administrator's kubeconfig here: only this machine is looked at. For the whole cluster run this on a server.")
	}
	if !running {
		return doctor.Facts{}, fmt.Errorf("%w; before a start, `kedge check` tells whether the machine is fit", agent.ErrNotRunning)
	}
	report, err := agent.Examine(c.Context, runDir, "", "", doctor.Question{Log: log})
	if err != nil {
		return doctor.Facts{}, err
	}
	return doctor.Facts{Now: time.Now(), APIError: reason, Reports: map[string]*doctor.NodeReport{report.Node: report}}, nil
}

func collectAll(ctx context.Context, kubeconfig, runDir string, self *agent.Status, log bool) (doctor.Facts, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return doctor.Facts{}, err
	}
	config.Timeout = 15 * time.Second
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return doctor.Facts{}, err
	}
	name := ""
	if self != nil {
		name = self.Node
	}
	return doctor.Collect(ctx, client, name, func(ctx context.Context, node string, q doctor.Question) (*doctor.NodeReport, error) {
		if node == name { // its own socket works when the tunnel does not
			node = ""
		}
		return agent.Examine(ctx, runDir, kubeconfig, node, q)
	}, log)
}

func write(out io.Writer, facts doctor.Facts, findings []doctor.Finding) error {
	ways := 0
	for _, r := range facts.Reports {
		ways += len(r.Ways)
	}
	fmt.Fprintf(out, "%d of %d nodes answered; %d ways between them, %d pods looked at\n", len(facts.Reports), len(facts.Reports)+len(facts.Silent), ways, len(facts.Pods))
	if len(findings) == 0 {
		_, err := fmt.Fprintln(out, "Nothing is wrong.")
		return err
	}
	for _, f := range findings {
		fmt.Fprintf(out, "\n%s  %s  %s\n    %s\n", strings.ToUpper(string(f.Level)), f.About, f.Check, strings.ReplaceAll(f.Text, "\n", "\n    "))
		for line := range strings.Lines(f.Remedy) {
			fmt.Fprintf(out, "    -> %s\n", strings.TrimRight(line, "\n"))
		}
	}
	return nil
}

// writeBundle writes for root only: logs tell more than one thinks.
func writeBundle(file string, b doctor.Bundle) (err error) {
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	if err := errors.Join(b.Write(f), f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return os.Rename(f.Name(), file)
}
