// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/upgrade"
)

// previous is what a machine says of the version before.
type previous struct {
	version string
	err     error
	said    []string
}

// checkBack asks every machine for its version before, decides for one of them, and marks the machines that have it.
func (r *rollout) checkBack(ctx context.Context, nodes []Node) error {
	var errs []error
	before := make([]previous, len(nodes))
	for i := range nodes {
		n, p := &nodes[i], &before[i]
		st, err := r.ask(ctx, n)
		switch {
		case err != nil:
			errs = append(errs, err)
		case st.Pending != nil && st.Pending.Back:
			n.From, p.version = st.Pending.From, st.Pending.To
			r.Say(n.Name, "is going back already")
		default:
			req := agent.UpgradeRequest{Check: true, Back: true, Force: r.Force}
			if p.version, p.err = r.targets[n.Name].Ask(ctx, req, func(text string) { p.said = append(p.said, text) }); p.err == nil && p.version == "" {
				p.err = errors.New("its Kedge is too old for this: kedge upgrade --rollback there, and --skip " + n.Name + " here")
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	var err error
	if r.Version, err = goal(nodes, before, r.last); err != nil {
		return err
	}
	for i := range nodes {
		switch n, p := &nodes[i], before[i]; {
		case n.From == r.Version:
			r.has(n)
		case p.err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", n.Name, p.err))
		case p.version != r.Version:
			errs = append(errs, fmt.Errorf("%s would go back to %s, and not to %s: leave it out (--skip %s), or give the release: kedge upgrade --all --from FILE",
				n.Name, p.version, r.Version, n.Name))
		default:
			for _, text := range p.said {
				r.Say(n.Name, text)
			}
		}
	}
	return errors.Join(errs...)
}

// goal is the version that a cluster goes back to: that of a way back that has begun, else what the machines with the newest version had before.
// Back twice is not forward: who has gone back already stays.
func goal(nodes []Node, before []previous, last *State) (string, error) {
	if last != nil && last.Back && slices.ContainsFunc(nodes, func(n Node) bool { return n.From == last.Version }) {
		return last.Version, nil
	}
	var newest upgrade.Version
	var had []string
	var errs []error
	for i, n := range nodes {
		v, err := upgrade.ParseVersion(n.From)
		if err != nil {
			return "", fmt.Errorf("%s: %w", n.Name, err)
		}
		order := 1
		if i > 0 {
			order = v.Compare(newest)
		}
		if order > 0 {
			newest, had, errs = v, nil, nil
		}
		switch {
		case order < 0:
		case before[i].err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", n.Name, before[i].err))
		case !slices.Contains(had, before[i].version):
			had = append(had, before[i].version)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return "", err
	}
	if len(had) != 1 {
		return "", fmt.Errorf("the machines had different versions before (%s): kedge upgrade --rollback on each, or kedge upgrade --all --from FILE", strings.Join(had, ", "))
	}
	return had[0], nil
}
