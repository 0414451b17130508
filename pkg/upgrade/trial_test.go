// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// bench is a machine whose programs are files with their version in them, and whose exec is noted.
type bench struct {
	t     *testing.T
	store Store
	prog  string
	self  string // what runs
	execs []string
	ran   int
}

var errExec = errors.New("exec")

func newBench(t *testing.T) *bench {
	dir := t.TempDir()
	b := &bench{t: t, store: In(filepath.Join(dir, "data")), prog: filepath.Join(dir, "kedge")}
	b.self = b.prog
	b.write(b.prog, "v1")
	return b
}

func (b *bench) write(file, text string) {
	b.t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) read(suffix string) string {
	text, err := os.ReadFile(b.prog + suffix)
	if errors.Is(err, fs.ErrNotExist) {
		return "-"
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return string(text)
}

func (b *bench) begin() {
	b.t.Helper()
	b.write(b.prog+nextSuffix, "v2")
	if _, err := b.store.Begin(Pending{From: "v1", To: "v2", Program: b.prog}); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) pending() *Pending {
	b.t.Helper()
	p, err := b.store.Pending()
	if err != nil {
		b.t.Fatal(err)
	}
	return p
}

func (b *bench) change(f func(*Pending)) {
	b.t.Helper()
	p := b.pending()
	f(p)
	if err := b.store.put(p); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) start(runErr error) error {
	m := machine{
		program: func() (string, error) { return b.self, nil },
		exec:    func(program string) error { b.execs = append(b.execs, filepath.Base(program)); return errExec },
		guard:   func(Store, *Pending) (int, error) { return 0, nil },
		log:     slog.New(slog.DiscardHandler),
	}
	return m.run(b.store, func(err error) bool { return errors.Is(err, context.Canceled) }, func() error { b.ran++; return runErr })
}

// result is the last one.
func (b *bench) result() string {
	b.t.Helper()
	h, err := b.store.History()
	if err != nil || len(h) == 0 {
		b.t.Fatalf("no result: %v", err)
	}
	return h[len(h)-1].Line()
}

func (b *bench) is(program, next, previous string) {
	b.t.Helper()
	if got := [3]string{b.read(""), b.read(nextSuffix), b.read(previousSuffix)}; got != [3]string{program, next, previous} {
		b.t.Errorf("program, next, previous: %v", got)
	}
}

// Without an upgrade under way a start is a start.
func TestOrdinaryStart(t *testing.T) {
	b := newBench(t)
	if err := b.start(nil); err != nil || b.ran != 1 || len(b.execs) != 0 {
		t.Errorf("%v, %d, %v", err, b.ran, b.execs)
	}
	if _, err := os.Stat(b.store.Dir()); err == nil {
		t.Error("it wrote something")
	}
}

// A program that cannot be executed: the old one goes on.
func TestCannotExecute(t *testing.T) {
	b := newBench(t)
	b.begin()
	if err := b.start(nil); err != nil || b.ran != 1 || len(b.execs) != 1 || b.execs[0] != "kedge.next" {
		t.Errorf("%v, %d, %v", err, b.ran, b.execs)
	}
	if got := b.result(); !strings.Contains(got, "failed: it cannot be executed") || b.pending() != nil {
		t.Error(got)
	}
	b.is("v1", "-", "-")
}

// A version that ends without a word is tried three times; a power cut costs a try, too.
func TestTries(t *testing.T) {
	b := newBench(t)
	b.begin()
	for range tries {
		// Where exec succeeds, nothing behind it happens.
		m := machine{program: func() (string, error) { return b.prog, nil }, log: slog.New(slog.DiscardHandler),
			guard: func(Store, *Pending) (int, error) { return 0, errors.New("none") }, exec: func(string) error { panic(errExec) }}
		func() {
			defer func() { _ = recover() }()
			_ = m.run(b.store, nil, func() error { t.Error("the old version went on"); return nil })
		}()
	}
	if err := b.start(nil); err != nil || b.ran != 1 {
		t.Errorf("%v, %d", err, b.ran)
	}
	if got := b.result(); !strings.Contains(got, "ended 3 times") {
		t.Error(got)
	}
	b.is("v1", "-", "-")
}

// What the new version does when its run ends.
func TestUnderTrial(t *testing.T) {
	for name, c := range map[string]struct {
		err   error
		phase Phase // afterwards
		execs int
	}{
		"it fails":            {errors.New("no such flag"), PhaseFailed, 1},
		"it is stopped":       {nil, PhaseTrial, 0},
		"it wants to restart": {context.Canceled, PhaseTrial, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.begin()
			b.self = b.prog + nextSuffix
			if err := b.start(c.err); !errors.Is(err, c.err) {
				t.Error(err)
			}
			p := b.pending()
			if p.Phase != c.phase || len(b.execs) != c.execs || b.ran != 1 || p.Stopped != (c.err == nil) {
				t.Errorf("%+v, %v, %d", p, b.execs, b.ran)
			}
			if c.execs > 0 && (b.execs[0] != "kedge" || !strings.Contains(p.Reason, c.err.Error())) {
				t.Errorf("%v, %s", b.execs, p.Reason)
			}
			if c.phase != PhaseFailed {
				return
			}
			b.self, b.execs = b.prog, nil
			if err := b.start(nil); err != nil || len(b.execs) != 0 || !strings.Contains(b.result(), "no such flag") {
				t.Errorf("%v, %v, %s", err, b.execs, b.result())
			}
			b.is("v1", "-", "-")
		})
	}
}

// A confirmed version has the name of the old one, wherever the power went.
func TestConfirm(t *testing.T) {
	b := newBench(t)
	b.begin()
	p := b.pending()
	if err := b.store.confirm(p); err != nil {
		t.Fatal(err)
	}
	b.is("v2", "-", "v1")
	if got := b.result(); got != "upgrade from v1 to v2 succeeded" || b.pending() != nil {
		t.Error(got)
	}

	// Before the programs were exchanged: the next start tries again.
	b = newBench(t)
	b.begin()
	b.change(func(p *Pending) { p.Phase = PhaseConfirming })
	if err := b.start(nil); err != nil || len(b.execs) != 1 {
		t.Errorf("%v, %v", err, b.execs)
	}

	// After that: it is the new one that starts, and notes it.
	b = newBench(t)
	b.begin()
	b.change(func(p *Pending) { p.Phase = PhaseConfirming })
	if err := errors.Join(place(b.prog, b.prog+previousSuffix), os.Rename(b.prog+nextSuffix, b.prog)); err != nil {
		t.Fatal(err)
	}
	if err := b.start(nil); err != nil || len(b.execs) != 0 || b.ran != 1 || b.result() != "upgrade from v1 to v2 succeeded" {
		t.Errorf("%v, %v, %s", err, b.execs, b.result())
	}
	b.is("v2", "-", "v1")
}

// Another program of the machine has no part in it.
func TestOtherProgram(t *testing.T) {
	b := newBench(t)
	b.begin()
	b.self = "/root/kedge"
	if err := b.start(nil); err != nil || len(b.execs) != 0 || b.ran != 1 || b.pending() == nil {
		t.Errorf("%v, %v", err, b.execs)
	}
}

// A damaged file is no reason not to start.
func TestDamaged(t *testing.T) {
	b := newBench(t)
	b.begin()
	b.write(b.store.pendingFile(), "{")
	if err := b.start(nil); err != nil || b.ran != 1 {
		t.Errorf("%v, %d", err, b.ran)
	}
}

func TestWatch(t *testing.T) {
	for name, c := range map[string]struct {
		missing func(time.Duration) string
		err     error
		after   time.Duration
	}{
		"ready at once":  {func(time.Duration) string { return "" }, nil, 11 * time.Second},
		"never":          {func(time.Duration) string { return "kubelet" }, ErrFailed, 61 * time.Second},
		"restless":       {func(d time.Duration) string { return map[bool]string{true: "etcd"}[d%(8*time.Second) == 0] }, ErrFailed, 64 * time.Second},
		"late, and then": {func(d time.Duration) string { return map[bool]string{true: "etcd"}[d < 55*time.Second] }, nil, 65 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.begin()
			b.change(func(p *Pending) { p.Timeout = time.Minute })
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				w := &Trial{store: b.store, pending: b.pending(), started: start, log: slog.New(slog.DiscardHandler)}
				if err := w.Watch(t.Context(), func() string { return c.missing(time.Since(start)) }); !errors.Is(err, c.err) {
					t.Error(err)
				}
				if took := time.Since(start); took != c.after {
					t.Errorf("after %s", took)
				}
			})
			if c.err == nil {
				b.is("v2", "-", "v1")
			} else {
				b.is("v1", "v2", "-")
			}
		})
	}
}

func TestGuardian(t *testing.T) {
	for name, c := range map[string]struct {
		setup func(*bench)
		alive bool
		old   bool // it is to become the old program
	}{
		"over":            {func(b *bench) { _ = b.store.finish(b.pending()) }, true, false},
		"stopped":         {func(b *bench) { b.change(func(p *Pending) { p.Stopped = true }) }, false, false},
		"another's turn":  {func(b *bench) { b.change(func(p *Pending) { p.Guardian = 1 }) }, true, false},
		"ended":           {func(*bench) {}, false, true},
		"hangs":           {func(*bench) {}, true, true},
		"hangs, managed":  {func(*bench) {}, true, false},
		"ended, managed":  {func(*bench) {}, false, false},
		"failed, by word": {func(b *bench) { _ = b.store.fail(b.pending().ID, "x") }, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.begin()
			b.change(func(p *Pending) { p.Timeout = time.Second })
			c.setup(b)
			proc, err := os.StartProcess("/bin/sleep", []string{"sleep", "1000"}, &os.ProcAttr{})
			if err != nil {
				t.Skip(err)
			}
			watched, err := os.FindProcess(proc.Pid)
			if err != nil {
				t.Fatal(err)
			}
			if !c.alive {
				_ = proc.Kill()
			}
			if !c.alive {
				_, _ = proc.Wait()
			} else {
				defer proc.Wait() //nolint:errcheck // killed below
				defer proc.Kill() //nolint:errcheck // may be dead
			}
			id := b.store
			p := b.pending()
			want := ""
			if p != nil {
				want = p.ID
			}
			synctest.Test(t, func(t *testing.T) {
				g := guardian{store: id, id: want, proc: watched, managed: strings.HasSuffix(name, "managed"), log: slog.New(slog.DiscardHandler)}
				p, err := g.watch(t.Context())
				if err != nil || (p != nil) != c.old {
					t.Errorf("%+v, %v", p, err)
				}
			})
			if strings.HasPrefix(name, "hangs") && b.pending().Phase != PhaseFailed {
				t.Error("it did not fail")
			}
		})
	}
}
