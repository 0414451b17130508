// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

// reportFD is the descriptor of the status pipe in the child: the first after stdin, stdout and stderr.
const reportFD = 3

// ChildName returns the name of the child process that this process was started as ("kedge [etcd]" is "etcd"), if it was.
func ChildName(argv0 string) (string, bool) {
	name, ok := strings.CutPrefix(argv0, "kedge [")
	return strings.TrimSuffix(name, "]"), ok
}

// Child is a child process's side of the supervisor: its configuration and the way to report.
type Child struct {
	pipe   *os.File
	mu     sync.Mutex
	last   map[string]Component
	closed bool
}

// NewChild reads the configuration that the supervisor wrote into config and opens the status pipe.
func NewChild(args []string, config any) (*Child, error) {
	if len(args) != 1 {
		return nil, errors.New("this process is started by `kedge server`, not by hand")
	}
	b, err := os.ReadFile(args[0])
	if err != nil {
		return nil, fmt.Errorf("configuration from the supervisor: %w", err)
	}
	if err := json.Unmarshal(b, config); err != nil {
		return nil, fmt.Errorf("configuration from the supervisor %s: %w", args[0], err)
	}
	return &Child{pipe: os.NewFile(reportFD, "status"), last: map[string]Component{}}, nil
}

// Report tells the supervisor the state of one component; repeating the same is free.
func (c *Child) Report(component string, state State, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if last, ok := c.last[component]; c.closed || ok && last.State == state && last.Reason == reason {
		return
	}
	line := Component{Name: component, State: state, Reason: reason, Since: time.Now()}
	c.last[component] = line
	b, err := json.Marshal(line)
	if err != nil {
		return
	}
	if _, err := c.pipe.Write(append(b, '\n')); err != nil {
		c.closed = true // the supervisor is gone, and this process with it
	}
}

// End tells the supervisor why the process is about to end.
func (c *Child) End(err error) { c.Report("", Failed, err.Error()) }

// Poll calls f until it succeeds or ctx ends, and returns ctx's error then. It waits 20 ms in between at first, as a start is
// made of such waits, and a fiftieth of the time it has taken so far later on, a second at the most.
func Poll(ctx context.Context, f func() error) error {
	for start := time.Now(); f() != nil; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(max(time.Since(start)/50, 20*time.Millisecond), time.Second)):
		}
	}
	return nil
}

// gcPercent is what a running process collects garbage by: a third more CPU time for the collector than Go's default of 100, for a
// heap that is a fifth smaller.
const gcPercent = 75

// calm is when a process has done what starting takes.
const calm = 20 * time.Second

// SettleMemory gives back the memory that starting took, when the process has calmed down.
func SettleMemory() {
	time.AfterFunc(calm, func() {
		debug.SetGCPercent(gcPercent)
		debug.FreeOSMemory()
		// A courtesy to other programs: without it this process works as well.
		_ = releaseProgram()
	})
}

// releaseProgram takes the pages of the program's own file out of this process's memory: starting touches most of a large program, and
// running a part. What is used comes back from the page cache at its next use; what is not can be reclaimed without asking.
func releaseProgram() error {
	self, err := procfs.Self()
	if err != nil {
		return err
	}
	exe, err := self.Executable()
	if err != nil {
		return err
	}
	maps, err := self.ProcMaps()
	if err != nil {
		return err
	}
	for _, m := range maps {
		// Writable pages may differ from the file; the others never do.
		if m.Pathname != exe || m.Perms.Write {
			continue
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.StartAddr, m.EndAddr-m.StartAddr, unix.MADV_DONTNEED); errno != 0 {
			err = errno
		}
	}
	return err
}
