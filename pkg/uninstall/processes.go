// SPDX-License-Identifier: Apache-2.0

package uninstall

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/supervise"
)

// process is one of this machine's.
type process struct {
	pid, ppid int
	args      []string
	exe       string // empty for the kernel's, and for those that are gone
	kind      string
}

func (p process) title() string {
	return p.kind + ": " + strings.Join(p.args[:min(len(p.args), 6)], " ")
}

func (p process) environ() []string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.pid))
	return strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
}

// readProcesses lists all of the machine.
func readProcesses() ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var list []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join("/proc", e.Name())
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue // it has just ended
		}
		state, ppid, ok := parseStat(string(stat))
		if !ok || state == "Z" {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || len(cmdline) == 0 {
			continue // the kernel's own
		}
		exe, _ := os.Readlink(filepath.Join(dir, "exe"))
		args := strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
		list = append(list, process{pid: pid, ppid: ppid, args: args, exe: strings.TrimSuffix(exe, " (deleted)")})
	}
	return list, nil
}

// parseStat reads state and parent from proc_pid_stat(5). The name in there may hold anything.
func parseStat(stat string) (state string, ppid int, ok bool) {
	i := strings.LastIndexByte(stat, ')')
	if i < 0 {
		return "", 0, false
	}
	fields := strings.Fields(stat[i+1:])
	if len(fields) < 2 {
		return "", 0, false
	}
	ppid, err := strconv.Atoi(fields[1])
	return fields[0], ppid, err == nil
}

// sameNamespaces says whether a process is one of the machine itself, and not one of a container's: another engine may run a Kedge, too.
func sameNamespaces(pid int) bool {
	for _, ns := range []string{"pid", "mnt"} {
		own, err := os.Readlink("/proc/self/ns/" + ns)
		other, otherErr := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		if err != nil || otherErr != nil || own != other {
			return false
		}
	}
	return true
}

// supervisors are the processes of `kedge server` and `kedge agent`.
func supervisors() ([]process, error) {
	all, err := readProcesses()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(p process) bool { return !isSupervisor(p) }), nil
}

func isSupervisor(p process) bool {
	if p.pid == os.Getpid() || !strings.HasPrefix(filepath.Base(p.exe), "kedge") || len(p.args) < 2 {
		return false
	}
	return (p.args[1] == "server" || p.args[1] == "agent") && sameNamespaces(p.pid)
}

// findProcesses lists those of Kedge, of containerd's shims, and of containers, this one and those that it was called by excepted.
func findProcesses(p Places) ([]process, error) {
	all, err := readProcesses()
	if err != nil {
		return nil, err
	}
	byPID := map[int]int{}
	for i, proc := range all {
		byPID[proc.pid] = i
	}
	spared := map[int]bool{1: true}
	for pid := os.Getpid(); pid > 1; {
		spared[pid] = true
		i, ok := byPID[pid]
		if !ok {
			break
		}
		pid = all[i].ppid
	}
	bin := filepath.Join(p.DataDir, "bin") + "/"
	for i := range all {
		proc := &all[i]
		switch _, child := supervise.ChildName(proc.args[0]); {
		case isSupervisor(*proc):
			proc.kind = "kedge"
		case child && sameNamespaces(proc.pid):
			proc.kind = "kedge"
		case strings.HasPrefix(proc.exe, bin) && sameNamespaces(proc.pid):
			proc.kind = "shim"
		case inPod(proc.pid):
			proc.kind = "container"
		}
	}
	// What a shim has started, in whatever cgroup and namespace it is.
	for changed := true; changed; {
		changed = false
		for i := range all {
			if parent, ok := byPID[all[i].ppid]; all[i].kind == "" && ok && (all[parent].kind == "shim" || all[parent].kind == "container") {
				all[i].kind, changed = "container", true
			}
		}
	}
	return slices.DeleteFunc(all, func(p process) bool { return p.kind == "" || spared[p.pid] }), nil
}

// inPod says whether a process is in a cgroup of pods. Those of a cluster inside a container are further down.
func inPod(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	return err == nil && podCgroup(string(text))
}

// podCgroup reads proc_pid_cgroup(5).
func podCgroup(text string) bool {
	for line := range strings.Lines(text) {
		if parts := strings.SplitN(line, ":", 3); len(parts) == 3 && strings.HasPrefix(parts[2], "/kubepods") {
			return true
		}
	}
	return false
}

// containerGrace is what processes of containers get to end by themselves when there is no containerd to ask.
const containerGrace = 5 * time.Second

// endProcesses ends what still runs, containers before their shims.
func (u *run) endProcesses(ctx context.Context) error {
	asked := map[int]bool{}
	for start := time.Now(); ; {
		list, err := findProcesses(u.places)
		if err != nil || len(list) == 0 {
			return err
		}
		containers := slices.ContainsFunc(list, func(p process) bool { return p.kind == "container" })
		for _, p := range list {
			switch {
			case p.kind == "shim" && containers: // it reaps them
			case asked[p.pid] && (p.kind == "shim" || time.Since(start) > containerGrace):
				_ = unix.Kill(p.pid, unix.SIGKILL)
			case !asked[p.pid]:
				asked[p.pid] = true
				u.say("ending process %d, %s", p.pid, p.title())
				_ = unix.Kill(p.pid, unix.SIGTERM)
			}
		}
		if time.Since(start) > 4*containerGrace {
			return errors.New("some processes do not end, not even when they are killed: a disk or a network file system may hang")
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
