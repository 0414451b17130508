// SPDX-License-Identifier: Apache-2.0

// Package service knows how Kedge is started on this machine: by systemd, by OpenRC or by hand. It stops it, and takes it out of the
// service manager's hands.
package service

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/util"
	"golang.org/x/sys/unix"
)

// Name of the service, the same with each service manager and in each role.
const Name = "kedge"

// PodsUnit is a unit of systemd that lives from Kedge's first start until the machine stops. It ends pods that are left then: when somebody
// has stopped Kedge before, or when Kedge could not.
const PodsUnit = "kedge-pods.service"

// Files of an installation.
const (
	Unit    = "/etc/systemd/system/kedge.service"
	OpenRC  = "/etc/init.d/kedge"
	runDrop = "/run/systemd/system/kedge.service.d" // until the next reboot
)

// Manager is what runs services on this machine.
type Manager string

// The managers. Where the machine has neither, Kedge was started by hand or by something that Kedge does not know.
const (
	ManagerNone    Manager = ""
	ManagerSystemd Manager = "systemd"
	ManagerOpenRC  Manager = "OpenRC"
)

// Managed says who has a service of Kedge's on this machine.
func Managed() Manager {
	switch {
	case util.IsRunningSystemd() && loaded():
		return ManagerSystemd
	case exists("/run/openrc") && exists(OpenRC):
		return ManagerOpenRC
	}
	return ManagerNone
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

// loaded says whether systemd knows the unit, from a file or because it still runs without one.
func loaded() bool {
	out, err := exec.Command("systemctl", "show", "--value", "-p", "LoadState,ActiveState", Name).Output()
	state := strings.Fields(string(out))
	return err == nil && len(state) == 2 && (state[0] != "not-found" || state[1] != "inactive")
}

// Stop stops Kedge and waits until it has stopped. pid is that of a Kedge that runs, 0 if there is none or it is not known.
func Stop(ctx context.Context, pid int) error {
	switch Managed() {
	case ManagerSystemd:
		if err := run(ctx, "systemctl", "stop", Name+".service"); err != nil {
			return err
		}
	case ManagerOpenRC:
		if err := run(ctx, "rc-service", "--ifstarted", Name, "stop"); err != nil {
			return err
		}
	}
	// It may run beside the service, started by hand.
	return terminate(ctx, pid)
}

// terminate ends a process with SIGTERM and waits for its end.
func terminate(ctx context.Context, pid int) error {
	if pid <= 1 {
		return nil
	}
	for sig := unix.SIGTERM; ; sig = 0 {
		switch err := unix.Kill(pid, sig); {
		case errors.Is(err, unix.ESRCH):
			return nil
		case err != nil:
			return fmt.Errorf("process %d: %w", pid, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("process %d has not ended: %w", pid, context.Cause(ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Hold keeps the service manager from starting Kedge again when it ends, until release or a reboot.
func Hold(ctx context.Context) (release func(context.Context) error, err error) {
	if Managed() != ManagerSystemd {
		return func(context.Context) error { return nil }, nil
	}
	if err := os.MkdirAll(runDrop, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(runDrop, "hold.conf"), []byte("[Service]\nRestart=no\n"), 0o644); err != nil {
		return nil, err
	}
	reload := func(ctx context.Context) error { return run(ctx, "systemctl", "daemon-reload") }
	return func(ctx context.Context) error { return errors.Join(os.RemoveAll(runDrop), reload(ctx)) }, reload(ctx)
}

// StayEnded tells the service manager that this process is about to end for good. systemd sees that by its exit status; OpenRC's supervisor
// starts whatever has ended, and has to be told to stop. It does not wait.
func StayEnded() error {
	if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", os.Getppid())); err != nil || !strings.HasPrefix(string(comm), "supervise-daemo") {
		return nil
	}
	cmd := exec.Command("rc-service", Name, "stop")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")} // not what OpenRC's own programs tell each other
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	return cmd.Process.Release()
}

// Disable keeps the service manager from starting Kedge at the next boot.
func Disable(ctx context.Context) error {
	switch Managed() {
	case ManagerSystemd:
		if exists(Unit) {
			return run(ctx, "systemctl", "--quiet", "disable", Name+".service")
		}
	case ManagerOpenRC:
		var errs []error
		for _, link := range runlevels() { // rc-update --all fails for those that do not have it
			errs = append(errs, run(ctx, "rc-update", "--quiet", "del", Name, filepath.Base(filepath.Dir(link))))
		}
		return errors.Join(errs...)
	}
	return nil
}

func runlevels() []string {
	links, _ := filepath.Glob("/etc/runlevels/*/" + Name)
	return links
}

// Files are those of the service, each if it is there.
func Files() []string {
	candidates := []string{Unit, Unit + ".d", runDrop, OpenRC, "/etc/conf.d/" + Name}
	wants, _ := filepath.Glob("/etc/systemd/system/*.wants/" + Name + ".service")
	return slices.DeleteFunc(slices.Concat(candidates, wants, runlevels()), func(path string) bool { return !exists(path) })
}

// Forget has the service manager notice that the files are gone.
func Forget(ctx context.Context) error {
	if !util.IsRunningSystemd() {
		return nil
	}
	err := run(ctx, "systemctl", "daemon-reload")
	// They say so when there is nothing to forget.
	_ = run(ctx, "systemctl", "stop", PodsUnit)
	_ = run(ctx, "systemctl", "reset-failed", Name+".service", PodsUnit)
	return err
}

// Arguments are those with which the service starts Kedge, without the program's name; nil if there is no service.
func Arguments() []string {
	var args []string
	files := []string{Unit}
	drops, _ := filepath.Glob(Unit + ".d/*.conf")
	for _, file := range append(files, drops...) {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		if line := assigned(string(text), "ExecStart"); line != "" {
			args = words(line)
		}
	}
	if text, err := os.ReadFile(OpenRC); err == nil && args == nil {
		args = append([]string{Name}, words(strings.Trim(assigned(string(text), "command_args"), `"'`))...)
	}
	if len(args) < 2 {
		return nil
	}
	return args[1:]
}

// assigned gives the last value that a file gives a key, its continued lines joined.
func assigned(text, key string) string {
	value := ""
	text = strings.ReplaceAll(text, "\\\n", " ")
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && strings.TrimSpace(k) == key && strings.TrimSpace(v) != "" {
			value = strings.TrimSpace(v)
		}
	}
	return value
}

// words splits a line at its spaces but for those in quotes.
func words(line string) []string {
	var list []string
	var word strings.Builder
	var quote rune
	open := false
	flush := func() {
		if open {
			list = append(list, word.String())
		}
		word.Reset()
		open = false
	}
	for _, c := range line {
		switch {
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '"' || c == '\''):
			quote, open = c, true
		case quote == 0 && (c == ' ' || c == '\t'):
			flush()
		default:
			word.WriteRune(c)
			open = true
		}
	}
	flush()
	return list
}

func run(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}
