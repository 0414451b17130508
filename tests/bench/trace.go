// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// tracer counts the system calls of a machine that force data to disk, with the kernel's own tracing: nothing is stopped or
// slowed down as by ptrace. Threads that begin later are followed.
type tracer struct {
	mount string // of our own tracefs
	dir   string // of our own trace buffer
	names map[int]string
}

// errNoTrace tells that this kernel does not let us trace.
var errNoTrace = errors.New("no tracing of system calls")

const syncCalls = "fsync fdatasync sync syncfs msync sync_file_range"

func newTracer(h *host) (t *tracer, err error) {
	mount, err := os.MkdirTemp("", "kedge-bench-trace-")
	if err != nil {
		return nil, err
	}
	if err := unix.Mount("tracefs", mount, "tracefs", 0, ""); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: mount tracefs: %w", errNoTrace, err), os.Remove(mount))
	}
	t = &tracer{mount: mount, dir: filepath.Join(mount, "instances", fmt.Sprintf("kedge-bench-%d-%s", os.Getpid(), h.name)), names: map[int]string{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.close())
		}
	}()
	if err := os.Mkdir(t.dir, 0o700); err != nil {
		return t, fmt.Errorf("%w: %w", errNoTrace, err)
	}
	if err := t.set("options/event-fork", "1"); err != nil {
		return t, err
	}
	if err := t.follow(h); err != nil {
		return t, err
	}
	for call := range strings.FieldsSeq(syncCalls) {
		if err := t.set("events/syscalls/sys_enter_"+call+"/enable", "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return t, fmt.Errorf("%w: %w", errNoTrace, err)
		}
	}
	return t, nil
}

func (t *tracer) set(file, text string) error {
	f, err := os.OpenFile(filepath.Join(t.dir, file), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// follow limits the trace to the threads of the machine's product and their children.
func (t *tracer) follow(h *host) error {
	list, err := h.processes()
	if err != nil {
		return err
	}
	for _, p := range list {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.pid))
		if err != nil {
			continue // ended meanwhile
		}
		for _, task := range tasks {
			if tid, err := strconv.Atoi(task.Name()); err == nil {
				t.names[tid] = p.name
				if err := t.set("set_event_pid", task.Name()+"\n"); err != nil {
					return fmt.Errorf("%w: %w", errNoTrace, err)
				}
			}
		}
	}
	return nil
}

var traceLine = regexp.MustCompile(`(?m)^ *(\S.*)-(\d+) +\[\d+\].*: sys_(\w+)\(`)

// count returns the number of calls by process and call, e.g. "etcd fdatasync".
func (t *tracer) count() (map[string]int, error) {
	b, err := os.ReadFile(filepath.Join(t.dir, "trace"))
	if err != nil {
		return nil, err
	}
	return countCalls(string(b), t.names), nil
}

func countCalls(trace string, names map[int]string) map[string]int {
	calls := map[string]int{}
	for _, m := range traceLine.FindAllStringSubmatch(trace, -1) {
		name := m[1]
		if tid, err := strconv.Atoi(m[2]); err == nil && names[tid] != "" {
			name = names[tid]
		}
		calls[name+" "+m[3]]++
	}
	return calls
}

func (t *tracer) close() error {
	var errs []error
	if err := os.Remove(t.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(append(errs, unix.Unmount(t.mount, 0), os.Remove(t.mount))...)
}
