// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/procfs"
)

// childConfig tells the test binary, started as a child, how to behave.
type childConfig struct {
	Exit      int    `json:"exit"` // end with this status after reporting ready; 0: stay
	Reason    string // what to say before that, if anything
	Stubborn  bool   `json:"stubborn"`  // ignore SIGTERM
	Supervise bool   `json:"supervise"` // be a supervisor with one child, whose pid goes to PIDFile
	PIDFile   string
}

// TestMain lets the test binary be what a supervisor starts: real processes, no stand-ins.
func TestMain(m *testing.M) {
	if _, ok := ChildName(os.Args[0]); ok {
		os.Exit(child(os.Args[1:]))
	}
	os.Exit(m.Run())
}

func child(args []string) int {
	var cfg childConfig
	c, err := NewChild(args, &cfg)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 99
	}
	if cfg.PIDFile != "" && !cfg.Supervise {
		if err := os.WriteFile(cfg.PIDFile, []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
			return 98
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if cfg.Stubborn {
		ctx = context.Background()
	}
	if cfg.Supervise {
		run(ctx, &Process{Name: "grandchild", RunDir: filepath.Dir(cfg.PIDFile), StopTimeout: time.Second,
			Config: func() (any, error) { return childConfig{PIDFile: cfg.PIDFile}, nil }})
		return 0
	}
	c.Report("part", Running, "warming up")
	c.Report("part", Ready, "")
	if cfg.Reason != "" {
		c.End(errors.New(cfg.Reason))
	}
	if cfg.Exit != 0 {
		return cfg.Exit
	}
	<-ctx.Done()
	return 0
}

func run(ctx context.Context, processes ...*Process) *Supervisor {
	s := &Supervisor{Processes: processes, Logger: slog.New(slog.DiscardHandler)}
	for _, p := range processes {
		s.StopOrder = append(s.StopOrder, p.Name)
	}
	s.Run(ctx)
	return s
}

// start runs a supervisor in the background; the returned function stops it and waits.
func start(t *testing.T, log *slog.Logger, order []string, processes ...*Process) (*Supervisor, func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	s := &Supervisor{Processes: processes, StopOrder: order, Logger: log}
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return s, func() { cancel(); <-done }
}

func process(t *testing.T, name string, cfg childConfig) *Process {
	return &Process{Name: name, RunDir: t.TempDir(), StopTimeout: 5 * time.Second, Components: []string{"part"},
		Config: func() (any, error) { return cfg, nil }}
}

// eventually waits for a condition, not for a time.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 seconds: %s", what)
		}
	}
}

func alive(pid int) bool { return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }

func TestReadyAndStop(t *testing.T) {
	p := process(t, "good", childConfig{})
	s, stop := start(t, slog.New(slog.DiscardHandler), []string{"good"}, p)
	eventually(t, "ready", func() bool { return s.Status()[0].State == Ready })
	st := s.Status()[0]
	if st.Restarts != 0 || st.PID == 0 || len(st.Components) != 1 || st.Components[0].State != Ready {
		t.Errorf("got %+v", st)
	}
	stop()
	if st := s.Status()[0]; st.State != Stopped || alive(st.PID) && st.PID != 0 {
		t.Errorf("after the stop: %+v", st)
	}
}

func TestRestartAfterExit(t *testing.T) {
	p := process(t, "bad", childConfig{Exit: 3})
	p.Suspect = func() string { return "no space" }
	s, _ := start(t, slog.New(slog.DiscardHandler), []string{"bad"}, p)
	eventually(t, "second restart", func() bool { return s.Status()[0].Restarts >= 2 })
	if st := s.Status()[0]; st.LastExit != "exit status 3; no space" || st.LastExitAt == nil {
		t.Errorf("got %+v", st)
	}
}

// What a process says before it ends is what people get to see, not its status.
func TestReasonOfExit(t *testing.T) {
	s, _ := start(t, slog.New(slog.DiscardHandler), []string{"bad"}, process(t, "bad", childConfig{Exit: 3, Reason: "kubelet: no runtime"}))
	eventually(t, "a restart", func() bool { return s.Status()[0].Restarts >= 1 })
	st := s.Status()[0]
	if st.LastExit != "kubelet: no runtime" || len(st.Components) != 1 {
		t.Errorf("got %+v", st)
	}
}

func TestRestartAfterKill(t *testing.T) {
	s, _ := start(t, slog.New(slog.DiscardHandler), []string{"good"}, process(t, "good", childConfig{}))
	eventually(t, "ready", func() bool { return s.Status()[0].State == Ready })
	first := s.Status()[0].PID
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "ready again", func() bool { st := s.Status()[0]; return st.State == Ready && st.PID != first })
	if st := s.Status()[0]; st.Restarts != 1 || st.LastExit != "signal: killed" {
		t.Errorf("got %+v", st)
	}
}

func TestRestartOnDemand(t *testing.T) {
	s, _ := start(t, slog.New(slog.DiscardHandler), []string{"good"}, process(t, "good", childConfig{}))
	eventually(t, "ready", func() bool { return s.Status()[0].State == Ready })
	if err := s.Restart("good", "new certificate"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "restarted", func() bool { st := s.Status()[0]; return st.State == Ready && st.Restarts == 1 })
	if got := s.Status()[0].LastExit; got != "restarted: new certificate" {
		t.Errorf("last exit %q", got)
	}
	if err := s.Restart("other", ""); err == nil {
		t.Error("no error for a process that does not exist")
	}
}

func TestConfigurationErrorIsTriedAgain(t *testing.T) {
	p := process(t, "late", childConfig{})
	tries := 0
	p.Config = func() (any, error) {
		if tries++; tries < 3 {
			return nil, errors.New("not yet")
		}
		return childConfig{}, nil
	}
	s, _ := start(t, slog.New(slog.DiscardHandler), []string{"late"}, p)
	eventually(t, "ready", func() bool { return s.Status()[0].State == Ready })
	if got := s.Status()[0].LastExit; got != "configuration: not yet" {
		t.Errorf("last exit %q", got)
	}
}

// order keeps the names of stopped processes in the order of the log.
type order struct {
	slog.Handler
	names *[]string
}

func (o order) Enabled(context.Context, slog.Level) bool { return true }
func (o order) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "stopped" {
		r.Attrs(func(a slog.Attr) bool {
			if a.Key == "process" {
				*o.names = append(*o.names, a.Value.String())
			}
			return true
		})
	}
	return nil
}
func (o order) WithAttrs([]slog.Attr) slog.Handler { return o }

func TestStopOrder(t *testing.T) {
	var names []string
	want := []string{"c", "a", "b"}
	s, stop := start(t, slog.New(order{slog.DiscardHandler, &names}), want,
		process(t, "a", childConfig{}), process(t, "b", childConfig{}), process(t, "c", childConfig{}))
	eventually(t, "all ready", func() bool {
		return !slices.ContainsFunc(s.Status(), func(st ProcessStatus) bool { return st.State != Ready })
	})
	stop()
	if !slices.Equal(names, want) {
		t.Errorf("stopped in the order %v, want %v", names, want)
	}
}

// Before each process is told to end there is time for what needs it: it runs, and those before it are gone.
func TestBeforeStop(t *testing.T) {
	a, b := process(t, "a", childConfig{}), process(t, "b", childConfig{})
	var calls []string
	s := &Supervisor{Processes: []*Process{a, b}, StopOrder: []string{"b", "missing", "a"}, Logger: slog.New(slog.DiscardHandler)}
	s.BeforeStop = func(name string) {
		text := "before " + name + ":"
		for _, st := range s.Status() {
			text += fmt.Sprintf(" %s %s", st.Name, st.State)
			if running := st.PID != 0 && alive(st.PID); running != (st.State == Ready) {
				t.Errorf("%s: %+v runs: %v", text, st, running)
			}
		}
		calls = append(calls, text)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	eventually(t, "both ready", func() bool { return a.Status().State == Ready && b.Status().State == Ready })
	// A restart on demand is none of its business.
	if err := s.Restart("a", "a change"); err != nil {
		t.Error(err)
	}
	eventually(t, "restarted", func() bool { st := a.Status(); return st.State == Ready && st.Restarts == 1 })
	cancel()
	<-done
	if want := []string{"before b: a ready b ready", "before a: a ready b stopped"}; !slices.Equal(calls, want) {
		t.Errorf("calls %q, want %q", calls, want)
	}
}

func TestStubbornIsKilled(t *testing.T) {
	p := process(t, "stubborn", childConfig{Stubborn: true})
	p.StopTimeout = 200 * time.Millisecond
	s, stop := start(t, slog.New(slog.DiscardHandler), []string{"stubborn"}, p)
	eventually(t, "ready", func() bool { return s.Status()[0].State == Ready })
	pid := s.Status()[0].PID
	stop()
	if alive(pid) {
		t.Errorf("process %d is still there", pid)
	}
}

// TestChildrenDieWithSupervisor kills a supervisor without a chance to clean up.
func TestChildrenDieWithSupervisor(t *testing.T) {
	dir := t.TempDir()
	pidFile := filepath.Join(dir, "pid")
	b, err := json.Marshal(childConfig{Supervise: true, PIDFile: pidFile})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "config.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", file)
	cmd.Args[0] = "kedge [supervisor]"
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	eventually(t, "grandchild", func() bool {
		b, err := os.ReadFile(pidFile)
		if err != nil {
			return false
		}
		pid, err = strconv.Atoi(string(b))
		return err == nil
	})
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("supervisor ended with %v", err)
	}
	eventually(t, "end of the grandchild", func() bool { return !alive(pid) || zombie(pid) })
}

func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(b), ") Z ")
}

func TestPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start, calls := time.Now(), 0
		if err := Poll(t.Context(), func() error {
			if calls++; time.Since(start) < 10*time.Minute {
				return errors.New("not yet")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		// 20 ms for the first second, then a growing pause, then a second each.
		if late := time.Since(start) - 10*time.Minute; late > time.Second || calls < 600 || calls > 900 {
			t.Errorf("%d calls in ten minutes, success noticed %v late", calls, late)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := Poll(ctx, func() error { return errors.New("never") }); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

func TestChildEnv(t *testing.T) {
	got := childEnv([]string{"PATH=/bin", "NOTIFY_SOCKET=/run/n", "WATCHDOG_USEC=1", "WATCHDOG_PID=2", "OTEL_X=y", "LISTEN_FDS=1", "HTTPS_PROXY=p"})
	if want := []string{"PATH=/bin", "HTTPS_PROXY=p"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestChildName(t *testing.T) {
	for arg, want := range map[string]string{"kedge [etcd]": "etcd", "kedge": "", "/usr/bin/kubectl": "", "kedge [node]": "node"} {
		got, ok := ChildName(arg)
		if ok != (want != "") || ok && got != want {
			t.Errorf("%q: %q %v, want %q", arg, got, ok, want)
		}
	}
}

func TestNewChildByHand(t *testing.T) {
	if _, err := NewChild(nil, &childConfig{}); err == nil || !strings.Contains(err.Error(), "kedge server") {
		t.Errorf("error %v does not say how it is started", err)
	}
}

// The program's pages leave the process, and it goes on.
func TestReleaseProgram(t *testing.T) {
	resident := func() (bytes int) {
		self, err := procfs.Self()
		if err != nil {
			t.Fatal(err)
		}
		status, err := self.NewStatus()
		if err != nil {
			t.Fatal(err)
		}
		return int(status.RssFile)
	}
	before := resident()
	if err := releaseProgram(); err != nil {
		t.Fatal(err)
	}
	if after := resident(); after > before*3/4 {
		t.Errorf("%d bytes of files are resident, %d were before", after, before)
	}
}
