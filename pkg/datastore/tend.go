// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// What Tend goes by. A learner costs the others traffic and keeps further servers from joining.
const (
	tendInterval   = 5 * time.Second
	learnerSilence = 30 * time.Second // without an answer on its peer port
	learnerLife    = 10 * time.Minute // without a promotion
)

// Tend removes learners that nobody is behind any more, until ctx ends: those whose peer port has been silent for 30 seconds and
// those that have not been promoted in ten minutes. One of the servers runs it. While no server is joining it only reads the
// list of members that its own member has.
func (m *Members) Tend(ctx context.Context, log *slog.Logger) { tend(ctx, m.tender(), log) }

func (m *Members) tender() tender {
	return tender{
		learners: func(ctx context.Context) ([]Member, error) {
			members, _, err := m.list(ctx, clientv3.WithSerializable())
			return onlyLearners(members), err
		},
		alive: func(ctx context.Context, l Member) bool { return m.peers.probe(ctx, l.PeerURLs) == serving },
		remove: func(ctx context.Context, l Member) error {
			// It may have been promoted a moment ago.
			members, _, err := m.list(ctx)
			if err != nil {
				return err
			}
			if now, err := find(members, l.ID); err != nil || !now.Learner {
				return nil
			}
			return m.remove(ctx, l)
		},
	}
}

func onlyLearners(members []Member) []Member {
	var learners []Member
	for _, m := range members {
		if m.Learner {
			learners = append(learners, m)
		}
	}
	return learners
}

// tender is what tend does its work with.
type tender struct {
	learners func(context.Context) ([]Member, error)
	alive    func(context.Context, Member) bool
	remove   func(context.Context, Member) error
}

// sighting is what is known of a learner.
type sighting struct {
	first time.Time
	heard time.Time // last answer, or first
}

func tend(ctx context.Context, t tender, log *slog.Logger) {
	seen := map[string]sighting{}
	ticker := time.NewTicker(tendInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		round, cancel := context.WithTimeout(ctx, changeTimeout)
		seen = t.round(round, seen, log)
		cancel()
	}
}

// round looks at all learners once and returns what is known of those that stay.
func (t tender) round(ctx context.Context, seen map[string]sighting, log *slog.Logger) map[string]sighting {
	learners, err := t.learners(ctx)
	if err != nil {
		return seen // without a leader or a member there is nothing to do; others say so
	}
	next := map[string]sighting{}
	for _, l := range learners {
		s, known := seen[l.ID]
		now := time.Now()
		if !known {
			s = sighting{first: now, heard: now}
		}
		if t.alive(ctx, l) {
			s.heard = now
		}
		next[l.ID] = s
		var reason string
		switch {
		case now.Sub(s.heard) >= learnerSilence:
			reason = fmt.Sprintf("its peer port has not answered for %s", now.Sub(s.heard).Round(time.Second))
		case now.Sub(s.first) >= learnerLife:
			reason = fmt.Sprintf("it has not become a voter in %s", learnerLife)
		default:
			continue
		}
		if err := t.remove(ctx, l); err != nil {
			log.Warn("cannot remove a server that does not finish joining", "server", l.label(), "id", l.ID, "error", err)
			continue
		}
		log.Warn("removed a server that did not finish joining; it may join again", "server", l.label(), "id", l.ID, "reason", reason)
	}
	return next
}
