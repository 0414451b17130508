// SPDX-License-Identifier: Apache-2.0

// Package certificate is the command `kedge certificate`.
package certificate

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/pki"
)

// Exit codes of check.
const (
	exitEnding  = 3
	exitExpired = 4
)

// Command shows and renews the certificates of this machine.
func Command() *cli.Command {
	return &cli.Command{
		Name: "certificate", Usage: "show and renew the certificates of this machine, change the CAs of the cluster",
		Subcommands: []*cli.Command{check(), rotate(), rotateCA()},
	}
}

func runDirFlag() cli.Flag {
	return &cli.StringFlag{Name: "run-dir", Usage: "`DIR` of the server's sockets", Value: agent.DefaultRunDir, Hidden: true}
}

func check() *cli.Command {
	return &cli.Command{
		Name: "check", Usage: "list the certificates of this machine and how long they last",
		Description: "Reads them from the disk: neither the API nor Kedge has to run.\n" +
			"Exit status: 0 when all is well, 3 when a certificate is near its end and was not renewed (or is a CA in its last year),\n" +
			"4 when one has expired, is not valid yet or cannot be read, 1 when there are none.",
		Flags: []cli.Flag{
			output.Flag(""),
			&cli.StringFlag{Name: "data-dir", Usage: "Kedge's `DIR`, if Kedge does not run and it is another one", Value: config.DefaultDataDir},
			&cli.StringFlag{Name: "kubelet-root-dir", Usage: "the kubelet's `DIR`, likewise", Value: "/var/lib/kubelet"},
			&cli.StringFlag{Name: "write-kubeconfig", Usage: "the administrator's kubeconfig `FILE`, likewise", Value: config.DefaultKubeconfig},
			runDirFlag(),
		},
		Action: func(c *cli.Context) error {
			list, err := certificates(c)
			if err != nil {
				return err
			}
			err = output.Write(c.App.Writer, c.String("output"), list, func(w io.Writer) error { return write(w, list) })
			if code := exitCode(list); err == nil && code != 0 {
				return cli.Exit("", code)
			}
			return err
		},
	}
}

// certificates of this machine: a Kedge that runs knows where they are.
func certificates(c *cli.Context) ([]pki.CertStatus, error) {
	st, err := agent.GetStatus(c.Context, c.String("run-dir"))
	if err == nil && len(st.Certificates) > 0 {
		return st.Certificates, nil
	}
	if err != nil && !errors.Is(err, agent.ErrNotRunning) {
		return nil, err
	}
	dir := filepath.Join(c.String("data-dir"), "pki")
	list := pki.Inspect(pki.Places{Dir: dir, KubeletDir: node.CertDir(c.String("kubelet-root-dir")), Kubeconfig: c.String("write-kubeconfig")})
	if len(list) == 0 {
		return nil, fmt.Errorf("there are no certificates in %s: this machine is not part of a cluster, or its --data-dir is another one, or only root may look", dir)
	}
	return list, nil
}

func exitCode(list []pki.CertStatus) int {
	code := 0
	for _, s := range list {
		switch s.State {
		case pki.StateOK:
		case pki.StateEnding:
			code = max(code, exitEnding)
		default:
			code = max(code, exitExpired)
		}
	}
	return code
}

func write(out io.Writer, list []pki.CertStatus) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "CERTIFICATE\tENDS\tDAYS LEFT\tRENEWED BY ITSELF\tSTATE")
	for _, s := range list {
		ends, days, renewed := "", "", "no"
		if !s.NotAfter.IsZero() {
			ends, days = s.NotAfter.UTC().Format(time.DateOnly), fmt.Sprint(s.DaysLeft)
		}
		if !s.RenewAt.IsZero() {
			renewed = s.RenewAt.UTC().Format(time.DateOnly)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", s.Name, ends, days, renewed, s.State)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, s := range list {
		if s.Warning != "" {
			fmt.Fprintf(out, "\n%s: %s\n", s.Name, s.Warning)
		}
	}
	return nil
}

func rotate() *cli.Command {
	return &cli.Command{
		Name: "rotate", Usage: "renew leaf certificates of this machine now, while it runs", ArgsUsage: "[NAME...]",
		Description: "Without names: all of them. `kedge certificate check` lists the names. On a server nothing restarts and no connection is closed.\n" +
			"On an agent the node process (kubelet, kube-proxy, DNS) restarts; pods run on.",
		Flags: []cli.Flag{runDirFlag()},
		Action: func(c *cli.Context) error {
			return agent.RotateCertificates(c.Context, c.String("run-dir"), c.Args().Slice(), c.App.Writer)
		},
	}
}
