// SPDX-License-Identifier: Apache-2.0

package ha

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/history"
	"github.com/kedge-io/kedge/tests/testbed"
)

// load is clients at work in a machine; see tests/history/writer.
type load struct {
	t       *testing.T
	node    *cluster.Node
	ns      string
	process *testbed.Process
	file    string // the history
}

var writerProgram = sync.OnceValues(func() ([]byte, error) {
	return cluster.Build(context.Background(), "github.com/kedge-io/kedge/tests/history/writer")
})

// startLoad lets clients write through the load balancer of the agent, and waits until they do.
func startLoad(t *testing.T, c *cluster.Cluster) *load {
	t.Helper()
	return startLoadOn(t, c, c.Agents[0])
}

func startLoadOn(t *testing.T, c *cluster.Cluster, n *cluster.Node) *load {
	t.Helper()
	l := spawnLoad(t, n, c.Servers[0], c.Servers[0].Namespace(t), "writer")
	l.acknowledged(time.Now(), 20)
	return l
}

// readBeside lets clients of the agent read, from one server, what l writes.
func (l *load) readBeside(c *cluster.Cluster, s *cluster.Server) *load {
	l.t.Helper()
	return spawnLoad(l.t, c.Agents[0], s, l.ns, "reader-"+s.Name(), "-read-only", "-readers", "2", "-server", s.URL())
}

func spawnLoad(t *testing.T, n *cluster.Node, admin *cluster.Server, ns, name string, flags ...string) *load {
	t.Helper()
	program, err := writerProgram()
	if err != nil {
		t.Fatal(err)
	}
	kubeconfig, err := admin.ReadFile(cluster.Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	const bin, credentials = "/usr/local/bin/writer", "/etc/writer.kubeconfig"
	_, missing := n.ReadFile(bin)
	if missing != nil {
		missing = n.WriteFile(bin, program, 0o755)
	}
	if err := errors.Join(missing, n.WriteFile(credentials, kubeconfig, 0o600)); err != nil {
		t.Fatal(err)
	}
	l := &load{t: t, node: n, ns: ns, file: path.Join("/var/log", name+"-"+ns+".jsonl")}
	args := append([]string{bin, "-kubeconfig", credentials, "-namespace", ns, "-o", l.file}, flags...)
	if l.process, err = n.Spawn(cluster.Within(t, minute), strings.TrimSuffix(l.file, ".jsonl")+".log", args...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if running, err := l.process.Running(ctx); running && err == nil { // the test has failed
			_ = l.process.Signal(ctx, "KILL")
		}
	})
	return l
}

// history is what was done until now.
func (l *load) history() (history.History, error) {
	text, err := l.node.ReadFile(l.file)
	if err != nil {
		return nil, err
	}
	return history.Read(bytes.NewReader(text[:bytes.LastIndexByte(text, '\n')+1]))
}

// acknowledged waits until n writes that began after a time are acknowledged.
func (l *load) acknowledged(after time.Time, n int) {
	l.t.Helper()
	err := testbed.Wait(cluster.Within(l.t, minute), fmt.Sprintf("%d writes after %s", n, after.Format("15:04:05.000")), func(context.Context) error {
		h, err := l.history()
		if err != nil {
			return err
		}
		if got := h.Acknowledged(after); got < n {
			return fmt.Errorf("%d are acknowledged; so far: %v", got, h.Summary())
		}
		return nil
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// outage tells how long no write succeeded because of what happened at a time, and fails the test if that is more than limit.
func (l *load) outage(what string, event time.Time, limit time.Duration) {
	l.t.Helper()
	h, err := l.history()
	if err != nil {
		l.t.Fatal(err)
	}
	gap, err := h.Gap(event, 15*time.Second)
	l.t.Logf("%s: %s without a write", what, gap.Round(time.Millisecond))
	if err != nil || gap > limit {
		l.t.Errorf("%s: %s without a write, more than %s: %v", what, gap, limit, err)
	}
}

// firstAfter logs how long after an event the first write was acknowledged.
func (l *load) firstAfter(what string, event time.Time) {
	l.t.Helper()
	h, err := l.history()
	if err != nil {
		l.t.Fatal(err)
	}
	d, ok := h.FirstAfter(event)
	l.t.Logf("first write %s after %s (%t)", d.Round(time.Millisecond), what, ok)
}

// finish ends the clients, which read everything back, and checks the history of them and of others beside them.
func (l *load) finish(beside ...*load) history.History {
	l.t.Helper()
	var all history.History
	for _, l := range append([]*load{l}, beside...) {
		if err := errors.Join(l.process.Signal(cluster.Within(l.t, minute), "TERM"), l.process.Wait(cluster.Within(l.t, 90*time.Second))); err != nil {
			l.t.Fatal(err)
		}
		said, err := l.node.ReadFile(l.process.Log)
		if err != nil || !strings.Contains(string(said), "everything was read back") {
			l.t.Fatalf("the clients failed: %s, %v", said, err)
		}
		h, err := l.history()
		if err != nil {
			l.t.Fatal(err)
		}
		sum := h.Summary()
		for _, what := range slices.Sorted(maps.Keys(sum)) {
			l.t.Logf("%s: %d × %s", l.file, sum[what], what)
		}
		all = append(all, h...)
	}
	if err := all.Check(); err != nil {
		l.t.Errorf("the cluster broke its promises:\n%v", err)
	}
	return all
}

// refused lists answers that no retry cures: the client did nothing wrong.
func refused(h history.History) []string {
	var bad []string
	wrong := regexp.MustCompile(`^[a-z]+ [a-z]+: (400|401|403|404|405|406|410|415|422) `)
	for what, n := range h.Summary() {
		if wrong.MatchString(what) {
			bad = append(bad, fmt.Sprintf("%d × %s", n, what))
		}
	}
	return bad
}
