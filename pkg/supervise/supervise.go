// SPDX-License-Identifier: Apache-2.0

// Package supervise runs Kedge's child processes: each is started, watched, restarted with back-off when it dies, and stopped
// in order. A child is the same executable under another argv[0] ("kedge [etcd]"), gets its configuration as one JSON file and
// tells the supervisor how its components are by lines of JSON on an inherited pipe.
package supervise

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// State is what a component says of itself, or what the supervisor knows of a process.
type State string

const (
	Waiting State = "waiting" // for something else; the reason says for what
	Running State = "running" // started, not yet able to serve
	Ready   State = "ready"
	Failed  State = "failed" // ended or unable to serve; will be tried again
	Stopped State = "stopped"
)

// Component is one part of a process, such as the scheduler in [controlplane].
type Component struct {
	Name   string    `json:"name"`
	State  State     `json:"state"`
	Reason string    `json:"reason,omitempty"` // why it is not ready, or a remark worth knowing when it is
	Since  time.Time `json:"since"`            // of the state, not of the reason
}

// ProcessStatus is what `kedge status` shows of one child process.
type ProcessStatus struct {
	Name       string      `json:"name"`
	State      State       `json:"state"`
	PID        int         `json:"pid,omitempty"`
	Since      time.Time   `json:"since"`
	Restarts   int         `json:"restarts"`
	LastExit   string      `json:"lastExit,omitempty"`
	LastExitAt *time.Time  `json:"lastExitAt,omitempty"`
	Components []Component `json:"components"`
}

// Supervisor holds the processes of one `kedge server` in the order in which they are started; they are stopped in StopOrder.
type Supervisor struct {
	Processes []*Process
	// StopOrder names the processes in the order in which they end; one after the other has StopTimeout to do so.
	StopOrder []string
	// BeforeStop is called with the name of each process before it is told to end; may be nil.
	BeforeStop func(name string)
	// Changed is called after each change of a state, without locks held.
	Changed func()
	Logger  *slog.Logger
}

// Run starts every process and blocks until ctx ends and all processes have stopped in order.
func (s *Supervisor) Run(ctx context.Context) {
	var running sync.WaitGroup
	cancels := map[string]context.CancelFunc{}
	for _, p := range s.Processes {
		// Not derived from ctx: its end must stop the processes one after the other, not all at once.
		pctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		defer cancel()
		cancels[p.Name] = cancel
		p.init(s.Logger, s.Changed)
		running.Go(func() { p.run(pctx) })
	}
	<-ctx.Done()
	for _, name := range s.StopOrder {
		i := slices.IndexFunc(s.Processes, func(p *Process) bool { return p.Name == name })
		if i < 0 {
			continue
		}
		start := time.Now()
		if s.BeforeStop != nil {
			s.BeforeStop(name)
		}
		cancels[name]()
		<-s.Processes[i].done
		s.Logger.Info("stopped", "process", name, "took", time.Since(start).Round(time.Millisecond))
	}
	for _, cancel := range cancels {
		cancel()
	}
	running.Wait()
}

// Restart ends one process so that it starts again at once, for a change that it cannot take up while running.
func (s *Supervisor) Restart(name, reason string) error {
	for _, p := range s.Processes {
		if p.Name == name {
			p.restart(reason)
			return nil
		}
	}
	return fmt.Errorf("there is no process %q", name)
}

// Status is a snapshot of all processes in the order of their start.
func (s *Supervisor) Status() []ProcessStatus {
	all := make([]ProcessStatus, 0, len(s.Processes))
	for _, p := range s.Processes {
		all = append(all, p.Status())
	}
	return all
}
