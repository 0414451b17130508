// SPDX-License-Identifier: Apache-2.0

// Package upgrade is the command `kedge upgrade`.
package upgrade

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/urfave/cli/v2"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/release"
	"github.com/kedge-io/kedge/pkg/uninstall"
	"github.com/kedge-io/kedge/pkg/upgrade"
	"github.com/kedge-io/kedge/pkg/upgrade/rollout"
	"github.com/kedge-io/kedge/pkg/version"
)

const description = `The new version is tried beside the old one: it takes its place when everything has been ready for a while. When it does not become ready
within --timeout, ends, hangs, or the machine loses its power in the meantime and it does not come up, the old one goes on by itself. Pods
keep running. On a server the datastore is saved first.

   kedge upgrade --from kedge-v1.37.3+kedge1-linux-amd64.tar.zst          this machine
   kedge upgrade --all --from FILE [--parallel 3] [--drain]               the cluster, from any server: servers one by one, then agents
   kedge upgrade --status                                                 what is under way, and what was
   kedge upgrade --rollback                                               this machine, to the version before
   kedge upgrade --all --rollback                                         the cluster: agents, then servers one by one

A machine takes what is signed by the key of its own build, or by one in /etc/kedge/release.pub.`

// Command upgrades this machine, or all of the cluster.
func Command() *cli.Command {
	return &cli.Command{
		Name:        "upgrade",
		Usage:       "go to another version of Kedge, and back by itself if that does not do",
		Description: description,
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: "from", Usage: "the release: `FILE`, unpacked directory or URL; with --all one an architecture"},
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"check"}, Usage: "only say whether it can be done, and what is against it"},
			&cli.BoolFlag{Name: "rollback", Usage: "go back to the version before"},
			&cli.BoolFlag{Name: "status", Usage: "show what is under way here and in the cluster"},
			&cli.BoolFlag{Name: "history", Usage: "show what upgrades of this machine there were"},
			&cli.BoolFlag{Name: "force", Usage: "also when the version skew is not supported, or this machine is not ready; take over from another --all"},
			&cli.DurationFlag{Name: "timeout", Value: upgrade.DefaultTimeout, Usage: "go back when the new version is not ready within `DURATION`"},
			&cli.BoolFlag{Name: "all", Usage: "all machines of the cluster; the same command again goes on where it stopped"},
			&cli.IntFlag{Name: "parallel", Value: 1, Usage: "with --all: `N` agents at a time"},
			&cli.BoolFlag{Name: "drain", Usage: "with --all: move a node's pods elsewhere before, and let it have pods again afterwards"},
			&cli.DurationFlag{Name: "drain-timeout", Value: 5 * time.Minute, Usage: "give up draining after `DURATION`"},
			&cli.StringFlag{Name: "window", Usage: "with --all: begin with a machine only between `FROM-TO`, local time, as 22:00-05:00"},
			&cli.StringSliceFlag{Name: "skip", Usage: "with --all: leave out the node `NAME`"},
			output.Flag("of --status and --history, "),
			&cli.StringFlag{Name: "kubeconfig", Value: config.DefaultKubeconfig, Usage: "an administrator's kubeconfig, `FILE`, for --all and --status"},
			&cli.StringFlag{Name: "data-dir", Value: config.DefaultDataDir, Usage: "`DIR` of this machine's data, when Kedge does not run"},
			&cli.StringFlag{Name: "run-dir", Usage: "`DIR` of Kedge's sockets", Value: agent.DefaultRunDir, Hidden: true},
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("unexpected argument %q: a release is given by --from", c.Args().First())
			}
			return (&command{Context: c, out: c.App.Writer}).run()
		},
	}
}

type command struct {
	*cli.Context
	out io.Writer
	mu  sync.Mutex
}

func (c *command) run() error {
	from := c.StringSlice("from")
	switch {
	case c.Bool("status") || c.Bool("history"):
		return c.show()
	case c.Bool("rollback") && len(from) > 0:
		return errors.New("--rollback needs no release: a machine has kept its version before; --from FILE goes to any")
	}
	if !c.Bool("all") {
		for _, flag := range []string{"parallel", "drain", "drain-timeout", "window", "skip"} {
			if c.IsSet(flag) {
				return fmt.Errorf("--%s is for --all, which upgrades the cluster", flag)
			}
		}
	}
	switch {
	case c.Bool("rollback") && c.Bool("all"):
		return c.all(nil)
	case c.Bool("rollback"):
		return c.one(nil)
	case len(from) == 0:
		return errors.New("what to upgrade to is missing: --from FILE (or --rollback, --status; see kedge upgrade --help)")
	}
	dataDir := c.dataDir()
	keys, err := release.TrustedKeys(release.DefaultKeyFile)
	if err != nil {
		return err
	}
	if _, err := os.Stat(dataDir); err != nil {
		dataDir = "" // Kedge has never run here: downloads go where all temporary files go
	}
	sources, err := rollout.Sources(c.Context.Context, from, dataDir, keys, c.say(""))
	if err != nil {
		return err
	}
	if c.Bool("all") {
		return c.all(sources)
	}
	return c.one(sources)
}

// dataDir is that of the Kedge that runs.
func (c *command) dataDir() string {
	if st, err := rollout.Local(c.String("run-dir")).Status(c.Context.Context); err == nil {
		return st.DataDir
	}
	return c.String("data-dir")
}

// say prints progress, of a node or of all.
func (c *command) say(node string) func(string) {
	return func(text string) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if node != "" {
			text = node + ": " + text
		}
		fmt.Fprintln(c.out, time.Now().Format(time.TimeOnly), text)
	}
}

// one upgrades this machine, or takes it back when there are no sources.
func (c *command) one(sources map[string]rollout.Source) error {
	var source *rollout.Source
	if sources != nil {
		s, ok := sources[upgrade.Arch]
		if !ok {
			return fmt.Errorf("the release is not for this machine, which is %s: give kedge-VERSION-linux-%s.tar.zst", upgrade.Arch, upgrade.Arch)
		}
		source = &s
	}
	req := agent.UpgradeRequest{Check: c.Bool("dry-run"), Back: source == nil, Force: c.Bool("force"), Timeout: c.Duration("timeout")}
	result, err := rollout.One(c.Context.Context, rollout.Local(c.String("run-dir")), source, req, c.say(""))
	if errors.Is(err, agent.ErrNotRunning) && result == nil {
		return c.offline(source)
	}
	if err != nil {
		return err
	}
	if result != nil {
		c.say("")(result.Line() + "; the version before is kept: kedge upgrade --rollback")
	}
	return nil
}

// offline replaces the program of a machine whose Kedge does not run: there is nothing to watch.
func (c *command) offline(source *rollout.Source) error {
	program, err := upgrade.Program()
	if err != nil {
		return err
	}
	keys, err := release.TrustedKeys(release.DefaultKeyFile)
	if err != nil {
		return err
	}
	_, installed := os.Stat(uninstall.Program)
	_, used := os.Stat(c.String("data-dir"))
	switch {
	case program == uninstall.Program:
	case installed == nil:
		return fmt.Errorf("%s is not the program that is installed: run %s upgrade", program, uninstall.Program)
	case used != nil:
		return errors.New("kedge is not installed on this machine: run install.sh of the release")
	}
	staging := upgrade.Staging{Store: upgrade.In(c.String("data-dir")), DataDir: c.String("data-dir"), Program: program, Keys: keys}
	if _, err := os.Stat(staging.DataDir); err != nil {
		staging.DataDir = filepath.Dir(program) // never used yet
	}
	c.say("")("kedge does not run on this machine: its program is exchanged without being tried")
	judge := func(target string) error {
		remarks, err := upgrade.Facts{Server: true, Current: version.Version, Back: source == nil}.Judge(target, c.Bool("force"))
		for _, remark := range remarks {
			c.say("")("remark: " + remark)
		}
		return err
	}
	target := ""
	if source == nil {
		if target, err = staging.Back(c.Context.Context); err != nil {
			return err
		}
		if err := judge(target); err != nil {
			return errors.Join(err, staging.Unstage())
		}
	} else {
		if err := judge(source.Version); err != nil || c.Bool("dry-run") {
			return err
		}
		src, _, err := source.Open()
		if err != nil {
			return err
		}
		defer src.Close()
		rel, err := staging.Stage(c.Context.Context, src, func(release.Info) error { return nil })
		if err != nil {
			return err
		}
		target = rel.Version
	}
	if c.Bool("dry-run") {
		return staging.Unstage()
	}
	if err := staging.Store.Replace(upgrade.Pending{From: version.Version, To: target, Program: program, Back: source == nil}); err != nil {
		return err
	}
	c.say("")(fmt.Sprintf("%s is %s now: start Kedge (systemctl start kedge, rc-service kedge start)", program, target))
	return nil
}

func (c *command) administrator() (*rest.Config, *kubernetes.Clientset, error) {
	file := c.String("kubeconfig")
	if _, err := os.Stat(file); err != nil {
		return nil, nil, fmt.Errorf("an administrator's kubeconfig is needed: run this on a server, or give --kubeconfig: %w", err)
	}
	config, err := clientcmd.BuildConfigFromFlags("", file)
	if err != nil {
		return nil, nil, err
	}
	config.Timeout = 15 * time.Second
	client, err := kubernetes.NewForConfig(config)
	return config, client, err
}

// all upgrades the cluster.
func (c *command) all(sources map[string]rollout.Source) error {
	config, _, err := c.administrator()
	if err != nil {
		return err
	}
	window, err := rollout.ParseWindow(c.String("window"))
	if err != nil {
		return fmt.Errorf("--window: %w", err)
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	o := rollout.Options{Config: config, Sources: sources, Back: sources == nil, By: fmt.Sprintf("%s (pid %d)", host, os.Getpid()), Parallel: c.Int("parallel"), Drain: c.Bool("drain"),
		DrainTimeout: c.Duration("drain-timeout"), Window: window, Skip: c.StringSlice("skip"), Force: c.Bool("force"), Timeout: c.Duration("timeout"),
		DryRun: c.Bool("dry-run"), Say: func(node, text string) { c.say(node)(text) }}
	for _, s := range sources {
		o.Version = s.Version
	}
	if st, err := rollout.Local(c.String("run-dir")).Status(c.Context.Context); err == nil {
		o.Self = st.Node
	}
	version, err := rollout.Run(c.Context.Context, o)
	if err != nil {
		if !errors.Is(err, rollout.ErrNothingChanged) {
			err = fmt.Errorf("%w\nwhat has been done stays so; the same command again goes on with the others", err)
		}
		return err
	}
	if !o.DryRun {
		c.say("")("all machines have " + version)
	}
	return nil
}

// shown is what --status and --history print as JSON.
type shown struct {
	Machine *agent.UpgradeStatus `json:"machine,omitempty"`
	Cluster *rollout.State       `json:"cluster,omitempty"`
	History []upgrade.Result     `json:"history,omitempty"`
}

func (c *command) show() error {
	var s shown
	var err error
	s.Machine, err = rollout.Local(c.String("run-dir")).Status(c.Context.Context)
	if err != nil && !errors.Is(err, agent.ErrNotRunning) {
		return err
	}
	if s.Machine != nil {
		s.History = s.Machine.History
	} else if s.History, err = upgrade.In(c.String("data-dir")).History(); err != nil {
		return err
	}
	var clusterErr error
	if !c.Bool("history") {
		s.Cluster, clusterErr = c.cluster()
	}
	err = output.Write(c.out, c.String("output"), s, func(w io.Writer) error { return s.write(w, time.Now()) })
	return errors.Join(err, clusterErr)
}

// cluster asks for the state of the cluster's upgrade, where there is somebody who may.
func (c *command) cluster() (*rollout.State, error) {
	if _, err := os.Stat(c.String("kubeconfig")); err != nil && !c.IsSet("kubeconfig") {
		return nil, nil
	}
	_, client, err := c.administrator()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(c.Context.Context, 15*time.Second)
	defer cancel()
	state, err := rollout.Load(ctx, client)
	if err != nil {
		err = fmt.Errorf("what the cluster says is not known: %w", err)
	}
	return state, err
}

func (s shown) write(out io.Writer, now time.Time) error {
	if m := s.Machine; m == nil {
		fmt.Fprintln(out, "Kedge does not run on this machine.")
	} else {
		fmt.Fprintf(out, "This machine: %s %s runs %s\n", m.Role, m.Node, m.Version)
		if p := m.Pending; p != nil {
			fmt.Fprintf(out, "upgrade from %s to %s under way since %s, try %d\n", p.From, p.To, p.Started.Local().Format(time.DateTime), p.Tries)
		}
	}
	for _, r := range s.History {
		fmt.Fprintf(out, "%s  %s", r.Ended.Local().Format(time.DateTime), r.Line())
		if r.Snapshot != "" {
			fmt.Fprintf(out, " (datastore before: %s)", r.Snapshot)
		}
		fmt.Fprintln(out)
	}
	if s.Cluster == nil {
		return nil
	}
	fmt.Fprintln(out)
	return s.Cluster.Write(out, now)
}
