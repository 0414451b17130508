// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/kedge-io/kedge/tests/testbed"
)

// joiner is a machine that joins a cluster.
type joiner struct {
	host   *host
	figure string
	votes  bool // it becomes a member of the datastore
	start  func(context.Context) (*testbed.Process, error)
}

// startFirst starts a cluster's first server, and returns a client when its node is Ready.
func startFirst(ctx context.Context, s side, h *host) (kubernetes.Interface, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("not done after %s", startTimeout))
	defer cancel()
	p, err := s.start(ctx)
	if err != nil {
		return nil, err
	}
	st := &startup{node: h.name, fresh: true}
	if st.t0, err = h.started(p.PID); err != nil {
		return nil, fmt.Errorf("%w: see %s in the machine", err, p.Log)
	}
	c, err := st.connect(ctx, s, h)
	if err != nil {
		return nil, err
	}
	return c, st.observeJoin(ctx, c, false)
}

// join starts the machine and records the seconds until it is part of the cluster, as the first server says.
func (j *joiner) join(ctx context.Context, c kubernetes.Interface, rec *recorder) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("not done after %s", startTimeout))
	defer cancel()
	before, err := j.host.cpuSeconds()
	if err != nil {
		return err
	}
	p, err := j.start(ctx)
	if err != nil {
		return err
	}
	st := &startup{node: j.host.name, fresh: true}
	if st.t0, err = j.host.started(p.PID); err != nil {
		return fmt.Errorf("%w: see %s in the machine", err, p.Log)
	}
	if err := st.observeJoin(ctx, c, j.votes); err != nil {
		return fmt.Errorf("%w; so far: node Ready %v, voter %v", err, !st.nodeReady.IsZero(), !st.voter.IsZero())
	}
	after, err := j.host.cpuSeconds()
	if err != nil {
		return err
	}
	done := st.nodeReady
	if j.votes {
		rec.add("join voter", st.voter.Sub(st.t0).Seconds())
		if st.voter.After(done) {
			done = st.voter
		}
	}
	rec.add(j.figure, done.Sub(st.t0).Seconds())
	rec.add(j.figure+" cpu", after-before)
	return nil
}

// observeJoin waits until the node is Ready and, if it is to vote, a voter.
func (st *startup) observeJoin(ctx context.Context, c kubernetes.Interface, votes bool) error {
	observers := st.nodeObservers(c)
	if votes {
		observers = append(observers, func(ctx context.Context, events chan<- seen) {
			try(ctx, pollMembers, events, func() (seen, bool) {
				body, err := c.Discovery().RESTClient().Get().AbsPath("/kedge/v1/members").MaxRetries(0).Timeout(time.Second).DoRaw(ctx)
				ok := err == nil && isVoter(body, st.node)
				return seen{voter: ok}, ok
			})
		})
	}
	return st.gather(ctx, func() bool { return !st.nodeReady.IsZero() && (!votes || !st.voter.IsZero()) }, observers)
}

// pollMembers is the time between two questions for the members: they cost the first server's processor, on which the joiner runs, too.
const pollMembers = 50 * time.Millisecond

// isVoter tells whether a list of the datastore's members has this one, and not as a learner.
func isVoter(body []byte, name string) bool {
	var list struct {
		Members []struct {
			Name    string
			Learner bool
		}
	}
	if err := json.Unmarshal(body, &list); err != nil {
		return false
	}
	for _, m := range list.Members {
		if m.Name == name {
			return !m.Learner
		}
	}
	return false
}
