// SPDX-License-Identifier: Apache-2.0

// Package uninstall takes Kedge off a machine: out of its cluster, then processes, mounts, network, cgroups, files, in an order in which
// each step leaves nothing behind that the next one would need. Every step looks for what is there and removes that, so a run that was
// interrupted is simply run again; what is found is also what --dry-run and --check show.
package uninstall

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/service"
	"github.com/kedge-io/kedge/pkg/uninstall/tree"
)

// Kind of thing that belongs to an installation.
type Kind string

// The kinds, beside those of node.Remains.
const (
	KindProcess Kind = "process"
	KindMount   Kind = "mount"
	KindNetns   Kind = "netns"
	KindCgroup  Kind = "cgroup"
	KindFile    Kind = "file"
)

// Item is something of Kedge's on this machine.
type Item struct {
	Kind   Kind   `json:"kind"`
	Name   string `json:"name"`
	Detail string `json:"detail,omitempty"`
}

// Options of Run.
type Options struct {
	// Force goes on when the cluster cannot be told that this machine leaves.
	Force bool
	// KeepData leaves the snapshots and the volumes of pods in the data directory.
	KeepData bool
	// Out gets lines of progress.
	Out io.Writer
}

// Lost is an error of Run: not everything could be removed. Run may be called again when the reasons are gone.
type Lost struct {
	Items []Item
	err   error
}

// Error says how much is left, and why.
func (l *Lost) Error() string {
	text := fmt.Sprintf("%d things are left; see `kedge uninstall --check`, and run `kedge uninstall` again when the reason is gone", len(l.Items))
	if l.err != nil {
		text += ": " + l.err.Error()
	}
	return text
}

// Unwrap gives the reasons.
func (l *Lost) Unwrap() error { return l.err }

// lockFile keeps two runs apart. It lives and ends with a run.
const lockFile = "/run/kedge-uninstall.lock"

// run is one run.
type run struct {
	Options
	places Places
	errs   []error
}

func (u *run) say(format string, args ...any) { fmt.Fprintf(u.Out, format+"\n", args...) }

// Run removes everything. It returns nil when a look at the end finds nothing.
func Run(ctx context.Context, p Places, o Options) error {
	if err := p.safe(); err != nil {
		return err
	}
	items, err := Find(p, o.KeepData)
	if err != nil {
		return err
	}
	u := &run{Options: o, places: p}
	if len(items) == 0 {
		u.say("nothing to do: there is nothing of Kedge on this machine")
		return nil
	}
	unlock, err := lock()
	if err != nil {
		return err
	}
	defer unlock()
	release, err := service.Hold(ctx)
	if err != nil {
		return err
	}
	if err := u.leave(ctx); err != nil {
		return errors.Join(err, release(ctx))
	}
	for _, step := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"service", u.stop},
		{"processes", u.endProcesses},
		{"mounts", u.unmount},
		{"network", u.cleanNetwork},
		{"cgroups", u.removeCgroups},
		{"files", u.removeFiles},
	} {
		if ctx.Err() != nil {
			return fmt.Errorf("interrupted before: %s; run `kedge uninstall` again to finish", step.what)
		}
		if err := step.do(ctx); err != nil {
			u.say("%s: %v", step.what, err)
			u.errs = append(u.errs, fmt.Errorf("%s: %w", step.what, err))
		}
	}
	return u.finish(ctx)
}

// finish looks for what is left, and lets the program remove itself when that is nothing else.
func (u *run) finish(ctx context.Context) error {
	left, err := Find(u.places, u.KeepData)
	if err != nil {
		return err
	}
	program := slices.IndexFunc(left, func(i Item) bool { return i.Name == Program })
	if program >= 0 {
		left = slices.Delete(left, program, program+1)
	}
	if len(left) > 0 {
		for _, i := range left {
			u.say("left: %s %s %s", i.Kind, i.Name, i.Detail)
		}
		return &Lost{left, errors.Join(u.errs...)}
	}
	if program >= 0 {
		if err := tree.Remove(ctx, Program, nil); err != nil {
			return fmt.Errorf("all is removed but the program itself: %w", err)
		}
	}
	u.say("Kedge is uninstalled; a look for what may be left found nothing")
	return nil
}

// lock makes sure that one run goes on at a time.
func lock() (unlock func(), err error) {
	f, err := os.OpenFile(lockFile, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, errors.New("another `kedge uninstall` is running")
	}
	return func() { os.Remove(lockFile); f.Close() }, nil
}

// removeFiles removes what is on disk, the program itself excepted.
func (u *run) removeFiles(ctx context.Context) error {
	list, err := u.places.files(u.KeepData)
	if err != nil {
		return err
	}
	var count atomic.Int64
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(5 * time.Second):
				u.say("%d files removed so far", count.Load())
			}
		}
	}()
	var errs []error
	for _, path := range list {
		if path == Program {
			continue
		}
		points, err := tree.MountPoints(tree.Remove(ctx, path, &count))
		if err != nil {
			errs = append(errs, err)
		}
		for _, p := range points {
			u.say("%s was left alone, with what is in it: something is mounted there", p)
		}
	}
	if err := removeIfEmpty(sharedDirs()...); err != nil {
		errs = append(errs, err)
	}
	u.say("%d files removed", count.Load())
	return errors.Join(append(errs, service.Forget(ctx))...)
}

// sharedDirs are made by Kedge's components, and may be used by others, too.
func sharedDirs() []string {
	return []string{
		"/var/lib/cni/results", "/var/lib/cni", "/run/netns", "/run/containerd/runc/k8s.io", "/run/containerd/runc", "/run/containerd/s", "/run/containerd",
		"/run/nri", "/etc/systemd/logind.conf.d", "/opt/containerd/bin", "/opt/containerd/lib", "/opt/containerd",
		"/usr/libexec/kubernetes/kubelet-plugins/volume/exec", "/usr/libexec/kubernetes/kubelet-plugins/volume",
		"/usr/libexec/kubernetes/kubelet-plugins", "/usr/libexec/kubernetes",
	}
}

// removeIfEmpty removes directories that Kedge shares with others, if they hold nothing.
func removeIfEmpty(dirs ...string) error {
	for _, dir := range dirs {
		if mounted, err := tree.IsMountPoint(dir); mounted || err != nil {
			continue
		}
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.ENOTDIR) &&
			!errors.Is(err, unix.EROFS) {
			return fmt.Errorf("%s: %w", dir, err)
		}
	}
	return nil
}

// Find lists what is there.
func Find(p Places, keepData bool) ([]Item, error) {
	var items []Item
	processes, err := findProcesses(p)
	if err != nil {
		return nil, err
	}
	for _, proc := range processes {
		items = append(items, Item{KindProcess, fmt.Sprint(proc.pid), proc.title()})
	}
	mounts, err := findMounts(p)
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		items = append(items, Item{KindMount, m.path, m.detail()})
	}
	network, err := findNetwork(p)
	if err != nil {
		return nil, err
	}
	items = append(items, network...)
	for _, dir := range findCgroups() {
		items = append(items, Item{Kind: KindCgroup, Name: dir})
	}
	files, err := p.files(keepData)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		kind := KindFile
		if filepath.Dir(f) == netnsDir {
			kind = KindNetns
		}
		items = append(items, Item{Kind: kind, Name: f})
	}
	return items, nil
}
