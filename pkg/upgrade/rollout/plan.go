// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/join/authority"
)

// free says whether somebody else is at work.
func (r *rollout) free(last *State) error {
	if last == nil {
		return nil
	}
	if (last.Phase == Running || last.Phase == Waiting) && !last.Abandoned(time.Now()) && !r.Force {
		return fmt.Errorf("an upgrade to %s is under way, by %s: see kedge upgrade --status; if it is not, wait two minutes, or use --force", last.Version, last.By)
	}
	if last.Phase == Failed && last.Version == r.Version {
		r.Say("", "going on with the upgrade that stopped: "+last.Text)
	}
	return nil
}

// inherit takes over which nodes an upgrade that stopped has left cordoned.
func inherit(nodes []Node, last *State) {
	if last == nil {
		return
	}
	for _, n := range last.Nodes {
		i := slices.IndexFunc(nodes, func(have Node) bool { return have.Name == n.Name })
		if i >= 0 && n.Cordon && n.Phase != Done {
			nodes[i].Cordon = true
		}
	}
}

// plan lists the machines in the order in which they are upgraded.
func (r *rollout) plan(ctx context.Context) ([]Node, error) {
	servers, err := authority.ListServers(ctx, r.client)
	if err != nil {
		return nil, err
	}
	list, err := r.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	var nodes []Node
	seen := map[string]bool{}
	for _, n := range list.Items {
		seen[n.Name] = true
		if slices.Contains(r.Skip, n.Name) {
			continue
		}
		role := "agent"
		if _, ok := servers[n.Name]; ok {
			role = "server"
		}
		nodes = append(nodes, Node{Name: n.Name, Role: role, From: n.Status.NodeInfo.KubeletVersion, Phase: Waiting})
	}
	for name, s := range servers {
		if !seen[name] && s.Version != r.Version && !slices.Contains(r.Skip, name) {
			return nil, fmt.Errorf("%w: the server %s is no node, and can only be upgraded (or taken back) there: kedge upgrade there, then again here with --skip %s", ErrNothingChanged, name, name)
		}
	}
	for _, name := range r.Skip {
		if _, server := servers[name]; !seen[name] && !server {
			return nil, fmt.Errorf("--skip %s: there is no such node", name)
		}
	}
	slices.SortFunc(nodes, func(a, b Node) int {
		role := cmp.Compare(b.Role, a.Role)
		if r.Back {
			role = -role
		}
		return cmp.Or(role, boolCompare(a.Name == r.Self, b.Name == r.Self), cmp.Compare(a.Name, b.Name))
	})
	return nodes, nil
}

func boolCompare(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// check asks every machine before the first one changes, and marks those that have the version.
func (r *rollout) check(ctx context.Context, nodes []Node) error {
	var errs []error
	for i := range nodes {
		n := &nodes[i]
		st, err := r.ask(ctx, n)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if st.Version == r.Version && st.Pending == nil {
			r.has(n)
			continue
		}
		if p := st.Pending; p != nil && p.To == r.Version {
			n.From = p.From
			r.Say(n.Name, "is being upgraded already")
			continue
		}
		source, ok := r.Sources[st.Arch]
		if !ok {
			errs = append(errs, fmt.Errorf("%s is %s: give a release for that, too (--from, several times)", n.Name, st.Arch))
			continue
		}
		req := agent.UpgradeRequest{Check: true, Force: r.Force, Info: source.Info, Signer: source.Signer, Cluster: true}
		if _, err := r.targets[n.Name].Ask(ctx, req, func(text string) { r.Say(n.Name, text) }); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", n.Name, err))
		}
	}
	return errors.Join(errs...)
}

// ask reaches a machine, and asks it which version it runs.
func (r *rollout) ask(ctx context.Context, n *Node) (*agent.UpgradeStatus, error) {
	t, err := Remote(r.Config, n.Name)
	if err != nil {
		return nil, err
	}
	r.targets[n.Name] = t
	st, err := t.Status(ctx)
	if err != nil && r.wasUnderWay(n.Name) {
		r.Say(n.Name, "does not answer, as it was under way: waiting for it")
		st, err = t.statusSoon(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("%s does not answer: %w; mend it, or leave it out: --skip %s", n.Name, err, n.Name)
	}
	n.From = st.Version
	return st, nil
}

// has marks a machine with which nothing has to be done.
func (r *rollout) has(n *Node) {
	n.Phase, n.Text = Done, "has it already"
	r.Say(n.Name, "has "+r.Version+" already")
}

// wasUnderWay says whether the last upgrade was at work on a node when it ended.
func (r *rollout) wasUnderWay(name string) bool {
	return r.last != nil && slices.ContainsFunc(r.last.Nodes, func(n Node) bool { return n.Name == name && n.Phase == Running })
}
