// SPDX-License-Identifier: Apache-2.0

package embed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Settle finishes what Stage leaves for later: it waits until the stage is on the disk, marks it as complete, and
// removes the stages of former versions that no process runs from. Call it some time after the node is up. It writes
// back all of the file system (syncfs), which is one journal commit instead of one for each file; after half a minute
// the kernel has written most of it anyway. Without it the next start compares contents again, which is slower but as
// safe.
func (t *Tree) Settle(ctx context.Context) error {
	s := t.stager
	if s == nil {
		return errors.New("this directory was not staged by this process")
	}
	unlock, err := lock(ctx, s.base)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.complete(); err != nil {
		return fmt.Errorf("marking %s as complete: %w", s.dir, err)
	}
	if err := s.sweep(ctx); err != nil {
		return fmt.Errorf("removing former versions from %s: %w", s.base, err)
	}
	return nil
}

func (s *stager) complete() error {
	name := filepath.Join(s.dir, marker)
	if _, err := os.Lstat(name); err == nil {
		return nil
	}
	dir, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return &fs.PathError{Op: "syncfs", Path: s.dir, Err: err}
	}
	return os.WriteFile(name, nil, 0o644)
}

// stageName matches the directories that Stage makes, so that nothing else is ever removed.
const stageName = `^[0-9a-f]{16}$`

// sweep removes former stages. A shim calls runc from its own stage for as long as its pod lives, so a stage is in use
// while anything executes from it.
func (s *stager) sweep(ctx context.Context) error {
	entries, err := os.ReadDir(s.base)
	if err != nil {
		return err
	}
	former, err := regexp.Compile(stageName)
	if err != nil {
		return err
	}
	var running *processes
	for _, e := range entries {
		dir := filepath.Join(s.base, e.Name())
		if !former.MatchString(e.Name()) || !e.IsDir() || dir == s.dir {
			continue
		}
		if running == nil {
			if running, err = executed("/proc"); err != nil {
				return err
			}
		}
		used, err := running.use(ctx, dir)
		if err != nil {
			return err
		}
		if used {
			s.log.Info("a former version of the staged programs is still in use", "dir", dir)
			continue
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		s.log.Info("a former version of the staged programs was removed", "dir", dir)
	}
	return nil
}

// inode identifies a file whatever path or mount namespace it is seen through.
type inode struct {
	dev, ino uint64
}

// processes says what is executed on this machine.
type processes struct {
	files  map[inode]bool
	hidden map[string]bool // names (15 bytes at most) of processes whose file must not be seen
}

// executed looks at all processes. proc is where procfs is mounted.
func executed(proc string) (*processes, error) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	p := &processes{files: map[inode]bool{}, hidden: map[string]bool{}}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		var st syscall.Stat_t
		err := syscall.Stat(filepath.Join(proc, e.Name(), "exe"), &st)
		switch {
		case err == nil:
			p.files[inode{uint64(st.Dev), st.Ino}] = true
		case errors.Is(err, fs.ErrPermission):
			// It has privileges that we lack.
			if name, err := os.ReadFile(filepath.Join(proc, e.Name(), "comm")); err == nil {
				p.hidden[strings.TrimSpace(string(name))] = true
			}
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ESRCH):
			// A kernel thread, or it has ended.
		default:
			return nil, fmt.Errorf("what process %s executes cannot be seen: %w", e.Name(), err)
		}
	}
	return p, nil
}

// use says whether a file below dir is executed, or may be.
func (p *processes) use(ctx context.Context, dir string) (bool, error) {
	used := false
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		sys, ok := st.Sys().(*syscall.Stat_t)
		used = ok && p.files[inode{uint64(sys.Dev), sys.Ino}] || p.hidden[d.Name()[:min(len(d.Name()), 15)]]
		if used {
			return fs.SkipAll
		}
		return nil
	})
	return used, err
}
