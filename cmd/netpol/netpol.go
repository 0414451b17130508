// SPDX-License-Identifier: Apache-2.0

// Package netpol is the command `kedge netpol`, which says what network policies do to a connection.
package netpol

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/netpolicy"
)

// Exit statuses of trace.
const (
	exitDenied  = 1
	exitUnknown = 2
)

// Command has the subcommand trace.
func Command() *cli.Command {
	return &cli.Command{
		Name:  "netpol",
		Usage: "say what network policies do",
		Subcommands: []*cli.Command{{
			Name: "trace", Usage: "which policies allow or deny a connection",
			Description: "Asks the rules that are loaded in the kernel of a pod's node: about what leaves the pod that connects, and about what arrives at the\n" +
				"other. Nodes that cannot be reached leave their half unknown.\n\n" +
				"  kedge netpol trace --from shop/web-0 --to shop/db-0:5432\n" +
				"  kedge netpol trace --from 192.0.2.7 --to shop/web-0:http\n" +
				"  kedge netpol trace --from shop/web-0 --to 10.43.0.10:53/udp\n\n" +
				"Exit status: 0 allowed, 1 denied, 2 not known.",
			Flags: []cli.Flag{
				&cli.StringFlag{Name: "from", Usage: "`POD` as NAMESPACE/NAME, or an address"},
				&cli.StringFlag{Name: "to", Usage: "`POD:PORT[/PROTOCOL]` as NAMESPACE/NAME:PORT, or an address; the port by number or name; tcp, udp or sctp"},
				&cli.StringFlag{Name: "kubeconfig", Value: config.DefaultKubeconfig, Usage: "an administrator's kubeconfig, `FILE`, to find pods"},
				&cli.StringFlag{Name: "run-dir", Usage: "`DIR` of Kedge's sockets", Value: agent.DefaultRunDir, Hidden: true},
			},
			Action: func(c *cli.Context) error {
				if c.Args().Present() {
					return unknown(fmt.Errorf("unexpected argument %q", c.Args().First()))
				}
				if c.String("from") == "" || c.String("to") == "" {
					return unknown(errors.New("--from and --to are needed, like --from shop/web-0 --to shop/db-0:5432"))
				}
				kubeconfig := c.String("kubeconfig")
				t := tracer{
					out:    c.App.Writer,
					client: func() (kubernetes.Interface, error) { return open(kubeconfig) },
					local: func(ctx context.Context, q netpolicy.Question) (netpolicy.Answer, error) {
						return netpolicy.Query(ctx, filepath.Join(c.String("run-dir"), netpolicy.SocketName), q)
					},
					remote: func(ctx context.Context, node string, q netpolicy.Question) (netpolicy.Answer, error) {
						return agent.QueryPolicy(ctx, kubeconfig, node, q)
					},
				}
				allowed, err := t.trace(c.Context, c.String("from"), c.String("to"))
				switch {
				case err != nil:
					return unknown(err)
				case !allowed:
					return cli.Exit("", exitDenied)
				}
				return nil
			},
		}},
	}
}

func unknown(err error) error { return cli.Exit(err, exitUnknown) }

func open(kubeconfig string) (kubernetes.Interface, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("pods are found through the API, with an administrator's kubeconfig: run this on a server, give --kubeconfig, or addresses in place of pods: %w", err)
	}
	config.Timeout = 10 * time.Second
	return kubernetes.NewForConfig(config)
}

// tracer answers one question.
type tracer struct {
	out    io.Writer
	client func() (kubernetes.Interface, error)
	local  func(ctx context.Context, q netpolicy.Question) (netpolicy.Answer, error) // asks this machine
	remote func(ctx context.Context, node string, q netpolicy.Question) (netpolicy.Answer, error)
}

// errUndecided is behind results that other nodes have to tell.
var errUndecided = errors.New("not known")

// trace prints what each direction's rules say and returns whether both allow the connection.
func (t tracer) trace(ctx context.Context, fromText, toText string) (bool, error) {
	from, err := parseFrom(fromText)
	if err != nil {
		return false, fmt.Errorf("--from: %w", err)
	}
	to, err := parseTo(toText)
	if err != nil {
		return false, fmt.Errorf("--to: %w", err)
	}
	if err := t.resolve(ctx, &from, &to); err != nil {
		return false, err
	}
	fmt.Fprintf(t.out, "from    %s\nto      %s port %d/%s\n\n", from, to, to.number, to.protocol)
	q := netpolicy.Question{From: from.addr, To: to.addr, Protocol: to.protocol, Port: to.number}

	out, outErr := t.half(ctx, q, from, "egress", func(a netpolicy.Answer) *netpolicy.Decision { return a.Egress })
	in, inErr := t.half(ctx, q, to.end, "ingress", func(a netpolicy.Answer) *netpolicy.Decision { return a.Ingress })
	switch {
	case outErr == nil && !out || inErr == nil && !in:
		_, err := fmt.Fprintln(t.out, "\ndenied")
		return false, err
	case outErr != nil || inErr != nil:
		return false, errors.Join(outErr, inErr)
	}
	_, err = fmt.Fprintln(t.out, "\nallowed")
	return true, err
}

// half asks the node of one end about its direction.
func (t tracer) half(ctx context.Context, q netpolicy.Question, e end, name string, pick func(netpolicy.Answer) *netpolicy.Decision) (bool, error) {
	say := func(format string, args ...any) { fmt.Fprintf(t.out, "%-7s %s\n", name, fmt.Sprintf(format, args...)) }
	if e.host {
		say("allowed: no policy applies to a pod with the network of its node")
		return true, nil
	}
	answer, err := t.ask(ctx, e.node, q)
	if err != nil {
		say("unknown: %v", err)
		return false, fmt.Errorf("%s: %w", name, errUndecided)
	}
	switch d := pick(answer); {
	case d != nil:
		say("%s", describe(*d, answer.Node))
		return d.Allowed, nil
	case e.node != "":
		say("unknown: node %s has no rules for %s, which is starting or has ended", e.node, e.title())
		return false, fmt.Errorf("%s: %w", name, errUndecided)
	}
	say("allowed: %s is no pod of node %s", e.title(), answer.Node)
	return true, nil
}

// ask the rules of a node, or of this machine where no node is known. On the pod's own node no API is needed for that.
func (t tracer) ask(ctx context.Context, node string, q netpolicy.Question) (netpolicy.Answer, error) {
	answer, err := t.local(ctx, q)
	if node == "" || err == nil && answer.Node == node {
		return answer, err
	}
	if answer, err = t.remote(ctx, node, q); err != nil {
		return answer, fmt.Errorf("node %s decides this, run the command there: %w", node, err)
	}
	return answer, nil
}

func describe(d netpolicy.Decision, node string) string {
	verdict := "denied"
	if d.Allowed {
		verdict = "allowed"
	}
	switch policies := strings.Join(d.Policies, ", "); {
	case d.Reason != "":
		return fmt.Sprintf("%s: %s", verdict, d.Reason)
	case !d.Isolated:
		return fmt.Sprintf("%s: no policy applies (node %s)", verdict, node)
	case d.Allowed:
		return fmt.Sprintf("%s by %s (node %s)", verdict, policies, node)
	default:
		return fmt.Sprintf("%s: none of the policies that apply allows it: %s (node %s)", verdict, policies, node)
	}
}
