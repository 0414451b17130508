// SPDX-License-Identifier: Apache-2.0

// Package secretsencrypt is the command `kedge secrets-encrypt`.
package secretsencrypt

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/encryption"
)

// Command gives `kedge secrets-encrypt` with its subcommands. They run on any server, or anywhere with an administrator's kubeconfig, for
// all servers.
func Command() *cli.Command {
	kubeconfig := &cli.StringFlag{Name: "kubeconfig", Value: config.DefaultKubeconfig, Usage: "an administrator's kubeconfig, `FILE`"}
	skip := &cli.StringSliceFlag{Name: "skip", Usage: "do not wait for server `NAME` if it does not answer; it loads the configuration when it starts"}
	change := func(action encryption.Action, usage, description string) *cli.Command {
		return &cli.Command{Name: string(action), Usage: usage, Description: description, Flags: []cli.Flag{kubeconfig, skip},
			Action: func(c *cli.Context) error {
				d, err := open(c)
				if err != nil {
					return err
				}
				d.Skip = c.StringSlice("skip")
				d.Say = func(line string) { fmt.Fprintln(c.App.Writer, line) }
				return d.Change(c.Context, action)
			}}
	}
	const resumes = "\nIf it is interrupted, nothing is lost: every Secret stays readable, and the same command goes on where it was."
	return &cli.Command{
		Name:  "secrets-encrypt",
		Usage: "the encryption of Secrets in the datastore: show it, change its key",
		Subcommands: []*cli.Command{
			{Name: "status", Usage: "show the keys, what each server has loaded, and how the Secrets are stored", Flags: []cli.Flag{kubeconfig, output.Flag("")},
				Description: "Exit status: 0 when all servers agree, 3 when a change has not ended or a server is behind.", Action: status},
			change(encryption.Rotate, "make a new key, store all Secrets anew with it, drop the old one",
				"On all servers, while the cluster runs."+resumes),
			change(encryption.Disable, "store all Secrets in the clear", "For a while, or for good."+resumes),
			change(encryption.Enable, "encrypt all Secrets with a new key, after disable", "Encryption is on from a cluster's first start."+resumes),
		},
	}
}

func open(c *cli.Context) (*encryption.Driver, error) {
	if c.Args().Present() {
		return nil, fmt.Errorf("unexpected argument %q: only flags are accepted", c.Args().First())
	}
	path := c.String("kubeconfig")
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("an administrator's kubeconfig is needed: run this as root on a server, or give --kubeconfig: %w", err)
	}
	rest, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		return nil, err
	}
	return encryption.NewDriver(rest)
}

// report is what status shows, in JSON as it is.
type report struct {
	Enabled   bool                  `json:"enabled"`
	State     encryption.Progress   `json:"state"`
	Providers []encryption.ViewedBy `json:"providers"` // the first one writes
	Servers   []server              `json:"servers"`
	Objects   encryption.Objects    `json:"objects"`
}

type server struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	Hash    string `json:"hash,omitempty"` // of the configuration that its API server has loaded
	Current bool   `json:"current"`
	Error   string `json:"error,omitempty"`
}

func status(c *cli.Context) error {
	d, err := open(c)
	if err != nil {
		return err
	}
	v, err := d.View(c.Context)
	if err != nil {
		return err
	}
	if v.Foreign != "" {
		return errors.New("Kedge does not manage the encryption: " + v.Foreign)
	}
	servers, err := d.Servers(c.Context)
	if err != nil {
		return err
	}
	objects, err := d.Objects(c.Context)
	if err != nil {
		return err
	}
	r := report{Enabled: v.Providers[0].Name != encryption.Identity, State: v.State, Providers: v.Providers, Objects: *objects}
	settled := v.State.Stage == encryption.Stable
	for _, s := range servers {
		one := server{Name: s.Name, Address: s.Address}
		if s.Err != nil {
			one.Error = s.Err.Error()
		} else {
			one.Hash, one.Current, one.Error = s.View.Loaded.Hash, s.View.Loaded.Generation >= v.State.Generation, s.View.Loaded.Error
		}
		settled = settled && one.Current
		r.Servers = append(r.Servers, one)
	}
	err = output.Write(c.App.Writer, c.String("output"), r, func(w io.Writer) error { return write(w, r) })
	if err == nil && !settled {
		return cli.Exit("", 3)
	}
	return err
}

func write(out io.Writer, r report) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	state := "off: Secrets are stored in the clear"
	if r.Enabled {
		state = "on, with " + r.Providers[0].Name
	}
	fmt.Fprintf(w, "encryption of Secrets: %s\n", state)
	if r.State.Stage != encryption.Stable {
		fmt.Fprintf(w, "%s has not ended (stage %s, began %s): kedge secrets-encrypt %s goes on with it\n", r.State.Action, r.State.Stage,
			r.State.Started.Format(time.RFC3339), r.State.Action)
	}
	fmt.Fprintln(w, "\nPROVIDER\tID\tMADE\tSECRETS STORED BY IT\tREMARK")
	counts := maps.Clone(r.Objects.By)
	for i, p := range r.Providers {
		made, remark := "at the first start", "read only"
		if p.Created != nil {
			made = p.Created.Format(time.DateOnly)
		}
		if p.Name == encryption.Identity {
			made = "" // clear text
		}
		if i == 0 {
			remark = "writes"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", p.Name, p.ID, made, counts[p.Name], remark)
		delete(counts, p.Name)
	}
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		fmt.Fprintf(w, "%s\t\t\t%d\tnot in the configuration: these cannot be read\n", name, counts[name])
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w, "\nSERVER\tADDRESS\tCONFIGURATION\tREMARK")
	for _, s := range r.Servers {
		remark := s.Error
		switch {
		case remark == "" && s.Current:
			remark = "up to date"
		case remark == "":
			remark = "has not loaded the latest yet"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", s.Name, s.Address, s.Hash, remark)
	}
	return w.Flush()
}
