// SPDX-License-Identifier: Apache-2.0

// Package token is the command `kedge token`.
package token

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join"
)

// Command manages the tokens by which machines join. All of it but inspect needs an administrator's kubeconfig, which every server has.
func Command() *cli.Command {
	return &cli.Command{
		Name: "token", Usage: "manage the tokens by which machines join the cluster",
		Subcommands: []*cli.Command{createCommand(), listCommand(), deleteCommand(), rotateCommand(), inspectCommand()},
	}
}

const ttlUsage = "how long machines may join with it, as 30m, 24h or 7d; 0 for ever"

func kubeconfigFlag() cli.Flag {
	return &cli.StringFlag{Name: "kubeconfig", Usage: "administrator's kubeconfig `FILE`", Value: config.DefaultKubeconfig}
}

func printTokenFlag() cli.Flag {
	return &cli.BoolFlag{Name: "print-token", Usage: "print nothing but the token"}
}

func createCommand() *cli.Command {
	return &cli.Command{
		Name: "create", Usage: "make a token and print the command to type on the joining machine",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "role", Usage: "what machines may join as: agent or server (which allows agents, too)", Value: string(join.Agent)},
			&cli.StringFlag{Name: "ttl", Usage: ttlUsage, Value: "24h"},
			&cli.StringFlag{Name: "description", Usage: "remark `TEXT` for the list"},
			printTokenFlag(), kubeconfigFlag(),
		},
		Action: withCluster(0, func(c *cli.Context, cl *cluster) error {
			role, err := join.ParseRole(c.String("role"))
			if err != nil {
				return fmt.Errorf("--role: %w", err)
			}
			ttl, err := parseTTL(c.String("ttl"))
			if err != nil {
				return err
			}
			return cl.create(c.Context, c.App.Writer, join.Info{Role: role, Description: c.String("description")}, ttl, c.Bool("print-token"))
		}),
	}
}

func listCommand() *cli.Command {
	return &cli.Command{
		Name: "list", Usage: "list the tokens, without their secrets",
		Flags: []cli.Flag{output.Flag(""), kubeconfigFlag()},
		Action: withCluster(0, func(c *cli.Context, cl *cluster) error {
			return cl.list(c.Context, c.App.Writer, c.App.ErrWriter, c.String("output"))
		}),
	}
}

func deleteCommand() *cli.Command {
	return &cli.Command{
		Name: "delete", Usage: "revoke tokens; machines that have joined stay", ArgsUsage: "ID|TOKEN...",
		Flags: []cli.Flag{kubeconfigFlag()},
		Action: withCluster(-1, func(c *cli.Context, cl *cluster) error {
			return cl.delete(c.Context, c.App.Writer, c.Args().Slice())
		}),
	}
}

func rotateCommand() *cli.Command {
	return &cli.Command{
		Name: "rotate", Usage: "replace a token by a new one for the same purpose and time, and revoke it", ArgsUsage: "ID|TOKEN",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "ttl", Usage: ttlUsage + "; default: as long as the old one from its creation on"},
			printTokenFlag(), kubeconfigFlag(),
		},
		Action: withCluster(1, func(c *cli.Context, cl *cluster) error {
			ttl := time.Duration(-1)
			if c.IsSet("ttl") {
				var err error
				if ttl, err = parseTTL(c.String("ttl")); err != nil {
					return err
				}
			}
			return cl.rotate(c.Context, c.App.Writer, c.Args().First(), ttl, c.Bool("print-token"))
		}),
	}
}

func inspectCommand() *cli.Command {
	return &cli.Command{
		Name: "inspect", Usage: "say what a token is; on a server also whether it is valid", ArgsUsage: "TOKEN",
		Flags: []cli.Flag{kubeconfigFlag()},
		Action: func(c *cli.Context) error {
			if err := wantArgs(c, 1); err != nil {
				return err
			}
			t, err := join.Parse(c.Args().First())
			if err != nil {
				return err
			}
			cl, err := open(c.String("kubeconfig"))
			return inspect(c.Context, c.App.Writer, t, cl, err)
		},
	}
}

// withCluster is an action with n arguments, or one or more when n is negative.
func withCluster(n int, action func(*cli.Context, *cluster) error) cli.ActionFunc {
	return func(c *cli.Context) error {
		if err := wantArgs(c, n); err != nil {
			return err
		}
		cl, err := open(c.String("kubeconfig"))
		if err != nil {
			return err
		}
		return action(c, cl)
	}
}

func wantArgs(c *cli.Context, n int) error {
	for _, arg := range c.Args().Slice() {
		if strings.HasPrefix(arg, "-") {
			return fmt.Errorf("%s stands behind an argument: flags come first", arg)
		}
	}
	switch {
	case n == 0 && c.Args().Present():
		return fmt.Errorf("unexpected argument: only flags are accepted; see `kedge token %s --help`", c.Command.Name)
	case n > 0 && c.NArg() != n, n < 0 && !c.Args().Present():
		return fmt.Errorf("usage: kedge token %s [flags] %s", c.Command.Name, c.Command.ArgsUsage)
	}
	return nil
}

// parseTTL knows days, because people think in them.
func parseTTL(text string) (time.Duration, error) {
	ttl, err := time.ParseDuration(text)
	if days, ok := strings.CutSuffix(text, "d"); ok {
		var n uint64
		n, err = strconv.ParseUint(days, 10, 16)
		ttl = time.Duration(n) * 24 * time.Hour
	}
	if err != nil || ttl < 0 {
		return 0, fmt.Errorf("--ttl %q is no time: write 30m, 24h or 7d, or 0 for a token that never expires", text)
	}
	return ttl, nil
}

// entry of a list. It has no secret.
type entry struct {
	ID          string     `json:"id"`
	Role        string     `json:"role"` // other: not for joining machines to Kedge
	Expires     *time.Time `json:"expires,omitempty"`
	Description string     `json:"description,omitempty"`
	FromOption  bool       `json:"fromOption,omitempty"`
}

func newEntry(i join.Info) entry {
	e := entry{ID: i.Token.ID, Role: string(i.Role), Description: i.Description, FromOption: i.Token.Derived}
	if e.Role == "" {
		e.Role = "other"
	}
	if !i.Expires.IsZero() {
		e.Expires = &i.Expires
	}
	return e
}

func writeList(out io.Writer, entries []entry, now time.Time) error {
	if len(entries) == 0 {
		_, err := fmt.Fprintln(out, "There are no tokens: no machine can join. `kedge token create` makes one.")
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "ID\tROLE\tEXPIRES IN\tDESCRIPTION")
	for _, e := range entries {
		description := e.Description
		if e.FromOption {
			description = strings.TrimSpace(description + " (from an option of the servers)")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", e.ID, e.Role, remaining(e.Expires, now), description)
	}
	return w.Flush()
}

func remaining(expires *time.Time, now time.Time) string {
	switch {
	case expires == nil:
		return "never"
	case !expires.After(now):
		return "expired"
	}
	return duration.HumanDuration(expires.Sub(now))
}

// writeToken prints a token with the commands to type. Remarks are shell comments, so that lines can be pasted. install.sh takes the token
// from a variable, which no list of processes shows, and puts it into a file of root's.
func writeToken(out io.Writer, t join.Token, role join.Role, ttl time.Duration, address string, now time.Time) error {
	until := "for ever (--ttl 0), until somebody runs `kedge token delete " + t.ID + "`"
	if ttl != 0 {
		until = "until " + now.Add(ttl).UTC().Format("2006-01-02 15:04 UTC") + " (" + duration.HumanDuration(ttl) + ")"
	}
	what := "an agent"
	if role == join.Server {
		what = "a server"
	}
	hint := ""
	if address == "" {
		address = "ADDRESS:6443"
		hint = "# No server has registered its address yet: put in that of this one.\n"
	}
	argument := ""
	if role == join.Server {
		argument = " server"
	}
	_, err := fmt.Fprintf(out, `# To join %s, type one of these on the new machine, in a shell of root. The token is valid %s.
%s# With install.sh, as a service; the token goes into /etc/kedge/token, which only root reads:
KEDGE_URL=https://%[4]s KEDGE_TOKEN=%[5]s sh install.sh%[6]s
# The program alone, for as long as it runs:
kedge %[7]s --server https://%[4]s --token %[5]s
`, what, until, hint, address, t.Text(), argument, role)
	return err
}
