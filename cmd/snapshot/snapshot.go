// SPDX-License-Identifier: Apache-2.0

// Package snapshot is the command `kedge snapshot`.
package snapshot

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/server"
	"github.com/kedge-io/kedge/pkg/snapshot"
)

// Command saves the cluster's datastore and brings it back.
func Command() *cli.Command {
	return &cli.Command{
		Name:  "snapshot",
		Usage: "save the cluster, and restore it",
		Description: "Snapshots are files NAME.kedge in data-dir/snapshots of each server, and in a bucket if one is configured. The commands go by the\n" +
			"configuration of the server on this machine, as it runs or ran last; what is given here comes first. See docs/backup.md.",
		Subcommands: []*cli.Command{save(), list(), inspect(), remove(), prune(), recoveryKey(), restore()},
	}
}

// ownOptions are those of `kedge server` that matter to snapshots.
func ownOptions() []string {
	return []string{"config", "data-dir", "run-dir", "snapshot-dir", "snapshot-retention", "snapshot-compress", "snapshot-s3-endpoint", "snapshot-s3-bucket", "snapshot-s3-folder",
		"snapshot-s3-region", "snapshot-s3-credentials", "snapshot-s3-cafile", "snapshot-s3-path-style"}
}

func flags(own ...cli.Flag) []cli.Flag {
	for _, f := range config.Flags(config.RoleServer) {
		if slices.Contains(ownOptions(), f.Names()[0]) {
			own = append(own, f)
		}
	}
	return own
}

// command makes a subcommand whose flags may stand behind its arguments, too.
func command(name, usage, arguments, description string, own []cli.Flag, run func(c *cli.Context, args []string) error) *cli.Command {
	return &cli.Command{Name: name, Usage: usage, ArgsUsage: arguments, Description: description, Flags: flags(own...),
		Action: func(c *cli.Context) error {
			args, err := interspersed(c)
			if err != nil {
				return err
			}
			return run(c, args)
		},
	}
}

// interspersed gives the arguments of a command and takes flags behind them, too, which the library stops at.
func interspersed(c *cli.Context) (args []string, err error) {
	fs := flag.NewFlagSet(c.Command.Name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	for _, f := range c.Command.Flags {
		if err := f.Apply(fs); err != nil {
			return nil, err
		}
	}
	for rest := c.Args().Slice(); len(rest) > 0; {
		if rest[0] == "-" || !strings.HasPrefix(rest[0], "-") {
			args, rest = append(args, rest[0]), rest[1:]
			continue
		}
		if err := fs.Parse(rest); err != nil {
			return nil, err
		}
		rest = fs.Args()
	}
	fs.Visit(func(f *flag.Flag) { err = errors.Join(err, c.Set(f.Name, f.Value.String())) })
	return args, err
}

// settings are those of the server that runs here, or ran last, with what is given on the command line; or those of the configuration that
// it would start with.
func settings(c *cli.Context) (snapshot.Settings, error) {
	runDir := c.String("run-dir")
	if runDir == "" {
		runDir = config.DefaultRunDir
	}
	var known *snapshot.Settings
	if !c.IsSet("config") && !c.IsSet("data-dir") {
		var err error
		if known, err = snapshot.Announced(runDir); err != nil {
			return snapshot.Settings{}, err
		}
	}
	given := slices.DeleteFunc(ownOptions(), func(name string) bool { return !c.IsSet(name) })
	if known != nil && !slices.ContainsFunc(given, func(name string) bool { return name != "run-dir" }) {
		return *known, nil
	}
	// The same options as those of kedge server, of which only some can be given here.
	set := flag.NewFlagSet("server", flag.ContinueOnError)
	for _, f := range config.Flags(config.RoleServer) {
		if err := f.Apply(set); err != nil {
			return snapshot.Settings{}, err
		}
	}
	for _, name := range given {
		if err := set.Set(name, fmt.Sprint(c.Value(name))); err != nil {
			return snapshot.Settings{}, err
		}
	}
	cfg, err := config.Load(cli.NewContext(c.App, set, nil), config.RoleServer)
	if err != nil {
		return snapshot.Settings{}, err
	}
	if known != nil {
		overlay(&known.Snapshots, cfg.Snapshots(), given)
		return *known, nil
	}
	if _, err := agent.Recall(cfg); err != nil {
		return snapshot.Settings{}, err
	}
	return server.SnapshotSettings(cfg), nil
}

// overlay takes over what was given.
func overlay(s *config.Snapshot, from config.Snapshot, given []string) {
	for _, name := range given {
		switch name {
		case "snapshot-dir":
			s.Dir = from.Dir
		case "snapshot-retention":
			s.Retention = from.Retention
		case "snapshot-compress":
			s.Compress = from.Compress
		case "snapshot-s3-endpoint":
			s.S3.Endpoint = from.S3.Endpoint
		case "snapshot-s3-bucket":
			s.S3.Bucket = from.S3.Bucket
		case "snapshot-s3-folder":
			s.S3.Folder = from.S3.Folder
		case "snapshot-s3-region":
			s.S3.Region = from.S3.Region
		case "snapshot-s3-credentials":
			s.S3.CredentialsFile = from.S3.CredentialsFile
		case "snapshot-s3-cafile":
			s.S3.CAFile = from.S3.CAFile
		case "snapshot-s3-path-style":
			s.S3.PathStyle = from.S3.PathStyle
		}
	}
}

func logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// noArguments refuses what only takes flags.
func noArguments(run func(c *cli.Context, s snapshot.Settings) error) func(*cli.Context, []string) error {
	return func(c *cli.Context, args []string) error {
		if len(args) > 0 {
			return fmt.Errorf("unexpected argument %q: only flags are accepted", args[0])
		}
		s, err := settings(c)
		if err != nil {
			return err
		}
		return run(c, s)
	}
}

func save() *cli.Command {
	return command("save", "save the datastore of the cluster now", " ",
		"Writes NAME.kedge, reads it back from the disk and verifies it. If a bucket is configured, it is copied there. Kedge has to run here.",
		[]cli.Flag{
			&cli.StringFlag{Name: "name", Usage: "call it `NAME` instead of TRIGGER-NODE-TIME"},
			&cli.StringFlag{Name: "trigger", Value: string(snapshot.Manual), Hidden: true},
			output.Flag(""),
		},
		noArguments(func(c *cli.Context, s snapshot.Settings) error {
			trigger := snapshot.Trigger(c.String("trigger"))
			if trigger == snapshot.Scheduled {
				stepBack()
			}
			t, err := snapshot.Take(c.Context, s, snapshot.SaveOptions{Name: c.String("name"), Trigger: trigger}, logger())
			if t == nil {
				return err
			}
			return errors.Join(writeTaken(c, t), err)
		}))
}

func list() *cli.Command {
	return command("list", "list the snapshots on this server, and in the bucket", " ", "",
		[]cli.Flag{
			&cli.BoolFlag{Name: "cluster", Usage: "those of all servers, as the cluster knows them (ConfigMap kube-system/" + snapshot.ConfigMap + ")"},
			&cli.StringFlag{Name: "kubeconfig", Value: config.DefaultKubeconfig, Usage: "for --cluster: an administrator's kubeconfig, `FILE`"},
			output.Flag(""),
		},
		noArguments(func(c *cli.Context, s snapshot.Settings) error {
			if c.Bool("cluster") {
				all, err := snapshot.Published(c.Context, c.String("kubeconfig"))
				if err != nil {
					return err
				}
				return writePublished(c, all)
			}
			stores, err := s.Stores()
			if err != nil {
				return err
			}
			entries := []snapshot.Entry{}
			var errs []error
			for _, store := range stores {
				some, err := store.List(c.Context)
				entries, errs = append(entries, some...), append(errs, err)
			}
			return errors.Join(append(errs, writeEntries(c, entries))...)
		}))
}

func inspect() *cli.Command {
	return command("inspect", "show what a snapshot is, and verify it", "NAME|FILE|s3://BUCKET/KEY",
		"Reads it to its end: an exit status of 0 says that it is as it was written.",
		[]cli.Flag{output.Flag("")},
		func(c *cli.Context, args []string) error {
			if len(args) != 1 {
				return errors.New("usage: kedge snapshot inspect NAME|FILE|s3://BUCKET/KEY")
			}
			s, err := settings(c)
			if err != nil {
				return err
			}
			m, location, err := snapshot.Find(c.Context, s, args[0], false)
			if err != nil {
				return err
			}
			_, _, problem := snapshot.Find(c.Context, s, args[0], true)
			return errors.Join(writeMetadata(c, m, location, problem), problem)
		})
}

func remove() *cli.Command {
	return command("delete", "delete snapshots", "NAME|s3://BUCKET/KEY …", "A NAME is that of a snapshot on this server; the copy in the bucket has a name of its own, see list.",
		nil,
		func(c *cli.Context, args []string) error {
			if len(args) == 0 {
				return errors.New("usage: kedge snapshot delete NAME|s3://BUCKET/KEY …")
			}
			s, err := settings(c)
			if err != nil {
				return err
			}
			for _, a := range args {
				store, name, err := snapshot.StoreOf(s, a)
				if err == nil {
					err = store.Delete(c.Context, name)
				}
				if err != nil {
					return err
				}
				fmt.Fprintf(c.App.Writer, "deleted %s of %s\n", name, store)
			}
			publish(c, s)
			return nil
		})
}

func prune() *cli.Command {
	return command("prune", "remove scheduled snapshots beyond those to keep (--snapshot-retention)", " ",
		"The newest intact ones are kept, each is read to its end before it counts. Snapshots that somebody asked for stay.",
		[]cli.Flag{
			&cli.BoolFlag{Name: "dry-run", Usage: "only say what would be removed"},
			output.Flag(""),
		},
		noArguments(func(c *cli.Context, s snapshot.Settings) error {
			cluster, err := s.ThisCluster()
			if err != nil {
				return err
			}
			stores, err := s.Stores()
			if err != nil {
				return err
			}
			var errs []error
			all := &snapshot.Pruned{}
			for _, store := range stores {
				p, err := snapshot.Prune(c.Context, store, cluster, s.Snapshots.Retention, c.Bool("dry-run"))
				errs = append(errs, err)
				if p != nil {
					all.Removed, all.Broken = append(all.Removed, p.Removed...), append(all.Broken, p.Broken...)
				}
			}
			if !c.Bool("dry-run") && len(all.Removed) > 0 {
				publish(c, s)
			}
			return errors.Join(append(errs, writePruned(c, all, c.Bool("dry-run")))...)
		}))
}

// publish shows the change in the cluster. Without an API it is shown later.
func publish(c *cli.Context, s snapshot.Settings) {
	if err := snapshot.Publish(c.Context, s); err != nil {
		fmt.Fprintf(c.App.ErrWriter, "the list of snapshots in the cluster is updated with the next snapshot only: %v\n", err)
	}
}

func recoveryKey() *cli.Command {
	return command("recovery-key", "print the key that a restore on new hardware needs", " ",
		"It is the same for all servers and snapshots of the cluster. Keep it away from the machines: `kedge snapshot recovery-key >FILE` on a stick, or\n"+
			"on paper. It is a key of age(1). Kedge has to run here.",
		[]cli.Flag{
			&cli.StringFlag{Name: "file", Usage: "write it to the new `FILE`, for root only, instead of printing it"},
			&cli.BoolFlag{Name: "new", Usage: "make another one; snapshots taken before need the old one"},
			&cli.StringSliceFlag{Name: "add", Usage: "further snapshots can be decrypted by the owner of `age1…`, too"},
			&cli.StringSliceFlag{Name: "remove", Usage: "and no longer by that of `age1…`"},
			&cli.BoolFlag{Name: "public", Usage: "only print who can decrypt"},
		},
		noArguments(func(c *cli.Context, s snapshot.Settings) (err error) {
			change := snapshot.KeyChange{New: c.Bool("new"), Add: c.StringSlice("add"), Remove: c.StringSlice("remove")}
			// Who only changes who else can decrypt is not given the key.
			change.WriteOut = !c.Bool("public") && len(change.Add) == 0 && len(change.Remove) == 0
			out := c.App.Writer
			if file := c.String("file"); file != "" {
				f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
				if err != nil {
					return err
				}
				defer f.Close()
				out = f
			}
			key, cluster, err := snapshot.ChangeKey(c.Context, s, change)
			if err != nil {
				return err
			}
			return writeKey(out, key, cluster, change.WriteOut)
		}))
}

func restore() *cli.Command {
	return command("restore", "put a snapshot in the place of this server's data", "NAME|FILE|s3://BUCKET/KEY",
		"Kedge must not run here, nor on the other servers. It says what it does; nothing is deleted, former data is moved aside (data-dir/etcd.stale-TIME).\n"+
			"Then start this server, alone; when it is ready, start the others with their ordinary command: they join again by themselves.\n"+
			"On new hardware give the recovery key, and --forget-others if no old server comes back. It can be repeated after an interruption at any point.",
		[]cli.Flag{
			&cli.StringFlag{Name: "recovery-key", Usage: "`FILE` with the recovery key (- is standard input), where the cluster's keys are not on the disk"},
			&cli.BoolFlag{Name: "keep-keys", Usage: "use the keys on this disk although the snapshot was taken with others"},
			&cli.StringSliceFlag{Name: "forget", Usage: "the server `NAME` does not come back: take it out of the cluster"},
			&cli.BoolFlag{Name: "forget-others", Usage: "no other server comes back"},
			&cli.BoolFlag{Name: "force", Usage: "although other servers answer, or this machine is part of another cluster"},
			&cli.BoolFlag{Name: "dry-run", Usage: "only verify the snapshot, and say what would be done"},
			output.Flag(""),
		},
		func(c *cli.Context, args []string) error {
			if len(args) != 1 {
				return errors.New("usage: kedge snapshot restore [flags] NAME|FILE|s3://BUCKET/KEY")
			}
			s, err := settings(c)
			if err != nil {
				return err
			}
			o := snapshot.RestoreOptions{Source: args[0], KeepKeys: c.Bool("keep-keys"), Forget: c.StringSlice("forget"), ForgetOthers: c.Bool("forget-others"),
				Force: c.Bool("force"), DryRun: c.Bool("dry-run"), Say: func(string) {}}
			if c.String("output") == "text" {
				o.Say = func(line string) { fmt.Fprintln(c.App.Writer, line) }
			}
			if o.RecoveryKey, err = readKey(c.String("recovery-key")); err != nil {
				return err
			}
			if !o.DryRun {
				unlock, err := agent.Lock(s.RunDir)
				if err != nil {
					return err
				}
				defer unlock()
			}
			r, err := snapshot.Restore(c.Context, s, o, logger())
			if err != nil {
				return err
			}
			return writeRestored(c, r, o)
		})
}

func readKey(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	in := os.Stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return "", fmt.Errorf("recovery key: %w", err)
		}
		defer f.Close()
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, 64<<10))
	return string(text), err
}
