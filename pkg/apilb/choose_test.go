// SPDX-License-Identifier: Apache-2.0

package apilb

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// fleet answers the probes of a balancer whose clock is synctest's.
type fleet struct {
	t   *testing.T
	b   *Balancer
	log *lines

	mu     sync.Mutex
	answer map[string]func(context.Context) error
	asked  map[string]int
}

func silent(ctx context.Context) error   { <-ctx.Done(); return ctx.Err() }
func refuses(context.Context) error      { return errors.New("connection refused") }
func answers(context.Context) error      { return nil }
func waits(context.Context) error        { return &NotReadyError{Reason: "etcd"} }
func (f *fleet) at(address string) state { return f.find(address).state }

// noLeader is how the check of etcd behaves during an election: it hangs, and the second question finds the server alive.
func noLeader(ctx context.Context) error { <-ctx.Done(); return &NotReadyError{Reason: "etcd"} }

// simulate runs test in a bubble with a balancer that probes local and the others, all of which are well.
func simulate(t *testing.T, local string, others []string, test func(*fleet)) {
	synctest.Test(t, func(t *testing.T) {
		f := &fleet{t: t, log: &lines{}, answer: map[string]func(context.Context) error{}, asked: map[string]int{}}
		probe := func(ctx context.Context, address string) error {
			f.mu.Lock()
			f.asked[address]++
			answer := f.answer[address]
			f.mu.Unlock()
			if answer == nil {
				answer = answers
			}
			return answer(ctx)
		}
		b, err := New(Config{Listen: "127.0.0.1:1", Local: local, NodeName: "node", File: filepath.Join(t.TempDir(), "f"), Probe: probe, Logger: f.log.logger()})
		if err != nil {
			t.Fatal(err)
		}
		f.b = b
		if err := b.SetServers(others); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { b.probeLoop(ctx) })
		test(f)
		cancel()
		running.Wait()
	})
}

func (f *fleet) set(address string, answer func(context.Context) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer[address] = answer
}

func (f *fleet) find(address string) *server {
	for _, s := range f.b.servers {
		if s.address == address {
			return s
		}
	}
	f.t.Fatalf("no server %s", address)
	return nil
}

// active is the address of the server in use.
func (f *fleet) active() string {
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	return f.b.active.address
}

// connection puts a connection to a server into the books.
func (f *fleet) connection(address string) *link {
	f.t.Helper()
	l := &link{epoch: f.b.epoch, server: f.find(address), backend: &net.TCPConn{}}
	l.touch()
	if err := f.b.add(l); err != nil {
		f.t.Fatal(err)
	}
	return l
}

func (f *fleet) open(l *link) bool {
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	_, ok := l.server.links[l]
	return ok
}

// until waits until cond holds and says how long that took.
func (f *fleet) until(what string, cond func() bool) time.Duration {
	f.t.Helper()
	begin := time.Now()
	for !cond() {
		time.Sleep(10 * time.Millisecond)
		synctest.Wait()
		if time.Since(begin) > time.Hour {
			f.t.Fatalf("not within an hour: %s", what)
		}
	}
	return time.Since(begin)
}

func (f *fleet) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

const (
	one   = "10.0.0.1:6443"
	two   = "10.0.0.2:6443"
	three = "10.0.0.3:6443"
)

// Whenever a server falls silent, its connections are closed in time, also when the others are too slow to be asked first.
func TestDetection(t *testing.T) {
	var worst time.Duration
	for phase := range 20 {
		simulate(t, one, []string{two, three}, func(f *fleet) {
			f.pass(30*time.Second + time.Duration(phase)*50*time.Millisecond)
			l := f.connection(one)
			f.set(one, silent)
			worst = max(worst, f.until("closed", func() bool { return !f.open(l) }))
		})
	}
	t.Log("at most", worst)
	if worst >= limit-100*time.Millisecond {
		t.Errorf("took up to %v", worst)
	}
}

// When two of three servers fall silent together, the second one is not where the connections stay.
func TestDetectionOfTwo(t *testing.T) {
	simulate(t, one, []string{two, three}, func(f *fleet) {
		f.pass(time.Minute)
		first, last := f.b.servers[1].address, f.b.servers[2].address
		f.set(one, silent)
		f.set(first, silent)
		if took := f.until("the third is in use", func() bool { return f.active() == last }); took > 2*limit {
			t.Errorf("took %v", took)
		}
	})
}

// The idle balancer asks no more often than it should: this is what it costs all the time.
func TestProbesPerMinute(t *testing.T) {
	tests := []struct {
		name   string
		others []string
		want   map[string]int
	}{
		{"three servers", []string{two, three}, map[string]int{one: 60, two: 6, three: 6}},
		{"a single one", []string{one}, map[string]int{one: 6}},
	}
	for _, test := range tests {
		simulate(t, one, test.others, func(f *fleet) {
			f.pass(time.Minute + 500*time.Millisecond)
			clear(f.asked)
			f.pass(time.Minute)
			for address, want := range test.want {
				if got := f.asked[address]; got != want {
					t.Errorf("%s: %s was asked %d times, want %d", test.name, address, got, want)
				}
			}
		})
	}
	simulate(t, one, []string{two}, func(f *fleet) {
		f.set(one, refuses)
		f.set(two, refuses)
		f.pass(time.Minute)
		clear(f.asked)
		f.pass(time.Minute)
		if f.asked[one] != 60 || f.asked[two] != 60 {
			t.Errorf("with none ready: %v", f.asked)
		}
	})
}

// The power loss of the etcd leader's machine: the survivors elect a new one meanwhile and are not ready. Connections to the dead server
// end in time all the same, and go to a server that answers.
func TestElection(t *testing.T) {
	simulate(t, one, []string{two, three}, func(f *fleet) {
		f.pass(25 * time.Second)
		l := f.connection(one)
		f.set(one, silent)
		f.set(two, noLeader)
		f.set(three, noLeader)
		if took := f.until("closed", func() bool { return !f.open(l) }); took > limit {
			t.Errorf("took %v", took)
		}
		active := f.active()
		l = f.connection(active)
		f.pass(time.Second)
		f.set(two, answers)
		f.set(three, answers)
		f.pass(time.Minute)
		if f.active() != active || !f.open(l) {
			t.Errorf("%s was left for %s", active, f.active())
		}
	})
}

// An election does not move anything, and a datastore that is away for longer does.
func TestPatience(t *testing.T) {
	simulate(t, one, []string{two, three}, func(f *fleet) {
		f.pass(25 * time.Second)
		l := f.connection(one)
		f.set(one, noLeader)
		f.pass(time.Second)
		f.set(one, answers)
		f.pass(5 * time.Second)
		if f.active() != one || !f.open(l) {
			t.Error("an election was too much")
		}
		f.set(one, noLeader)
		if took := f.until("closed", func() bool { return !f.open(l) }); took > 3*time.Second {
			t.Errorf("took %v", took)
		}
		if f.active() == one {
			t.Error("still in use")
		}
	})
}

// A server that is not ready is left for one that is, not for one that is not either.
func TestNowhereToGo(t *testing.T) {
	simulate(t, one, []string{two, three}, func(f *fleet) {
		f.pass(25 * time.Second)
		l := f.connection(one)
		f.set(one, waits)
		f.set(two, waits)
		f.set(three, silent)
		f.pass(time.Minute)
		if f.active() != one || !f.open(l) || f.at(two) != notReady || f.at(three) != dead {
			t.Errorf("%s is in use", f.active())
		}
		f.set(one, silent)
		f.pass(limit)
		if f.active() != two || f.open(l) {
			t.Errorf("%s is in use", f.active())
		}
		f.set(two, silent)
		l = f.connection(two)
		f.pass(time.Minute)
		if f.active() != two || !f.open(l) {
			t.Error("with none that answers, connections have to stay")
		}
		f.set(three, answers)
		f.pass(limit)
		if f.active() != three || f.open(l) {
			t.Errorf("%s is in use", f.active())
		}
		if got := f.log.count("no server is ready"); got != 1 {
			t.Errorf("log:\n%s", f.log)
		}
	})
}

// The local server gets its connections back after half a minute, later if it fails again and again.
func TestHome(t *testing.T) {
	simulate(t, one, []string{two}, func(f *fleet) {
		f.pass(30 * time.Minute)
		for i, want := range []time.Duration{30 * time.Second, time.Minute, 2 * time.Minute, 4 * time.Minute, 4 * time.Minute} {
			f.set(one, refuses)
			f.until("the other is in use", func() bool { return f.active() == two })
			f.set(one, answers)
			f.until("known to be ready again", func() bool { return f.at(one) == ready })
			f.pass(want - 5*time.Second)
			if f.active() != two {
				t.Errorf("failure %d: home too early", i)
			}
			f.pass(10 * time.Second)
			if f.active() != one {
				t.Errorf("failure %d: not at home", i)
			}
		}
		f.pass(11 * time.Minute)
		f.set(one, refuses)
		f.pass(5 * time.Second)
		f.set(one, answers)
		f.pass(50 * time.Second)
		if f.active() != one {
			t.Error("old failures are not forgotten")
		}
	})
}

// Agents come home one after the other.
func TestHomeOfAgents(t *testing.T) {
	times := map[time.Duration]bool{}
	for range 20 {
		simulate(t, "", []string{one, two}, func(f *fleet) {
			f.pass(30 * time.Minute)
			first := f.b.servers[0].address
			f.set(first, refuses)
			f.until("the other is in use", func() bool { return f.active() != first })
			f.set(first, answers)
			took := f.until("at home", func() bool { return f.active() == first })
			if took < 30*time.Second || took > 3*time.Minute {
				t.Errorf("after %v", took)
			}
			times[took.Truncate(10*time.Second)] = true
		})
	}
	if len(times) < 4 {
		t.Errorf("not spread: %v", times)
	}
}

// A connection that was made past the server in use, since that was slow for a moment, comes home, too, but not while it is busy.
func TestStray(t *testing.T) {
	simulate(t, one, []string{two}, func(f *fleet) {
		f.pass(time.Minute)
		quiet, busy := f.connection(two), f.connection(two)
		for range 100 {
			f.pass(100 * time.Millisecond)
			busy.touch()
		}
		if f.open(quiet) || !f.open(busy) {
			t.Errorf("quiet %t, busy %t", f.open(quiet), f.open(busy))
		}
		f.pass(5 * time.Second)
		if f.open(busy) {
			t.Error("still open")
		}
	})
}

// A process that was stopped itself learns nothing from the probes of that time.
func TestStopped(t *testing.T) {
	simulate(t, one, []string{two}, func(f *fleet) {
		f.pass(30 * time.Second)
		l := f.connection(one)
		late := func(context.Context) error { time.Sleep(15 * time.Second); return context.DeadlineExceeded }
		f.set(one, late)
		f.pass(5 * time.Second)
		f.set(one, answers)
		f.pass(time.Minute)
		if f.active() != one || !f.open(l) {
			t.Error("left the server in use")
		}
		f.set(one, late)
		f.pass(time.Minute)
		if f.active() != two || f.open(l) {
			t.Error("a server that is late again and again was kept")
		}
	})
}

// A server that comes and goes does not flood the log.
func TestLog(t *testing.T) {
	simulate(t, one, []string{two}, func(f *fleet) {
		f.pass(time.Minute)
		for range 300 {
			f.set(one, refuses)
			f.pass(time.Second)
			f.set(one, answers)
			f.pass(time.Second)
		}
		if got := strings.Count(f.log.String(), "\n"); got > 30 {
			t.Errorf("%d lines in ten minutes:\n%s", got, f.log)
		}
	})
	simulate(t, one, []string{one}, func(f *fleet) {
		f.pass(time.Minute)
		for range 300 {
			f.set(one, refuses)
			f.pass(10 * time.Second)
			f.set(one, answers)
			f.pass(10 * time.Second)
		}
		if got := strings.Count(f.log.String(), "\n"); got > 700 {
			t.Errorf("%d lines for 600 changes", got)
		}
	})
}

func TestNotice(t *testing.T) {
	now := time.Now()
	var n notice
	if n.good() || !n.bad(now) || !n.good() || n.good() {
		t.Error("first")
	}
	if n.bad(now.Add(time.Second)) || n.good() {
		t.Error("told again too soon")
	}
	if !n.bad(now.Add(noticeInterval)) || !n.good() {
		t.Error("not told again")
	}
}
