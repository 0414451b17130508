// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/kedge-io/kedge/pkg/pki"
)

const (
	// turnTime is what a server has to go on to a phase: it restarts its datastore member and its control plane. One that is off does not.
	turnTime = 2 * time.Minute
	// rotatorInterval is how often a change that is under way is looked at, beside whenever something happens to it.
	rotatorInterval = 10 * time.Second
)

// Rotator moves a change of the CAs on, where the leadership is: from server to server, and from phase to phase when all have followed. What
// it knows is in the cluster: another leader goes on where it was.
type Rotator struct {
	Client kubernetes.Interface
	Logger *slog.Logger
}

// Run blocks until ctx ends. Without a change under way it does nothing but to follow the registry.
func (c *Rotator) Run(ctx context.Context) error {
	kick := make(chan struct{}, 1)
	poke := func() {
		select {
		case kick <- struct{}{}:
		default:
		}
	}
	go WatchRegistry(ctx, c.Client, func(map[string]Server, error) { poke() }, func(*Rotation, error) { poke() })
	for {
		var again <-chan time.Time
		busy, err := c.step(ctx, time.Now())
		if err != nil && ctx.Err() == nil {
			c.Logger.Warn("the change of the CAs does not go on", "error", err)
		}
		if busy || err != nil {
			again = time.After(rotatorInterval)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-kick:
		case <-again:
		}
	}
}

// step looks at what is under way, if anything, and moves it on if it can.
func (c *Rotator) step(ctx context.Context, now time.Time) (busy bool, err error) {
	r, err := GetRotation(ctx, c.Client)
	if IsNoRegistry(err) || err == nil && (r == nil || !r.Finished.IsZero()) {
		return false, nil
	}
	if err != nil {
		return true, err
	}
	servers, agents, err := Laggards(ctx, c.Client, r)
	if err != nil {
		return true, err
	}
	return true, UpdateRotation(ctx, c.Client, func(have *Rotation) (*Rotation, error) {
		if have == nil || have.ID != r.ID || have.Phase != r.Phase || have.Turn != r.Turn {
			return nil, errUnchanged // somebody else was faster: look again
		}
		before := have.Phase
		if !have.next(servers, agents, now) {
			return nil, errUnchanged
		}
		c.Logger.Info("change of the CAs", "id", have.ID, "phase", have.Phase, "turn", have.Turn, "before", before)
		return have, nil
	})
}

// next moves the rotation on, given those who have not followed. It returns whether there was something to do.
func (r *Rotation) next(servers, agents []string, now time.Time) bool {
	waiting := servers
	switch r.Phase {
	case pki.PhaseTrust: // who was away catches up later: what the new CAs issue is signed by the old ones, too
		waiting = slices.DeleteFunc(slices.Clone(servers), func(s string) bool { return slices.Contains(r.Away, s) })
	case pki.PhaseDone:
		if r.Force {
			waiting = slices.DeleteFunc(slices.Clone(servers), func(s string) bool { return slices.Contains(r.Away, s) })
		}
	}
	if len(waiting) > 0 {
		if slices.Contains(waiting, r.Turn) && now.Sub(r.TurnSince) < turnTime {
			return false
		}
		if slices.Contains(waiting, r.Turn) && !slices.Contains(r.Away, r.Turn) {
			r.Away = append(r.Away, r.Turn)
			if waiting = slices.DeleteFunc(slices.Clone(waiting), func(s string) bool { return s == r.Turn }); len(waiting) == 0 {
				r.Turn = ""
				return true
			}
		}
		// The one after the last, so that one that is off does not keep the others waiting.
		i := slices.IndexFunc(waiting, func(s string) bool { return s > r.Turn })
		if r.Turn = waiting[0]; i >= 0 {
			r.Turn = waiting[i]
		}
		r.TurnSince = now
		return true
	}
	r.Turn, r.TurnSince = "", time.Time{}
	switch r.Phase {
	case pki.PhaseTrust:
		r.Phase, r.Away = pki.PhaseIssue, nil
	case pki.PhaseIssue:
		r.Phase, r.Away, r.DropAfter = PhaseRenew, nil, now.Add(r.Overlap)
	case PhaseRenew:
		if now.Before(r.DropAfter) || len(agents) > 0 && !r.Force {
			return false
		}
		r.Phase, r.Away = pki.PhaseDone, nil
	case pki.PhaseDone:
		r.Finished = now
	}
	return true
}
