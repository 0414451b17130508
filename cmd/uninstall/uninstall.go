// SPDX-License-Identifier: Apache-2.0

// Package uninstall is the command `kedge uninstall`.
package uninstall

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/uninstall"
)

// Command takes Kedge off this machine, or shows what there is of it. It exits with 0 when nothing is left, and with 1 otherwise.
func Command() *cli.Command {
	return &cli.Command{
		Name:  "uninstall",
		Usage: "take this machine out of its cluster and remove Kedge from it",
		Description: "Leaves the cluster, ends pods and processes, unmounts, cleans the network, and removes all files, the program itself last. What is\n" +
			"mounted below Kedge's directories is unmounted and never deleted. A run that was interrupted is finished by another one.\n" +
			"With --check it only shows what is there, and exits with 1 if there is anything.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "check", Usage: "only show what there is of Kedge on this machine"},
			&cli.BoolFlag{Name: "dry-run", Usage: "only show what would be removed"},
			&cli.BoolFlag{Name: "force", Usage: "go on when the cluster cannot be told, or its datastore loses its majority"},
			&cli.BoolFlag{Name: "keep-data", Usage: "leave the snapshots and the volumes of pods: DATA-DIR/snapshots, DATA-DIR/storage"},
			&cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask, as without a terminal"},
			output.Flag("of --check and --dry-run, "),
			&cli.StringFlag{Name: "config", Usage: "configuration `FILE`, if not that of the service"},
			&cli.StringFlag{Name: "data-dir", Usage: "data `DIR`, if not that of the service or the configuration"},
			&cli.StringFlag{Name: "kubelet-root-dir", Usage: "the kubelet's `DIR`, likewise"},
			&cli.StringFlag{Name: "run-dir", Usage: "`DIR` of Kedge's sockets", Hidden: true},
		},
		Action: action,
	}
}

func action(c *cli.Context) error {
	if c.Args().Present() {
		return fmt.Errorf("unexpected argument %q: only flags are accepted", c.Args().First())
	}
	if os.Geteuid() != 0 {
		return errors.New("only root can do that: run it with sudo")
	}
	log.SetOutput(io.Discard) // netlink tells of every attribute of an IP set that it does not know
	var flags []string
	for _, name := range []string{"config", "data-dir", "kubelet-root-dir", "run-dir"} {
		if c.IsSet(name) {
			flags = append(flags, "--"+name, c.String(name))
		}
	}
	places, err := uninstall.Locate(flags)
	if places.Config == nil {
		return err
	}
	if err != nil {
		fmt.Fprintln(c.App.ErrWriter, "kedge: some settings of this installation were not understood, their defaults are looked at:", err)
	}
	if c.Bool("check") || c.Bool("dry-run") {
		items, err := uninstall.Find(places, c.Bool("keep-data"))
		if err == nil {
			items = append([]uninstall.Item{}, items...) // in JSON a list, also when there is nothing
			err = output.Write(c.App.Writer, c.String("output"), items, func(w io.Writer) error { return write(w, items) })
		}
		if err == nil && len(items) > 0 && c.Bool("check") {
			return cli.Exit("", 1)
		}
		return err
	}
	if !c.Bool("yes") && term.IsTerminal(int(os.Stdin.Fd())) {
		if err := confirm(c.App.Writer, os.Stdin, places); err != nil {
			return err
		}
	}
	return uninstall.Run(c.Context, places, uninstall.Options{Force: c.Bool("force"), KeepData: c.Bool("keep-data"), Out: c.App.Writer})
}

func confirm(out io.Writer, in io.Reader, p uninstall.Places) error {
	fmt.Fprintf(out, "This ends all pods of %s and removes Kedge with its data, %s included. Type yes to go on: ", p.NodeName, p.DataDir)
	answer, err := bufio.NewReader(in).ReadString('\n')
	if strings.TrimSpace(answer) != "yes" {
		return errors.Join(errors.New("nothing was done"), err)
	}
	return nil
}

func write(out io.Writer, items []uninstall.Item) error {
	if len(items) == 0 {
		_, err := fmt.Fprintln(out, "there is nothing of Kedge on this machine")
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "KIND\tNAME\tDETAIL")
	for _, i := range items {
		fmt.Fprintf(w, "%s\t%s\t%s\n", i.Kind, i.Name, i.Detail)
	}
	return w.Flush()
}
