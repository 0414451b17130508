// SPDX-License-Identifier: Apache-2.0

package apilb

import (
	"context"
	"sync"
	"time"
)

const (
	// urgentGap is the shortest time between two probes of a server.
	urgentGap = 250 * time.Millisecond
	// lateBy is how much later than its timeout a probe may end before it says more about this machine than about the server.
	lateBy = 500 * time.Millisecond
)

// probeLoop starts the probes that are due until ctx ends, and waits for those that run.
func (b *Balancer) probeLoop(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-b.kick:
		}
		servers, inUse, wait := b.due(time.Now())
		for _, s := range servers {
			running.Go(func() { b.probe(ctx, s, s == inUse) })
		}
		timer.Reset(wait)
	}
}

// due gives the servers to probe now, marked as such, the one in use, and when to ask again.
func (b *Balancer) due(now time.Time) (servers []*server, inUse *server, wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	wait = b.timing.rare
	for _, s := range b.servers {
		every := b.every(s)
		if s.urgent {
			every = urgentGap
		}
		left := s.started.Add(every).Sub(now)
		switch {
		case left > 0:
		case s.probing:
			left = urgentGap
		default:
			s.probing, s.urgent, s.started = true, false, now
			servers = append(servers, s)
			left = b.every(s)
		}
		wait = min(wait, left)
	}
	return servers, b.active, wait
}

// every is the time between two probes of a server: short for the one in use while there is another one to go to, and for all while a
// better one is looked for.
func (b *Balancer) every(s *server) time.Duration {
	if b.active.state == ready && (s != b.active || len(b.servers) == 1) {
		return b.timing.rare
	}
	return b.timing.interval
}

func (b *Balancer) probe(ctx context.Context, s *server, inUse bool) {
	started := time.Now()
	pctx, cancel := context.WithTimeout(ctx, b.timing.timeout)
	defer cancel()
	if inUse {
		defer time.AfterFunc(b.timing.suspect, func() { b.alarm(s) }).Stop()
	}
	err := b.cfg.Probe(pctx, s.address)
	now := time.Now()
	switch {
	case ctx.Err() != nil:
	case err != nil && now.Sub(started) > b.timing.timeout+lateBy && b.again(s):
	default:
		b.record(s, err, started, now)
	}
}

// again has a probe repeated that ended far too late: this process was stopped or starved, so that it could not see the answer. A second
// time in a row it counts, and again returns false.
func (b *Balancer) again(s *server) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.overran {
		return false
	}
	s.probing, s.urgent, s.overran = false, true, true
	b.wake()
	return true
}

// alarm has all servers probed, except the one that is being asked, since something is wrong with that one. nil stands for no exception.
func (b *Balancer) alarm(except *server) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.servers {
		s.urgent = s.urgent || s != except && !s.probing
	}
	b.wake()
}

func (b *Balancer) wake() {
	select {
	case b.kick <- struct{}{}:
	default:
	}
}
