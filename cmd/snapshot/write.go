// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/snapshot"
)

// stepBack lets everything else on the machine go first. What cannot be had is no harm.
func stepBack() { _ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10) }

// write writes a result in the format that was asked for.
func write(c *cli.Context, v any, text func(io.Writer) error) error {
	return output.Write(c.App.Writer, c.String("output"), v, text)
}

func writeTaken(c *cli.Context, t *snapshot.Taken) error {
	return write(c, t, func(out io.Writer) error {
		fmt.Fprintf(out, "saved %s: revision %d, %d entries, %s, verified, in %s\n", t.Location, t.Data.Revision, t.Data.Keys, size(t.Bytes), t.Took)
		if t.Copied != "" {
			fmt.Fprintf(out, "copied to %s\n", t.Copied)
		}
		for _, p := range t.Pruned {
			fmt.Fprintf(out, "removed %s\n", p)
		}
		for _, r := range t.Remarks {
			fmt.Fprintf(out, "remark: %s\n", r)
		}
		return nil
	})
}

func writeEntries(c *cli.Context, entries []snapshot.Entry) error {
	return write(c, entries, func(out io.Writer) error {
		now := time.Now()
		w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
		fmt.Fprintln(w, "NAME\tAGE\tNODE\tREVISION\tSIZE\tKEYS\tLOCATION\tREMARK")
		for _, e := range entries {
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\n", e.Name, duration.HumanDuration(now.Sub(e.Created)), e.Node, e.Data.Revision, size(e.Bytes),
				yesNo(e.HasKeys()), e.Location, e.Problem)
		}
		return w.Flush()
	})
}

func writePublished(c *cli.Context, all map[string][]snapshot.Listed) error {
	return write(c, all, func(out io.Writer) error {
		now := time.Now()
		w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
		fmt.Fprintln(w, "SERVER\tNAME\tAGE\tREVISION\tSIZE\tKEYS\tLOCATION\tREMARK")
		for _, server := range slices.Sorted(maps.Keys(all)) {
			for _, e := range all[server] {
				fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\n", server, e.Name, duration.HumanDuration(now.Sub(e.Created)), e.Revision, size(e.Bytes),
					yesNo(e.Keys), e.Location, e.Problem)
			}
		}
		return w.Flush()
	})
}

func writeMetadata(c *cli.Context, m *snapshot.Metadata, location string, problem error) error {
	verdict := "intact"
	if problem != nil {
		verdict = problem.Error()
	}
	return write(c, struct {
		*snapshot.Metadata
		Location string `json:"location"`
		Verdict  string `json:"verdict"`
	}{m, location, verdict}, func(out io.Writer) error {
		w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
		line := func(what, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", what, fmt.Sprintf(format, args...)) }
		line("name", "%s", m.Name)
		line("location", "%s", location)
		line("content", "%s", verdict)
		line("taken", "%s (%s), on server %s by Kedge %s", m.Created.Local().Format(time.RFC3339), m.Trigger, m.Node, m.Version)
		line("cluster", "CA hash sha256:%s", m.Cluster)
		line("datastore", "revision %d, %d entries, %s, hash %08x, format of etcd %s, cluster %s", m.Data.Revision, m.Data.Keys, size(m.Data.Size), m.Data.Hash,
			cmp.Or(m.Data.Storage, "before 3.6"), m.Data.ClusterID)
		for _, o := range m.Data.Members {
			line("member", "%s %s %s", o.Name, o.ID, strings.Join(o.PeerURLs, " "))
		}
		if m.HasKeys() {
			line("keys", "%s", strings.Join(slices.Sorted(maps.Keys(m.Keys)), " "))
			line("for", "%s", strings.Join(m.Recipients, " "))
		} else {
			line("keys", "none: to be restored only where the keys of the cluster are on the disk")
		}
		return w.Flush()
	})
}

func writePruned(c *cli.Context, p *snapshot.Pruned, dryRun bool) error {
	return write(c, p, func(out io.Writer) error {
		verb := "removed"
		if dryRun {
			verb = "would remove"
		}
		for _, e := range p.Removed {
			fmt.Fprintf(out, "%s %s\n", verb, e.Location)
		}
		for _, e := range p.Broken {
			fmt.Fprintf(out, "does not count, and stays: %s: %s\n", e.Location, e.Problem)
		}
		if len(p.Removed) == 0 {
			fmt.Fprintln(out, "nothing to remove")
		}
		return nil
	})
}

func writeKey(out io.Writer, k *snapshot.RecoveryKey, cluster string, whole bool) error {
	if whole {
		text, err := k.Text(cluster)
		if err != nil {
			return err
		}
		_, err = io.WriteString(out, text)
		return err
	}
	recipients, err := k.Recipients()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(out, strings.Join(recipients, "\n"))
	return err
}

func writeRestored(c *cli.Context, r *snapshot.Restored, o snapshot.RestoreOptions) error {
	return write(c, r, func(out io.Writer) error {
		if o.DryRun {
			return nil
		}
		fmt.Fprintf(out, "restored %s\n", r.Snapshot.Name)
		for _, former := range []string{r.FormerData, r.FormerKeys} {
			if former != "" {
				fmt.Fprintf(out, "what was there before is in %s; delete it when you are sure\n", former)
			}
		}
		fmt.Fprintln(out, "\nNext:\n  1. start Kedge on this machine, and on no other server yet (systemctl start kedge; kedge status)")
		switch {
		case o.ForgetOthers:
			fmt.Fprintln(out, "  2. when it is ready, let new servers join: kedge token create --role server")
		case len(r.Others) > 0:
			fmt.Fprintf(out, "  2. when it is ready, start the other servers (%s) with their ordinary command: they notice that they are not members any\n"+
				"     more, move their data aside and join again. Those that are gone for good: kedge node remove NAME\n", strings.Join(r.Others, ", "))
		}
		return nil
	})
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// size is a number of bytes as people read it.
func size(n int64) string {
	if n < 10<<20 {
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}
