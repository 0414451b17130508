// SPDX-License-Identifier: Apache-2.0

// Package status is the command `kedge status`.
package status

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/tunnel"
)

// Command shows what the server of this machine is doing. It exits with 0 when all is ready, with 1 when the server does not
// run, and with 3 when something is not ready.
func Command() *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "show each component: its state, since when, restarts, and why it is not ready",
		Flags: []cli.Flag{
			output.Flag(""),
			&cli.StringFlag{Name: "node", Usage: "of the node `NAME` of the cluster, instead of this machine"},
			&cli.StringFlag{Name: "kubeconfig", Value: config.DefaultKubeconfig, Usage: "for --node: an administrator's kubeconfig, `FILE`"},
			&cli.StringFlag{Name: "run-dir", Usage: "`DIR` of the server's sockets", Value: agent.DefaultRunDir, Hidden: true},
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("unexpected argument %q: another node is given by --node", c.Args().First())
			}
			var st *agent.Status
			var err error
			if node := c.String("node"); node != "" {
				st, err = agent.GetStatusOf(c.Context, c.String("kubeconfig"), node)
			} else {
				st, err = agent.GetStatus(c.Context, c.String("run-dir"))
			}
			if err != nil {
				return err
			}
			err = output.Write(c.App.Writer, c.String("output"), st, func(w io.Writer) error { return write(w, st, time.Now()) })
			if err == nil && !st.Ready {
				return cli.Exit("", 3)
			}
			return err
		},
	}
}

func write(out io.Writer, st *agent.Status, now time.Time) error {
	state := "ready"
	if !st.Ready {
		state = "not ready"
	}
	fmt.Fprintf(out, "Kedge %s on %s %s: %s, running for %s (pid %d)\n", st.Version, st.Role, st.Node, state, duration.HumanDuration(now.Sub(st.Started)), st.PID)
	if st.Trial != "" {
		fmt.Fprintf(out, "this version is under trial: %s goes on if it does not become and stay ready (kedge upgrade --status)\n", st.Trial)
	}
	if st.Phase != "" {
		_, err := fmt.Fprintln(out, st.Phase)
		return err
	}
	fmt.Fprintln(out)
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "PROCESS\tCOMPONENT\tSTATE\tSINCE\tRESTARTS\tREMARK")
	for _, p := range st.Processes {
		for _, c := range p.Components {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\n", p.Name, c.Name, c.State, duration.HumanDuration(now.Sub(c.Since)), p.Restarts, c.Reason)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if err := writeServers(out, st); err != nil {
		return err
	}
	for _, p := range st.Processes {
		if p.LastExitAt != nil {
			fmt.Fprintf(out, "\n%s ended %s ago: %s", p.Name, duration.HumanDuration(now.Sub(*p.LastExitAt)), p.LastExit)
		}
	}
	for _, c := range st.Certificates {
		if c.Warning != "" {
			fmt.Fprintf(out, "\ncertificate %s: %s", c.Name, c.Warning)
		}
	}
	if c, ok := pki.Soonest(st.Certificates); ok {
		fmt.Fprintf(out, "\ncertificates: %s ends first, on %s (%d days left); see kedge certificate check", c.Name, c.NotAfter.Format(time.DateOnly), c.DaysLeft)
	}
	_, err := fmt.Fprintln(out)
	return err
}

func writeServers(out io.Writer, st *agent.Status) error {
	if len(st.APIServers) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "\nAPI SERVER\tSTATE\tCONNECTIONS\tTUNNEL\tREMARK")
	for _, s := range st.APIServers {
		state, remark := "healthy", s.Reason
		if !s.Healthy {
			state = "unhealthy"
		}
		if s.Active {
			state += ", in use"
		}
		if s.Local && remark == "" {
			remark = "on this machine"
		}
		way := "" // none to this machine's own
		if i := slices.IndexFunc(st.Tunnels, func(l tunnel.Link) bool { return l.Server == s.Address }); i >= 0 {
			if way = "open"; !st.Tunnels[i].Open {
				way = "closed: " + st.Tunnels[i].Reason
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\n", s.Address, state, s.Connections, way, remark)
	}
	return w.Flush()
}
