// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/history"
	"github.com/kedge-io/kedge/tests/testbed"
)

// What is lost in a fail-over.
const (
	inUse        = "used"   // the server that the agent's load balancer uses
	leading      = "leader" // another one, whose member leads the datastore
	inUseLeading = "both"   // one that is both
	cutOff       = "cut off"
)

// loss is a fail-over to be measured.
type loss struct {
	kind string
	// together: the server in use leads the datastore. Otherwise another one does.
	together bool
	leader   bool // is lost, not the server in use
	network  bool // is lost, not the power: the server does not answer any more, and nothing says so
}

func losses() []loss {
	return []loss{{kind: inUse}, {kind: leading, leader: true}, {kind: inUseLeading, together: true}, {kind: cutOff, together: true, network: true}}
}

const (
	// afterLoss is the time in which a loss may have consequences.
	afterLoss = 5 * time.Second
	// patience of the clients with one request. One that the lost leader had accepted, and not told the others about, gets no
	// answer before that, however soon there is another leader.
	patience = 500 * time.Millisecond
	// soon is the time that everything but measuring may take.
	soon = 3 * time.Minute
)

// failOvers measures how long clients, who write through the load balancer of the agent, wait when servers are lost.
func failOvers(ctx context.Context, o options, f *fleet, client kubernetes.Interface, rec *recorder) error {
	w, err := startWriters(ctx, o, f.kedge, client)
	if err != nil {
		return fmt.Errorf("start the clients: %w", err)
	}
	for _, l := range losses() {
		victim, err := arrange(ctx, f.kedge, l)
		if err != nil {
			return fmt.Errorf("fail-over (%s): %w", l.kind, err)
		}
		harm, undo := victim.PowerCut, victim.Restart
		if l.network {
			harm, undo = victim.Isolate, victim.Join
		}
		if err := w.failOver(ctx, f.kedge, l.kind, rec, harm, undo); err != nil {
			return fmt.Errorf("loss of %s (%s): %w", victim.Name(), l.kind, err)
		}
	}
	return w.finish(ctx)
}

// arrange makes the right server the leader of the datastore, and returns the one to lose.
func arrange(ctx context.Context, c *cluster.Cluster, l loss) (*cluster.Server, error) {
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	st, err := c.Agents[0].Status(ctx)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(c.Servers, func(s *cluster.Server) bool {
		return slices.ContainsFunc(st.APIServers, func(a cluster.APIServer) bool { return a.Active && a.Address == s.IP()+":6443" })
	})
	if i < 0 {
		return nil, fmt.Errorf("%s uses none of the servers: %+v", c.Agents[0].Name(), st.APIServers)
	}
	used, other := c.Servers[i], c.Servers[(i+1)%len(c.Servers)]
	if l.together {
		return used, makeLeader(ctx, c, used)
	}
	if err := makeLeader(ctx, c, other); err != nil || l.leader {
		return other, err
	}
	return used, nil
}

// makeLeader hands the leadership of the datastore to a server, and waits until that is old news.
func makeLeader(ctx context.Context, c *cluster.Cluster, to *cluster.Server) error {
	leader, err := c.Leader(ctx)
	if err != nil || leader == to {
		return err
	}
	members, err := leader.Members(ctx)
	if err != nil {
		return err
	}
	id, err := strconv.ParseUint(members[to.Name()].ID, 16, 64)
	if err != nil {
		return fmt.Errorf("the member of %s: %w", to.Name(), err)
	}
	h, err := newHost(to.Bed(), leader.Machine)
	if err != nil {
		return err
	}
	sockets, err := filepath.Glob(filepath.Join(h.root(), "run/kedge/etcd*.sock"))
	if err != nil || len(sockets) == 0 {
		return fmt.Errorf("no socket of the datastore of %s: %w", leader.Name(), err)
	}
	etcd, err := clientv3.New(clientv3.Config{Endpoints: []string{"unix://" + sockets[0]}, DialTimeout: 5 * time.Second})
	if err != nil {
		return err
	}
	defer etcd.Close()
	if _, err := etcd.MoveLeader(ctx, id); err != nil {
		return fmt.Errorf("make %s the leader: %w", to.Name(), err)
	}
	return pause(ctx, betweenJoins)
}

// writers are clients at work in the agent's machine; see tests/history/writer.
type writers struct {
	node    *cluster.Node
	process *testbed.Process
}

const (
	writerDir     = "/var/lib/writer"
	writerHistory = "/var/log/writer.jsonl"
	namespace     = "bench"
)

func startWriters(ctx context.Context, o options, c *cluster.Cluster, client kubernetes.Interface) (*writers, error) {
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
	if _, err := client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	program, err := os.ReadFile(o.writer)
	if err != nil {
		return nil, err
	}
	credentials, err := c.Servers[0].ReadFile(cluster.Kubeconfig)
	if err != nil {
		return nil, err
	}
	w := &writers{node: c.Agents[0]}
	const bin, kubeconfig = writerDir + "/writer", writerDir + "/kubeconfig"
	if err := errors.Join(w.node.WriteFile(bin, program, 0o755), w.node.WriteFile(kubeconfig, credentials, 0o600)); err != nil {
		return nil, err
	}
	w.process, err = w.node.Spawn(ctx, "/var/log/writer.log", bin, "-kubeconfig", kubeconfig, "-namespace", namespace, "-o", writerHistory,
		"-timeout", patience.String())
	if err != nil {
		return nil, err
	}
	return w, w.goOn(ctx, time.Now())
}

// goOn waits until the clients have written something after a time.
func (w *writers) goOn(ctx context.Context, after time.Time) error {
	return testbed.Wait(ctx, "acknowledged writes", func(context.Context) error {
		h, err := w.history()
		if err != nil {
			return err
		}
		if n := h.Acknowledged(after); n < 20 {
			return fmt.Errorf("%d so far: %v", n, h.Summary())
		}
		return nil
	})
}

// history is what was done until now.
func (w *writers) history() (history.History, error) {
	text, err := w.node.ReadFile(writerHistory)
	if err != nil {
		return nil, err
	}
	return history.Read(bytes.NewReader(text[:bytes.LastIndexByte(text, '\n')+1]))
}

// failOver does harm, records how long no write succeeded, and undoes it.
func (w *writers) failOver(ctx context.Context, c *cluster.Cluster, kind string, rec *recorder, harm, undo func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	event := time.Now()
	if err := harm(ctx); err != nil {
		return err
	}
	if err := pause(ctx, afterLoss); err != nil {
		return err
	}
	if err := w.goOn(ctx, event.Add(afterLoss)); err != nil {
		return err
	}
	h, err := w.history()
	if err != nil {
		return err
	}
	gap, err := h.Gap(event, afterLoss)
	if err != nil {
		return err
	}
	rec.add("failover "+kind, gap.Seconds())
	if err := undo(ctx); err != nil {
		return err
	}
	if err := c.WaitReady(ctx); err != nil {
		return err
	}
	return pause(ctx, betweenJoins)
}

// finish ends the clients, who read everything back, and refuses figures of a cluster that has lost a write.
func (w *writers) finish(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	if err := errors.Join(w.process.Signal(ctx, "TERM"), w.process.Wait(ctx)); err != nil {
		return err
	}
	h, err := w.history()
	if err != nil {
		return err
	}
	if err := h.Check(); err != nil {
		return fmt.Errorf("the cluster broke its promises: %w", err)
	}
	return nil
}
