// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// calm is how long everything has to be ready until a new version has proved itself.
	calm = 10 * time.Second
	// hardMargin is what an orderly stop may take after the time is over, and guardianMargin what the new version may take to end itself.
	hardMargin     = 40 * time.Second
	guardianMargin = 60 * time.Second
)

// ErrFailed ends a version under trial that has not proved itself in time.
var ErrFailed = errors.New("the new version did not become ready in time")

// machine is what a start needs of the operating system; tests have another.
type machine struct {
	program func() (string, error)
	exec    func(program string) error // returns only if it fails
	guard   func(s Store, p *Pending) (pid int, err error)
	log     *slog.Logger
}

// Run starts Kedge: as the version that is under trial, if there is one, and as this program otherwise. Nothing of run has happened
// when it becomes another program. restarts tells errors of run by which it wants to start again.
func Run(dataDir string, log *slog.Logger, restarts func(error) bool, run func() error) error {
	m := machine{program: Program, guard: startGuardian, log: log, exec: func(program string) error {
		return unix.Exec(program, os.Args, os.Environ())
	}}
	return m.run(In(dataDir), restarts, run)
}

func (m machine) run(s Store, restarts func(error) bool, run func() error) error {
	p, err := s.Pending()
	if err != nil {
		m.log.Error("an upgrade under way cannot be read: going on with this version", "error", err)
	}
	if p == nil {
		return run()
	}
	self, err := m.program()
	switch {
	case err != nil:
		return err
	case self == p.Next() && p.Phase != PhaseFailed:
		return m.underTrial(s, p, restarts, run)
	case self != p.Program:
		m.log.Warn("an upgrade of another program is under way, and waits for its start", "program", p.Program, "this", self)
		return run()
	}
	go reap(p.Guardian)
	if p.Phase == PhaseConfirming {
		if _, err := os.Lstat(p.Next()); errors.Is(err, fs.ErrNotExist) { // this is the new one: the power went before that was noted
			return errors.Join(s.finish(p), run())
		}
		p.Phase = PhaseTrial
	}
	if p.Phase == PhaseTrial {
		m.try(s, p) // returns only if it fails
	}
	m.log.Error("back to the version before the upgrade", "version", p.From, "was", p.To, "reason", p.Reason)
	if err := s.finish(p); err != nil {
		m.log.Error("the upgrade that failed could not be cleared away", "error", err)
	}
	return run()
}

// try becomes the new version. When it returns, p says why that failed.
func (m machine) try(s Store, p *Pending) {
	fail := func(format string, args ...any) { p.Phase, p.Reason = PhaseFailed, fmt.Sprintf(format, args...) }
	if p.Tries >= tries {
		fail("it ended %d times before it was ready, the last time without saying why: see the log", p.Tries)
		return
	}
	p.Tries++
	p.Stopped, p.Guardian = false, 0
	if err := s.put(p); err != nil {
		fail("the try could not be noted: %v", err)
		return
	}
	// Without a guardian nobody ends a version that hangs but a watchdog: no reason not to try.
	guardian, err := m.guard(s, p)
	if err == nil {
		p.Guardian = guardian
		err = s.put(p)
	}
	if err != nil {
		m.log.Warn("the new version runs without a guardian", "error", err)
	}
	m.log.Info("starting the new version", "version", p.To, "was", p.From, "try", p.Tries, "timeout", p.Timeout)
	fail("it cannot be executed: %v", m.exec(p.Next()))
}

// underTrial is the new version.
func (m machine) underTrial(s Store, p *Pending, restarts func(error) bool, run func() error) error {
	id := p.ID
	_ = os.WriteFile("/proc/self/comm", []byte("kedge"), 0) // not that of the file; a matter of looks
	back := func() error { return fmt.Errorf("start %s: %w", p.Program, m.exec(p.Program)) }
	hard := time.AfterFunc(p.Timeout+hardMargin, func() {
		if err := s.fail(id, "it did not become ready within %s, and did not stop either", p.Timeout); err == nil {
			m.log.Error("going back to the version before the upgrade", "error", back())
		}
	})
	runErr := run()
	hard.Stop()
	now, err := s.Pending()
	switch {
	case err != nil:
		return errors.Join(runErr, err)
	case now == nil || now.ID != id: // it has proved itself meanwhile
		return runErr
	case now.Phase == PhaseFailed:
		return errors.Join(runErr, back())
	case runErr == nil: // somebody stops the service
		now.Stopped = true
		return s.put(now)
	case restarts(runErr):
		return runErr
	}
	return errors.Join(runErr, s.fail(id, "it ended: %v", runErr), back())
}

// fail notes that a version under trial has failed, unless it is over.
func (s Store) fail(id, format string, args ...any) error {
	p, err := s.Pending()
	if err != nil {
		return err
	}
	if p == nil || p.ID != id || p.Phase == PhaseFailed {
		return nil
	}
	p.Phase, p.Reason = PhaseFailed, fmt.Sprintf(format, args...)
	return s.put(p)
}

// Trial is this process's own proof.
type Trial struct {
	store   Store
	pending *Pending
	started time.Time
	log     *slog.Logger
}

// UnderTrial says whether this process is a version under trial; nil if not.
func UnderTrial(dataDir string, started time.Time, log *slog.Logger) (*Trial, error) {
	s := In(dataDir)
	p, err := s.Pending()
	if p == nil || err != nil {
		return nil, err
	}
	if self, err := Program(); err != nil || self != p.Next() {
		return nil, err
	}
	return &Trial{store: s, pending: p, started: started, log: log}, nil
}

// From is the version that it is tried against.
func (t *Trial) From() string { return t.pending.From }

// Watch asks what is missing until nothing has been for a while, and puts the program in its place then; nil, also when ctx ends before.
// It returns ErrFailed when the time is over: this process has to end.
func (t *Trial) Watch(ctx context.Context, missing func() string) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	deadline := t.started.Add(t.pending.Timeout)
	var since time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		what, now := missing(), time.Now()
		switch {
		case what == "" && since.IsZero():
			since = now
		case what == "" && now.Sub(since) >= calm:
			return t.confirm()
		case what != "":
			since = time.Time{}
			if now.After(deadline) {
				if err := t.store.fail(t.pending.ID, "it was not ready within %s: %s", t.pending.Timeout, what); err != nil {
					return err
				}
				return ErrFailed
			}
		}
	}
}

// confirm puts the program in its place.
func (t *Trial) confirm() error {
	if err := t.store.confirm(t.pending); err != nil {
		if failErr := t.store.fail(t.pending.ID, "it was ready, but %v", err); failErr != nil {
			return failErr
		}
		return ErrFailed
	}
	t.log.Info("the new version has proved itself", "version", t.pending.To, "was", t.pending.From, "program", t.pending.Program)
	go reap(t.pending.Guardian)
	return nil
}

func (s Store) confirm(p *Pending) error {
	p.Phase = PhaseConfirming
	if err := s.put(p); err != nil {
		return err
	}
	if err := place(p.Program, p.Previous()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s cannot be kept as %s: %w", p.Program, filepath.Base(p.Previous()), err)
	}
	if err := os.Rename(p.Next(), p.Program); err != nil {
		return fmt.Errorf("%s cannot be replaced: %w", p.Program, err)
	}
	if err := syncDir(filepath.Dir(p.Program)); err != nil {
		return err
	}
	return s.finish(p)
}

// reap waits for the end of a guardian, which this process has as its child since it was another program.
func reap(pid int) {
	if pid > 0 {
		_, _ = unix.Wait4(pid, nil, 0, nil) // after a new start it is another's child
	}
}

// GuardianName is the child process (kedge [upgrade]) that Guard is for.
const GuardianName = "upgrade"

// startGuardian starts a process of this, the old, program, that outlives what this one becomes.
func startGuardian(s Store, p *Pending) (int, error) {
	cmd := exec.Command("/proc/self/exe", append([]string{s.dir, p.ID, strconv.Itoa(os.Getpid())}, os.Args...)...)
	cmd.Args[0] = "kedge [" + GuardianName + "]"
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	return cmd.Process.Pid, nil
}
