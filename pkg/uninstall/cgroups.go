// SPDX-License-Identifier: Apache-2.0

package uninstall

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/util"
	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// findCgroups lists the kubelet's, in each hierarchy of cgroup v1 or in that of v2.
func findCgroups() []string {
	var list []string
	for _, pattern := range []string{"kubepods", "kubepods.slice", "*/kubepods", "*/kubepods.slice"} {
		found, _ := filepath.Glob(filepath.Join(cgroupRoot, pattern))
		for _, dir := range found {
			// cpu and cpuacct are links to one hierarchy.
			if real, err := filepath.EvalSymlinks(dir); err == nil && !slices.Contains(list, real) {
				list = append(list, real)
			}
		}
	}
	return list
}

// removeCgroups removes them. No process is in them any more.
func (u *run) removeCgroups(ctx context.Context) error {
	if util.IsRunningSystemd() {
		// Where systemd manages them. It says so when it does not know the slice.
		_ = exec.CommandContext(ctx, "systemctl", "stop", "kubepods.slice").Run()
	}
	var errs []error
	n := 0
	for _, dir := range findCgroups() {
		removed, err := removeCgroup(ctx, dir)
		n += removed
		errs = append(errs, err)
	}
	if n > 0 {
		u.say("%d cgroups removed", n)
	}
	return errors.Join(errs...)
}

// removeCgroup removes one and those below, the innermost first. A process that has just ended may still be in one for a moment.
func removeCgroup(ctx context.Context, dir string) (int, error) {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	for _, d := range slices.Backward(dirs) {
		for start := time.Now(); ; {
			err := os.Remove(d)
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				break
			}
			if !errors.Is(err, unix.EBUSY) || time.Since(start) > 5*time.Second {
				return 0, fmt.Errorf("cgroup %w", err)
			}
			select {
			case <-ctx.Done():
				return 0, context.Cause(ctx)
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return len(dirs), nil
}
