// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/utils/clock"
)

// Back-off of restarts: the first is immediate enough not to be noticed, the last keeps a broken component from eating the
// machine; ten quiet minutes make a process new again.
const (
	restartFirst = 200 * time.Millisecond
	restartLast  = 20 * time.Second
	restartReset = 10 * time.Minute
)

// Process describes one child and carries its state. The exported fields are set before Run and not changed.
type Process struct {
	// Name appears in `kedge status`, in the logs and as "kedge [name]" in ps.
	Name string
	// Config is marshalled to RunDir/Name.json (0600) before each start.
	Config func() (any, error)
	// Components that the process consists of; they are shown as waiting until it reports them.
	Components []string
	RunDir     string
	// StopTimeout is how long the process may take after SIGTERM before it is killed.
	StopTimeout time.Duration
	// Suspect names what on this machine may be why the process ended, if anything; may be nil.
	Suspect func() string
	// Output gets what the process writes; nil: where the supervisor writes.
	Output *os.File

	log     *slog.Logger
	changed func()
	done    chan struct{}
	kick    chan string

	mu     sync.Mutex
	status ProcessStatus
}

func (p *Process) init(log *slog.Logger, changed func()) {
	p.log = log.With("process", p.Name)
	p.changed = changed
	if p.changed == nil {
		p.changed = func() {}
	}
	p.done = make(chan struct{})
	p.kick = make(chan string, 1)
	p.mu.Lock() // Status may be asked for before
	p.status = ProcessStatus{Name: p.Name, State: Waiting, Since: time.Now()}
	p.mu.Unlock()
	p.reset(Waiting, "process not started")
}

// Status is a snapshot.
func (p *Process) Status() ProcessStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.status
	s.Components = slices.Clone(s.Components)
	return s
}

func (p *Process) restart(reason string) {
	select {
	case p.kick <- reason:
	default: // one is already under way
	}
}

// run keeps the process alive until ctx ends.
func (p *Process) run(ctx context.Context) {
	defer close(p.done)
	delay := wait.Backoff{Duration: restartFirst, Factor: 2, Jitter: 0.1, Steps: 12, Cap: restartLast}.DelayWithReset(clock.RealClock{}, restartReset)
	for {
		err := p.once(ctx)
		if ctx.Err() != nil {
			p.set(Stopped, 0, "")
			return
		}
		if p.Suspect != nil {
			if why := p.Suspect(); why != "" {
				err = fmt.Errorf("%w; %s", err, why)
			}
		}
		next := delay()
		p.log.Error("process ended, will start it again", "reason", err, "in", next.Round(time.Millisecond))
		p.set(Failed, 0, err.Error())
		select {
		case <-time.After(next):
		case <-ctx.Done():
			p.set(Stopped, 0, "")
			return
		}
	}
}

// once starts the process and waits for its end. The error says why it ended.
func (p *Process) once(ctx context.Context) error {
	file, err := p.writeConfig()
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("status pipe: %w", err)
	}
	defer r.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// /proc/self/exe and not a path: a restarted child is of the supervisor's version also while the file is being replaced.
	cmd := exec.CommandContext(ctx, "/proc/self/exe", file)
	cmd.Args[0] = "kedge [" + p.Name + "]"
	cmd.Env = append(childEnv(os.Environ()), startGC)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if p.Output != nil {
		cmd.Stdout, cmd.Stderr = p.Output, p.Output
	}
	cmd.ExtraFiles = []*os.File{w}
	// Children die with the supervisor. Their own process group keeps a terminal's Ctrl-C from reaching them out of order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = p.StopTimeout

	ended := make(chan error, 1)
	started := make(chan error, 1)
	go func() {
		// The parent-death signal fires when the *thread* that forked ends (prctl(2)): keep it until the child is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		w.Close()
		started <- err
		if err == nil {
			ended <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start: %w", err)
	}
	p.set(Running, cmd.Process.Pid, "")
	reports := make(chan string, 1)
	go func() { reports <- p.readReports(r) }()
	select {
	case err = <-ended:
	case reason := <-p.kick:
		p.log.Info("restarting", "reason", reason)
		cancel(errors.New(reason))
		<-ended
		err = fmt.Errorf("restarted: %s", reason)
	}
	reason := <-reports
	switch {
	case ctx.Err() != nil: // it was told to end
	case reason != "":
		return errors.New(reason)
	case err == nil:
		return errors.New("exit status 0")
	}
	return err
}

// startGC lets the heap of a starting process grow: nearly all of it stays in use, and collecting it again and again costs a
// fifth of the time until the node is ready. SettleMemory sets what holds from then on.
const startGC = "GOGC=400"

// childEnv is the environment without what is meant for the supervisor: components would talk to the service manager
// themselves, or start exporting traces.
func childEnv(env []string) []string {
	return slices.DeleteFunc(env, func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		return name == "NOTIFY_SOCKET" || strings.HasPrefix(name, "WATCHDOG_") || strings.HasPrefix(name, "LISTEN_") || strings.HasPrefix(name, "OTEL_") ||
			strings.HasPrefix(name, "KEDGE_") && strings.HasSuffix(name, "TOKEN") // secret, and they get what they need in a file
	})
}

func (p *Process) writeConfig() (string, error) {
	cfg, err := p.Config()
	if err != nil {
		return "", fmt.Errorf("configuration: %w", err)
	}
	b, err := json.MarshalIndent(cfg, "", " ")
	if err != nil {
		return "", fmt.Errorf("configuration: %w", err)
	}
	file := filepath.Join(p.RunDir, p.Name+".json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		return "", fmt.Errorf("configuration: %w", err)
	}
	return file, nil
}

// readReports takes over what the process says until it ends, and returns why it does, if it says that.
func (p *Process) readReports(r io.Reader) (reason string) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		var c Component
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			p.log.Warn("unreadable status line", "line", lines.Text(), "error", err)
			continue
		}
		if c.Name == "" { // see Child.End
			reason = c.Reason
			continue
		}
		p.report(c)
	}
	return reason
}

// report takes over what the process says of one component.
func (p *Process) report(c Component) {
	p.mu.Lock()
	i := slices.IndexFunc(p.status.Components, func(have Component) bool { return have.Name == c.Name })
	if i < 0 {
		p.status.Components = append(p.status.Components, Component{Name: c.Name})
		i = len(p.status.Components) - 1
	}
	have := &p.status.Components[i]
	if have.State != c.State {
		have.Since = time.Now()
		p.log.Info("component "+string(c.State), "component", c.Name, "reason", c.Reason)
	}
	have.State, have.Reason = c.State, c.Reason
	if p.status.State == Running || p.status.State == Ready {
		state := Ready
		if slices.ContainsFunc(p.status.Components, func(c Component) bool { return c.State != Ready }) {
			state = Running
		}
		if state != p.status.State {
			p.status.State, p.status.Since = state, time.Now()
		}
	}
	p.mu.Unlock()
	p.changed()
}

func (p *Process) set(state State, pid int, exit string) {
	p.mu.Lock()
	now := time.Now()
	switch state {
	case Running:
		if p.status.LastExitAt != nil {
			p.status.Restarts++
		}
	case Failed:
		p.status.LastExit, p.status.LastExitAt = exit, &now
	}
	p.status.State, p.status.PID, p.status.Since = state, pid, now
	p.mu.Unlock()
	switch state {
	case Running:
		p.reset(Waiting, "process is starting")
	case Failed:
		p.reset(Failed, "process ended: "+exit)
	case Stopped:
		p.reset(Stopped, "")
	}
	p.changed()
}

// reset gives all components one state when the process as a whole changed.
func (p *Process) reset(state State, reason string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status.Components = nil
	for _, name := range p.Components {
		p.status.Components = append(p.status.Components, Component{Name: name, State: state, Reason: reason, Since: time.Now()})
	}
}
