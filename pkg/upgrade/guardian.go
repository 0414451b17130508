// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// restartPatience is how long a service manager may take to start what has ended, where it cannot be told whether there is one.
const restartPatience = 30 * time.Second

// Guard is the process "kedge [upgrade]": it watches a version under trial from outside, ends it when it hangs, and where no service
// manager starts what has ended, it becomes the old program. args are what startGuardian gives.
func Guard(ctx context.Context, args []string, log *slog.Logger) error {
	if len(args) < 4 {
		return errors.New("this process is started by an upgrade, not by hand")
	}
	pid, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	g := guardian{store: Store{args[0]}, id: args[1], args: args[3:], log: log, managed: os.Getenv("INVOCATION_ID") != ""}
	if g.proc, err = os.FindProcess(pid); err != nil { // by a descriptor: the number may be another's later
		return err
	}
	p, err := g.watch(ctx)
	if p == nil || err != nil {
		return err
	}
	log.Error("starting the version before the upgrade, as nobody else does", "version", p.From, "reason", p.Reason)
	return fmt.Errorf("start %s: %w", p.Program, unix.Exec(p.Program, g.args, os.Environ()))
}

type guardian struct {
	store   Store
	id      string
	args    []string
	proc    *os.Process
	managed bool // systemd starts what has ended
	log     *slog.Logger
}

// watch returns the upgrade when this process is to become the old program, and nil when there is nothing left to do.
func (g guardian) watch(ctx context.Context) (*Pending, error) {
	start := time.Now()
	for ; ; time.Sleep(time.Second) {
		p, err := g.store.Pending()
		if err != nil {
			return nil, err
		}
		if ctx.Err() != nil || p == nil || p.ID != g.id || p.Phase == PhaseFailed || p.Stopped || p.Guardian != 0 && p.Guardian != os.Getpid() {
			return nil, nil
		}
		if g.ended() {
			return g.deserted(ctx, p, "it ended before it was ready: see the log")
		}
		if time.Since(start) < p.Timeout+guardianMargin {
			continue
		}
		g.log.Error("the new version hangs: ending it", "version", p.To, "pid", g.proc.Pid)
		reason := fmt.Sprintf("it was not ready within %s, and hung", p.Timeout)
		if err := g.store.fail(g.id, "%s", reason); err != nil {
			return nil, err
		}
		if err := g.proc.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return nil, err
		}
		p.Reason = reason
		return g.deserted(ctx, p, reason)
	}
}

// ended says whether the new version is gone; one that nobody has waited for yet is.
func (g guardian) ended() bool { return errors.Is(g.proc.Signal(unix.Signal(0)), os.ErrProcessDone) }

// deserted waits for somebody to start Kedge again.
func (g guardian) deserted(ctx context.Context, p *Pending, reason string) (*Pending, error) {
	if g.managed {
		return nil, nil
	}
	for begin := time.Now(); time.Since(begin) < restartPatience; time.Sleep(time.Second) {
		now, err := g.store.Pending()
		if err != nil {
			return nil, err
		}
		if ctx.Err() != nil || now == nil || now.ID != g.id || now.Tries != p.Tries || now.Stopped { // somebody has
			return nil, nil
		}
	}
	p.Reason = reason
	return p, g.store.fail(g.id, "%s", reason)
}
