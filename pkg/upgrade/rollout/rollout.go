// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/drain"
)

// readyTimeout is how long the cluster may take to see a machine's new version, and that its node is Ready.
const readyTimeout = 2 * time.Minute

// ErrNothingChanged is wrapped by errors of before the first machine.
var ErrNothingChanged = errors.New("nothing was changed")

// Options of an upgrade of a cluster.
type Options struct {
	Config       *rest.Config // of an administrator
	Sources      map[string]Source
	Version      string // of the sources
	Back         bool   // to the version before, without sources
	By           string // who does it, for people
	Self         string // this machine's node: the last of the servers; may be empty
	Parallel     int    // agents at a time
	Drain        bool
	DrainTimeout time.Duration
	Window       Window
	Skip         []string // nodes that stay as they are
	Force        bool     // see upgrade.Facts.Judge; also takes over from somebody who may still be at work
	Timeout      time.Duration
	DryRun       bool
	Say          func(node, text string) // node is empty for what concerns all
}

// rollout is one that is under way.
type rollout struct {
	Options
	client  kubernetes.Interface
	record  *record
	targets map[string]*Target
	last    *State     // of an upgrade before; nil: none
	window  sync.Mutex // held while somebody waits for it to open
}

// Run upgrades a cluster: servers one after the other, then agents; back to the version before the other way round. It stops at the first
// failure; run again, it goes on with those that do not have the version, which it returns.
func Run(ctx context.Context, o Options) (version string, err error) {
	client, err := kubernetes.NewForConfig(o.Config)
	if err != nil {
		return "", err
	}
	r := &rollout{Options: o, client: client, record: &record{client: client}, targets: map[string]*Target{}}
	last, err := Load(ctx, client)
	if err != nil {
		return "", err
	}
	r.last = last
	if err := r.free(last); err != nil {
		return "", err
	}
	nodes, err := r.plan(ctx)
	if err != nil {
		return "", err
	}
	check := r.check
	if r.Back {
		check = r.checkBack
	}
	if err := check(ctx, nodes); err != nil {
		return "", fmt.Errorf("%w: %w", ErrNothingChanged, err)
	}
	if o.DryRun {
		return r.Version, nil
	}
	inherit(nodes, last)
	now := time.Now().UTC()
	r.record.state = State{Version: r.Version, Back: r.Back, Phase: Running, Began: now, By: o.By, Nodes: nodes}
	if err := r.record.change(ctx, func(*State) {}); err != nil {
		return "", err
	}
	work, stop := context.WithCancel(ctx)
	defer stop()
	go r.record.renew(work)
	err = r.all(work, nodes)
	// Also when somebody has given up: others shall see that.
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
	defer cancel()
	return r.Version, errors.Join(err, r.record.change(end, func(s *State) {
		s.Phase, s.Text = Done, ""
		if err != nil {
			s.Phase, s.Text = Failed, err.Error()
		}
	}))
}

// all goes through the plan: servers, then agents; back the other way round.
func (r *rollout) all(ctx context.Context, nodes []Node) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var servers, agents []Node
	for _, n := range nodes {
		switch {
		case n.Phase == Done:
			if err := r.uncordon(ctx, n.Name); err != nil {
				return err
			}
		case n.Role == "server":
			servers = append(servers, n)
		default:
			agents = append(agents, n)
		}
	}
	first := func() error { return r.group(ctx, servers, 1) }
	then := func() error { return r.group(ctx, agents, r.Parallel) }
	if r.Back {
		first, then = then, first
	}
	if err := first(); err != nil {
		return err
	}
	return then()
}

// group upgrades some at a time. The first failure lets those that are under way end, and no other one begin.
func (r *rollout) group(ctx context.Context, nodes []Node, parallel int) error {
	results := make(chan error)
	under := 0
	var errs []error
	for len(nodes) > 0 && len(errs) == 0 || under > 0 {
		if len(nodes) > 0 && len(errs) == 0 && under < max(1, parallel) {
			n := nodes[0]
			nodes = nodes[1:]
			under++
			go func() { results <- r.one(ctx, n) }()
			continue
		}
		if err := <-results; err != nil {
			errs = append(errs, err)
		}
		under--
	}
	return errors.Join(errs...)
}

// one upgrades a machine and keeps its state.
func (r *rollout) one(ctx context.Context, n Node) error {
	if err := r.waitForWindow(ctx); err != nil {
		return err
	}
	say := func(text string) {
		r.Say(n.Name, text)
		r.record.mu.Lock() // stored with the next change of phase, or by renew
		defer r.record.mu.Unlock()
		for i := range r.record.state.Nodes {
			if r.record.state.Nodes[i].Name == n.Name {
				r.record.state.Nodes[i].Text = text
			}
		}
	}
	began := time.Now().UTC()
	if err := r.record.node(ctx, n.Name, func(n *Node) { n.Phase, n.Began, n.Ended, n.Text = Running, &began, nil, "" }); err != nil {
		return err
	}
	err := r.upgrade(ctx, n, say)
	ended := time.Now().UTC()
	storeErr := r.record.node(ctx, n.Name, func(n *Node) {
		n.Phase, n.Ended, n.Text = Done, &ended, ""
		if err != nil {
			n.Phase, n.Text = Failed, err.Error()
		}
	})
	if err != nil {
		err = fmt.Errorf("%s: %w", n.Name, err)
		r.Say(n.Name, "failed: "+err.Error())
	}
	return errors.Join(err, storeErr)
}

// waitForWindow is for the first of those that wait at a time: the others find the window open.
func (r *rollout) waitForWindow(ctx context.Context) error {
	r.window.Lock()
	defer r.window.Unlock()
	for said := false; ctx.Err() == nil; {
		now := time.Now()
		wait := r.Window.Wait(now)
		if wait == 0 {
			if !said {
				return nil
			}
			return r.record.change(ctx, func(s *State) { s.Phase, s.Text = Running, "" })
		}
		if !said {
			said = true
			text := r.Window.until(now, wait)
			r.Say("", "waiting "+text)
			if err := r.record.change(ctx, func(s *State) { s.Phase, s.Text = Waiting, text }); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(min(wait, time.Minute)): // the clock may be set meanwhile
		}
	}
	return context.Cause(ctx)
}

func (r *rollout) upgrade(ctx context.Context, n Node, say func(string)) error {
	t := r.targets[n.Name]
	st, err := t.Status(ctx)
	if err != nil {
		return err
	}
	id, timeout := "", r.Timeout
	switch {
	case st.Pending != nil: // somebody began it, and has gone
		id, timeout = st.Pending.ID, st.Pending.Timeout
	case st.Version != r.Version:
		if id, err = r.begin(ctx, t, st, say); err != nil {
			return err
		}
	}
	if id != "" {
		if _, err := t.Watch(ctx, id, timeout, say); err != nil {
			return err
		}
	}
	if err := r.ready(ctx, n.Name, say); err != nil {
		return err
	}
	if err := r.uncordon(ctx, n.Name); err != nil {
		return err
	}
	say("has " + r.Version)
	return nil
}

// statusSoon waits for an answer of a machine that starts again.
func (t *Target) statusSoon(ctx context.Context) (*agent.UpgradeStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, afterTimeout)
	defer cancel()
	for {
		st, err := t.Status(ctx)
		if err == nil {
			return st, nil
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// begin hands the release over, unless it goes back, and has the machine start again with it.
func (r *rollout) begin(ctx context.Context, t *Target, st *agent.UpgradeStatus, say func(string)) (id string, err error) {
	req := agent.UpgradeRequest{Force: r.Force, Timeout: r.Timeout}
	if r.Back {
		req.Back, req.Info.Version = true, r.Version
	} else if req.SHA256, err = r.send(ctx, t, r.Sources[st.Arch], say); err != nil {
		return "", err
	}
	if r.Drain {
		if err := r.cordon(ctx, t.Name, say); err != nil {
			return "", err
		}
	}
	return t.Ask(ctx, req, say)
}

// send hands the release over.
func (r *rollout) send(ctx context.Context, t *Target, source Source, say func(string)) (sum string, err error) {
	src, size, err := source.Open()
	if err != nil {
		return "", err
	}
	defer src.Close()
	say("sending the release")
	rel, err := t.Send(ctx, src, size, Steps(func(text string) { say("sending: " + text) }))
	if err != nil {
		return "", err
	}
	if rel.SHA256 != source.SHA256 {
		return "", fmt.Errorf("it got another program (%s) than was sent (%s)", rel.SHA256, source.SHA256)
	}
	return rel.SHA256, nil
}

// cordon drains a node, and remembers that it was this that cordoned it.
func (r *rollout) cordon(ctx context.Context, name string, say func(string)) error {
	node, err := r.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if !node.Spec.Unschedulable {
		if err := r.record.node(ctx, name, func(n *Node) { n.Cordon = true }); err != nil {
			return err
		}
	}
	if err := drain.Movable(ctx, r.client, name, r.DrainTimeout, lineWriter(say)); err != nil {
		return fmt.Errorf("drain: %w; the node is cordoned: kedge kubectl uncordon %s", err, name)
	}
	return nil
}

func (r *rollout) uncordon(ctx context.Context, name string) error {
	r.record.mu.Lock()
	i := slices.IndexFunc(r.record.state.Nodes, func(n Node) bool { return n.Name == name })
	cordoned := i >= 0 && r.record.state.Nodes[i].Cordon
	r.record.mu.Unlock()
	if !cordoned {
		return nil
	}
	return drain.Uncordon(ctx, r.client, name)
}

// ready waits until the cluster sees the machine with its new version.
func (r *rollout) ready(ctx context.Context, name string, say func(string)) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	last := errors.New("the API did not answer")
	for said := ""; ; {
		node, err := r.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err == nil {
			if err = nodeProblem(node, r.Version); err == nil {
				return nil
			}
			if err.Error() != said {
				said = err.Error()
				say(said)
			}
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("it runs %s, but the cluster does not see that: %w", r.Version, last)
		case <-time.After(time.Second):
		}
	}
}

// nodeProblem says why a node is not yet what it is to be.
func nodeProblem(node *corev1.Node, want string) error {
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
			return errors.New("its node is not Ready: " + c.Message)
		}
	}
	if have := node.Status.NodeInfo.KubeletVersion; have != want {
		return fmt.Errorf("its node still has version %s", have)
	}
	return nil
}

// lineWriter says what is written to it.
func lineWriter(say func(string)) io.Writer { return lines(say) }

type lines func(string)

// Write says each line.
func (l lines) Write(b []byte) (int, error) {
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line != "" {
			l(line)
		}
	}
	return len(b), nil
}
