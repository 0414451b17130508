// SPDX-License-Identifier: Apache-2.0

// Package manifests is the command `kedge manifests`.
package manifests

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/deploy"
)

// Command shows what became of the files in the manifests directories. It exits with 0 when all are applied, and with 3 when one is not.
func Command() *cli.Command {
	return &cli.Command{
		Name:      "manifests",
		Usage:     "show what became of the files in " + deploy.Dir(config.DefaultDataDir),
		ArgsUsage: "[FILE...]",
		Description: "One line per file: its revision, whether its objects are applied, and what is wrong with them. The files are the same on all\n" +
			"servers. Exits with 3 when something is not applied.",
		Flags: []cli.Flag{
			output.Flag(""),
			&cli.BoolFlag{Name: "all", Aliases: []string{"a"}, Usage: "also the files that were removed"},
			&cli.StringFlag{Name: "kubeconfig", Value: config.DefaultKubeconfig, Usage: "an administrator's kubeconfig, `FILE`"},
		},
		Action: func(c *cli.Context) error {
			if _, err := os.Stat(c.String("kubeconfig")); err != nil {
				return fmt.Errorf("%w: the files are asked about on a server of the cluster, after its first start; elsewhere give an administrator's kubeconfig with --kubeconfig", err)
			}
			rest, err := clientcmd.BuildConfigFromFlags("", c.String("kubeconfig"))
			if err != nil {
				return fmt.Errorf("kubeconfig: %w", err)
			}
			client, err := kubernetes.NewForConfig(rest)
			if err != nil {
				return err
			}
			all, listErr := deploy.List(c.Context, client)
			list, err := choose(all, c.Args().Slice(), c.Bool("all"))
			if err := errors.Join(listErr, err); err != nil {
				return err
			}
			err = output.Write(c.App.Writer, c.String("output"), list, func(w io.Writer) error { return write(w, list, time.Now()) })
			if err == nil && slices.ContainsFunc(list, func(f deploy.FileStatus) bool { return f.State != deploy.Applied && f.State != deploy.Removed }) {
				return cli.Exit("", 3)
			}
			return err
		},
	}
}

// choose gives the files that were asked for; without names, those that are there or still have objects.
func choose(all []deploy.FileStatus, names []string, removed bool) ([]deploy.FileStatus, error) {
	list := []deploy.FileStatus{}
	for _, f := range all {
		if len(names) == 0 && (removed || f.State != deploy.Removed || len(f.Remarks) > 0) || slices.Contains(names, f.File) {
			list = append(list, f)
		}
	}
	for _, name := range names {
		if strings.HasPrefix(name, "-") {
			return nil, fmt.Errorf("%s stands behind an argument: flags come first", name)
		}
		if !slices.ContainsFunc(all, func(f deploy.FileStatus) bool { return f.File == name }) {
			return nil, fmt.Errorf("the cluster knows no file %s; names are without a directory, and end in .yaml, .yml or .json", name)
		}
	}
	return list, nil
}

func write(out io.Writer, list []deploy.FileStatus, now time.Time) error {
	if len(list) == 0 {
		_, err := fmt.Fprintf(out, "There are no manifests: put files into %s on a server.\n", deploy.Dir(config.DefaultDataDir))
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "FILE\tREVISION\tSTATE\tOBJECTS\tCHANGED\tON")
	for _, f := range list {
		state := string(f.State)
		if f.Removed && f.State != deploy.Removed {
			state = "removing, " + state
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%d\t%s ago\t%s\n", f.File, f.Revision, state, f.Objects, duration.HumanDuration(now.Sub(f.ChangedAt)), f.ChangedBy)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, f := range list {
		if len(f.Problems)+len(f.Remarks) > 0 {
			fmt.Fprintf(out, "\n%s\n", f.File)
		}
		for _, p := range f.Problems {
			fmt.Fprintf(out, "  %s\n", strings.ReplaceAll(p.String(), "\n", "\n    "))
		}
		for _, r := range f.Remarks {
			fmt.Fprintf(out, "  remark: %s\n", r)
		}
	}
	return nil
}
