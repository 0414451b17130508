// SPDX-License-Identifier: Apache-2.0

package certificate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/pki"
)

func rotateCA() *cli.Command {
	return &cli.Command{
		Name: "rotate-ca", Usage: "replace the CAs and the service-account key of the cluster, while it runs",
		Description: "Run it on a server. Every server in turn, then every agent, trusts the new CAs and gets certificates from them; datastore and control plane\n" +
			"of one server at a time restart, and the node process of agents; pods run on. The old CAs stay trusted for --overlap. Then they are dropped,\n" +
			"when all machines have followed. Within the overlap: copy kubeconfigs again, and restart pods that talk to the API and read their CA once.\n" +
			"Started again, it shows how far a change is.",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "overlap", Value: 168 * time.Hour, Usage: "trust the old CAs for `DURATION` after the new ones issue everywhere"},
			&cli.BoolFlag{Name: "status", Usage: "only show how far it is"},
			&cli.BoolFlag{Name: "dry-run", Usage: "only say what would be done"},
			&cli.BoolFlag{Name: "finish", Usage: "end the overlap now"},
			&cli.BoolFlag{Name: "force", Usage: "with --finish: do not wait for machines that have not followed; they have to join again"},
			&cli.BoolFlag{Name: "no-wait", Usage: "do not wait until all machines have certificates from the new CAs"},
			output.Flag("with --status: "),
			&cli.StringFlag{Name: "kubeconfig", Value: config.DefaultKubeconfig, Usage: "an administrator's kubeconfig, `FILE`"},
			runDirFlag(),
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("unexpected argument %q: CAs are changed all together", c.Args().First())
			}
			if c.Duration("overlap") < 0 {
				return errors.New("--overlap: less than nothing")
			}
			client, err := open(c.String("kubeconfig"))
			if err != nil {
				return err
			}
			p := progress{client: client, kubeconfig: c.String("kubeconfig"), out: c.App.Writer}
			switch {
			case c.Bool("status"):
				return p.status(c.Context, c.String("output"))
			case c.Bool("dry-run"):
				return p.plan(c.Context, c.Duration("overlap"))
			case c.Bool("finish"):
				if err := authority.FinishRotation(c.Context, client, c.Bool("force")); err != nil {
					return err
				}
				return p.wait(c.Context, func(r *authority.Rotation) bool { return !r.Finished.IsZero() })
			case c.Bool("force"):
				return errors.New("--force is for --finish")
			}
			if err := agent.StartRotation(c.Context, c.String("run-dir"), c.Duration("overlap"), c.App.Writer); err != nil {
				return err
			}
			if c.Bool("no-wait") { // the API server of this machine may be restarting already
				_, err := fmt.Fprintln(c.App.Writer, "it goes on by itself; see `kedge certificate rotate-ca --status`")
				return err
			}
			return p.wait(c.Context, func(r *authority.Rotation) bool { return r.Phase == authority.PhaseRenew || r.Phase == pki.PhaseDone })
		},
	}
}

func open(kubeconfig string) (kubernetes.Interface, error) {
	if _, err := os.Stat(kubeconfig); err != nil {
		return nil, fmt.Errorf("an administrator's kubeconfig is needed: run this on a server, or give --kubeconfig: %w", err)
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	config.Timeout = 15 * time.Second
	return kubernetes.NewForConfig(config)
}

// progress of a change of the CAs.
type progress struct {
	client     kubernetes.Interface
	kubeconfig string
	out        io.Writer
}

// report is what --status -o json prints.
type report struct {
	*authority.Rotation
	Waiting  []string          `json:"waitingFor"` // machines that have not come as far as the phase wants
	Machines map[string]string `json:"machines"`   // what each says of itself: CA/PHASE; agents say it from their first change on
}

func (p progress) get(ctx context.Context) (*report, error) {
	r, err := authority.GetRotation(ctx, p.client)
	if err != nil || r == nil {
		return nil, err
	}
	servers, agents, err := authority.Laggards(ctx, p.client, r)
	if err != nil {
		return nil, err
	}
	out := &report{Rotation: r, Waiting: append(servers, agents...), Machines: map[string]string{}}
	nodes, err := p.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, n := range nodes.Items {
		out.Machines[n.Name] = n.Annotations[authority.AnnotationCAs]
	}
	all, err := authority.ListServers(ctx, p.client)
	if err != nil {
		return nil, err
	}
	for name, s := range all {
		out.Machines[name] = s.CAs
	}
	return out, nil
}

func (p progress) status(ctx context.Context, format string) error {
	r, err := p.get(ctx)
	if err != nil {
		return err
	}
	return output.Write(p.out, format, r, r.write)
}

func (r *report) write(out io.Writer) error {
	if r == nil {
		_, err := fmt.Fprintln(out, "the CAs of this cluster were never changed")
		return err
	}
	fmt.Fprintln(out, r.line(time.Now()))
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "\nMACHINE\tCA\tPHASE\tREMARK")
	for _, name := range slices.Sorted(maps.Keys(r.Machines)) {
		ca, phase, _ := strings.Cut(r.Machines[name], "/")
		remark := ""
		switch {
		case name == r.Turn:
			remark = "it is its turn"
		case slices.Contains(r.Away, name):
			remark = "does not answer"
		case slices.Contains(r.Waiting, name):
			remark = "waited for"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", name, ca, phase, remark)
	}
	return w.Flush()
}

// line says how far the change is.
func (r *report) line(now time.Time) string {
	head := fmt.Sprintf("change of the CAs %s, since %s: ", r.ID, r.Started.UTC().Format(time.RFC3339))
	waiting := ""
	if len(r.Waiting) > 0 {
		waiting = "; waits for " + strings.Join(r.Waiting, ", ")
	}
	switch {
	case !r.Finished.IsZero():
		return head + "finished on " + r.Finished.UTC().Format(time.RFC3339)
	case r.Phase == pki.PhaseTrust:
		return head + "1 of 4, servers trust the new CAs one after the other" + waiting
	case r.Phase == pki.PhaseIssue:
		return head + "2 of 4, servers issue from the new CAs one after the other" + waiting
	case r.Phase == authority.PhaseRenew && now.Before(r.DropAfter):
		return head + "3 of 4, agents renew their certificates, and the old CAs are trusted until " + r.DropAfter.UTC().Format(time.RFC3339) + waiting
	case r.Phase == authority.PhaseRenew && len(r.Waiting) == 0:
		return head + "3 of 4, the overlap is over"
	case r.Phase == authority.PhaseRenew:
		return head + "3 of 4, the overlap is over, and the old CAs are dropped when all have followed" + waiting + ". Start them, remove them (kedge node remove), or --finish --force"
	}
	return head + "4 of 4, servers drop the old CAs one after the other" + waiting
}

// wait prints what changes until done. API servers restart meanwhile.
func (p progress) wait(ctx context.Context, done func(*authority.Rotation) bool) error {
	said := ""
	for {
		// The kubeconfig is another one when this server has gone on.
		if client, err := open(p.kubeconfig); err == nil {
			p.client = client
		}
		r, err := p.get(ctx)
		if err == nil && r != nil {
			if line := r.line(time.Now()); line != said {
				said = line
				fmt.Fprintln(p.out, line)
			}
			if done(r.Rotation) && len(r.Waiting) == 0 {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			fmt.Fprintln(p.out, "it goes on without this command; see `kedge certificate rotate-ca --status`")
			return nil
		case <-time.After(time.Second):
		}
	}
}

func (p progress) plan(ctx context.Context, overlap time.Duration) error {
	if r, err := authority.GetRotation(ctx, p.client); err != nil {
		return err
	} else if r != nil && r.Finished.IsZero() {
		fmt.Fprintln(p.out, "a change is under way already: nothing new would be started")
		return p.status(ctx, "text")
	}
	all, err := authority.ListServers(ctx, p.client)
	if err != nil {
		return err
	}
	nodes, err := p.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	var agents []string
	for _, n := range nodes.Items {
		if _, ok := all[n.Name]; !ok {
			agents = append(agents, n.Name)
		}
	}
	slices.Sort(agents)
	_, err = fmt.Fprintf(p.out, `would make four new CAs and a new service-account key, and then
1. servers, one after the other, trust both; datastore and control plane restart: %s
2. servers, one after the other, issue from the new ones; datastore and control plane restart
3. agents renew their certificates; their node process restarts, pods run on: %s
4. after %s, when all machines have followed, servers one after the other drop the old CAs; datastore and control plane restart
Until step 4 everything that knows the old CAs works: kubeconfigs, join tokens, pods. Afterwards copies of kubeconfigs and join tokens
from before step 2 are refused; pods that read their CA only at their start should have been restarted.
Nothing was changed.
`, list(slices.Sorted(maps.Keys(all))), list(agents), overlap)
	return err
}

func list(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}
