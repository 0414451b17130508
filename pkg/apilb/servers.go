// SPDX-License-Identifier: Apache-2.0

package apilb

import (
	"cmp"
	"context"
	"errors"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// state is what is known of a server, from worst to best.
type state int

const (
	dead     state = iota // does not answer
	unknown               // has not been asked yet
	notReady              // answers, but cannot serve
	ready
)

// A server that failed again within steadyAfter waits twice as long for the return of its connections, up to 2^maxStrikes times.
const (
	steadyAfter = 10 * time.Minute
	maxStrikes  = 3
)

// server is one of the servers and what the probes say of it.
type server struct {
	address string
	local   bool
	join    bool   // known from the join address alone
	place   uint64 // in the order of preference
	removed bool

	state   state
	reason  string        // why it is not ready
	since   time.Time     // of the state
	home    time.Duration // how long it has to be ready until connections come back
	strikes int
	notice  notice

	probing bool
	urgent  bool      // to be asked as soon as possible
	started time.Time // the last probe
	overran bool      // the last probe said nothing, since this process did not get to run

	links map[*link]struct{}
}

// notice keeps what goes back and forth from flooding the log: a failure soon after one that was told is not told, nor is its end.
type notice struct {
	last time.Time
	said bool
}

const noticeInterval = 10 * time.Second

func (n *notice) bad(now time.Time) bool {
	if !n.last.IsZero() && now.Sub(n.last) < noticeInterval {
		return false
	}
	n.last, n.said = now, true
	return true
}

func (n *notice) good() bool {
	said := n.said
	n.said = false
	return said
}

// step is what a change of the state leads to, done after the lock is released.
type step struct {
	cut     []*link
	lines   []line
	changed bool
	wake    bool // probes may be due earlier now
}

type line struct {
	level slog.Level
	text  string
	attrs []any
}

func (o *step) say(level slog.Level, text string, attrs ...any) {
	o.lines = append(o.lines, line{level, text, attrs})
}

func (b *Balancer) finish(out *step) {
	for _, l := range out.cut {
		l.cut()
	}
	for _, l := range out.lines {
		b.log.Log(context.Background(), l.level, l.text, l.attrs...)
	}
	if out.wake {
		b.wake()
	}
	if out.changed && b.cfg.Changed != nil {
		b.cfg.Changed()
	}
}

// adopt makes the servers of the list, with the local one and the join address, those that are known. The caller holds mu.
func (b *Balancer) adopt(list []string, now time.Time, out *step) {
	known := map[string]*server{}
	for _, s := range b.servers {
		known[s.address] = s
	}
	before := b.servers
	b.servers = nil
	add := func(address string, join bool) {
		if address == "" || slices.ContainsFunc(b.servers, func(s *server) bool { return s.address == address }) {
			return
		}
		s := known[address]
		if s == nil {
			s = &server{address: address, state: unknown, reason: "not probed yet", links: map[*link]struct{}{}}
			out.wake = true
		}
		delete(known, address)
		s.local, s.join, s.place = address == b.cfg.Local, join, place(b.cfg.NodeName, address)
		b.servers = append(b.servers, s)
	}
	add(b.cfg.Local, false)
	for _, address := range list {
		add(address, false)
	}
	add(b.cfg.Join, true)
	for _, s := range known {
		s.removed = true
		out.cut = append(out.cut, s.take()...)
		out.say(slog.LevelInfo, "server removed", "address", s.address)
		if s == b.active {
			b.active = nil
		}
	}
	slices.SortFunc(b.servers, func(x, y *server) int {
		return cmp.Or(order(y.local, x.local), order(x.join, y.join), cmp.Compare(x.place, y.place), strings.Compare(x.address, y.address))
	})
	out.changed = !slices.Equal(before, b.servers)
	b.choose(nil, now, out)
}

func order(x, y bool) int {
	switch {
	case x == y:
		return 0
	case x:
		return 1
	}
	return -1
}

func place(node, address string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(node + "\x00" + address)) //nolint:errcheck // a hash takes everything
	// FNV hardly mixes its last bytes into the upper bits, by which numbers are compared, and addresses differ in the last ones.
	x := h.Sum64()
	x = (x ^ x>>33) * 0xff51afd7ed558ccd
	return x ^ x>>33
}

// record takes over the result of a probe that began at started.
func (b *Balancer) record(s *server, err error, started, now time.Time) {
	next := judge(err)
	reason := ""
	if err != nil {
		reason = err.Error()
		if errors.Is(err, context.DeadlineExceeded) {
			reason = "does not answer"
		}
	}
	var out step
	b.mu.Lock()
	s.probing, s.overran = false, false
	if !s.removed {
		if next != s.state {
			b.enter(s, next, reason, started, now, &out)
		}
		s.reason = reason
		b.choose(s, now, &out)
	}
	b.mu.Unlock()
	b.finish(&out)
}

func judge(err error) state {
	var waits *NotReadyError
	switch {
	case err == nil:
		return ready
	case errors.As(err, &waits):
		return notReady
	}
	return dead
}

// enter gives a server another state. It counts from the beginning of the probe: bad news is older than its coming.
func (b *Balancer) enter(s *server, next state, reason string, started, now time.Time, out *step) {
	out.changed, out.wake = true, true
	last := s.state
	switch {
	case next == ready:
		s.home = b.timing.home << s.strikes
		if !s.local && b.timing.spread > 0 {
			s.home += rand.N(b.timing.spread)
		}
		if s.notice.good() && s != b.active { // of the one in use choose tells
			out.say(slog.LevelInfo, "server is back", "address", s.address)
		}
	case last == ready && now.Sub(s.since) >= steadyAfter:
		s.strikes = 0
	case last == ready:
		s.strikes = min(s.strikes+1, maxStrikes)
	}
	if (last == ready || last == unknown) && next != ready && s.notice.bad(now) && s != b.active {
		out.say(slog.LevelInfo, "server is not ready", "address", s.address, "reason", reason)
	}
	s.state, s.since = next, started
}

// choose decides which server is in use and which connections end for it, after news of one server. The caller holds mu.
func (b *Balancer) choose(news *server, now time.Time, out *step) {
	if len(b.servers) == 0 {
		return
	}
	from := b.active
	b.active = b.best(news, now)
	for _, s := range b.servers {
		if s != b.active {
			b.sweep(s, now, out)
		}
	}
	if from != b.active && from != nil {
		out.changed, out.wake = true, true
		attrs := []any{"address", b.active.address, "before", from.address, "closed", len(out.cut)}
		if from.state != ready {
			attrs = append(attrs, "reason", from.reason)
		}
		out.say(slog.LevelInfo, "another server is in use", attrs...)
	}
	b.tellOutage(from, now, out)
}

// tellOutage logs that no server is ready, and the end of that.
func (b *Balancer) tellOutage(from *server, now time.Time, out *step) {
	switch {
	case b.active.state == ready:
		told := b.outage.good() || !b.served
		b.down, b.served = false, true
		if told && (from == nil || from == b.active) {
			out.say(slog.LevelInfo, "server is in use", "address", b.active.address)
		}
	case b.down || slices.ContainsFunc(b.servers, func(s *server) bool { return s.state == ready || s.state == unknown }):
	default:
		b.down = true
		if level := slog.LevelInfo; b.outage.bad(now) {
			if b.served { // and not the start of the machine
				level = slog.LevelWarn
			}
			out.say(level, "no server is ready; connections stay, and new ones try all", "reasons", b.reasons())
		}
	}
}

// best is the server that is in use from now on.
func (b *Balancer) best(news *server, now time.Time) *server {
	first := func(want state) *server {
		if i := slices.IndexFunc(b.servers, func(s *server) bool { return s.state == want }); i >= 0 {
			return b.servers[i]
		}
		return nil
	}
	active := b.active
	switch {
	case active == nil:
		return cmp.Or(first(ready), first(notReady), first(unknown), b.servers[0])
	case active.state == dead:
		return cmp.Or(first(ready), first(notReady), active)
	case active.state == notReady && now.Sub(active.since) >= b.timing.patience && news == active:
		// Not at the news that another one is ready: when an election ends all are, and one of them says so first.
		return cmp.Or(first(ready), active)
	}
	for _, s := range b.servers {
		if s == active || s.settled(now) {
			return s
		}
	}
	return active
}

// settled says that a server has been ready for so long that connections may come to it from others that are ready, too.
func (s *server) settled(now time.Time) bool { return s.state == ready && now.Sub(s.since) >= s.home }

// sweep ends connections to a server that is not in use.
func (b *Balancer) sweep(s *server, now time.Time, out *step) {
	switch a := b.active; {
	case s.state == dead && a.state >= notReady,
		s.state == notReady && a.state == ready && now.Sub(s.since) >= b.timing.patience:
		out.cut = append(out.cut, s.take()...)
	case a.settled(now):
		for l := range s.links {
			if l.homeBy.IsZero() {
				l.homeBy = now.Add(b.timing.force)
			}
			if now.Sub(b.epoch)-l.last() >= b.timing.quiet || !now.Before(l.homeBy) {
				delete(s.links, l)
				out.cut = append(out.cut, l)
			}
		}
	}
}

// take removes and returns all connections of a server.
func (s *server) take() []*link {
	all := make([]*link, 0, len(s.links))
	for l := range s.links {
		all = append(all, l)
	}
	clear(s.links)
	return all
}

func (b *Balancer) reasons() string {
	all := make([]string, 0, len(b.servers))
	for _, s := range b.servers {
		all = append(all, s.address+": "+s.reason)
	}
	return strings.Join(all, "; ")
}

// candidates lists the servers in the order in which a new connection tries them.
func (b *Balancer) candidates() []*server {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := slices.Clone(b.servers)
	slices.SortStableFunc(all, func(x, y *server) int {
		inUse := func(s *server) bool { return s == b.active && s.state != dead }
		return cmp.Or(order(inUse(y), inUse(x)), cmp.Compare(y.state, x.state))
	})
	return all
}
