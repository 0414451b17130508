// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// ownMounts gives the rest of the test a mount namespace of its own.
func ownMounts(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	runtime.LockOSThread() // for good: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		t.Fatal(err)
	}
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		must(t, os.MkdirAll(filepath.Dir(name), 0o755))
		must(t, os.WriteFile(name, []byte("data"), 0o600))
	}
}

// left are the paths below a directory.
func left(t *testing.T, dir string) string {
	t.Helper()
	var list []string
	must(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, path)
		list = append(list, rel)
		return err
	}))
	slices.Sort(list)
	return strings.Join(list, " ")
}

func TestRemove(t *testing.T) {
	dir := t.TempDir()
	root, outside := filepath.Join(dir, "root"), filepath.Join(dir, "outside")
	write(t, root+"/a/b/c/file", root+"/file", outside+"/kept")
	must(t, os.Symlink(outside, root+"/a/link"))
	must(t, os.Symlink(outside+"/nowhere", root+"/a/broken"))
	must(t, os.Mkdir(root+"/a/closed", 0o000))
	must(t, unix.Mkfifo(root+"/a/fifo", 0o600))
	var count atomic.Int64
	must(t, Remove(t.Context(), root, &count))
	if got := left(t, dir); got != ". outside outside/kept" || count.Load() != 10 {
		t.Errorf("left: %s; %d removed", got, count.Load())
	}
	for _, path := range []string{root, root + "/a/b"} { // what is not there is no error
		must(t, Remove(t.Context(), path, nil))
		if holds, err := Holds(path); holds || err != nil {
			t.Errorf("Holds of what is not there: %v, %v", holds, err)
		}
	}
	must(t, os.Symlink(outside, root))
	must(t, Remove(t.Context(), root, nil))
	if got := left(t, dir); got != ". outside outside/kept" {
		t.Errorf("of a link, left: %s", got)
	}
	write(t, root+"/a")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Remove(ctx, root, nil); err == nil {
		t.Error("no error when it was interrupted")
	}
	if got := left(t, root); got != ". a" {
		t.Errorf("after an interruption: %s", got)
	}
}

func TestRemoveLeavesMounts(t *testing.T) {
	ownMounts(t)
	dir := t.TempDir()
	root, outside := filepath.Join(dir, "root"), filepath.Join(dir, "outside")
	write(t, root+"/a/tmpfs/under", root+"/b/bind/x", root+"/c/file", root+"/c/bound", outside+"/sub/kept")
	must(t, unix.Mount("tmpfs", root+"/a/tmpfs", "tmpfs", 0, ""))
	write(t, root+"/a/tmpfs/data", root+"/a/beside")
	must(t, unix.Mount(outside, root+"/b/bind", "", unix.MS_BIND, "")) // of the same file system: st_dev would not tell
	must(t, unix.Mount(outside+"/sub/kept", root+"/c/bound", "", unix.MS_BIND, ""))
	t.Cleanup(func() {
		for _, m := range []string{"/a/tmpfs", "/b/bind", "/c/bound"} {
			_ = unix.Unmount(root+m, unix.MNT_DETACH)
		}
	})
	err := Remove(t.Context(), root, nil)
	points, others := MountPoints(err)
	slices.Sort(points)
	if want := []string{root + "/a/tmpfs", root + "/b/bind", root + "/c/bound"}; !slices.Equal(points, want) || others != nil {
		t.Errorf("left because of mounts: %v, %v", points, others)
	}
	if got, want := left(t, root), ". a a/tmpfs a/tmpfs/data b b/bind b/bind/sub b/bind/sub/kept c c/bound"; got != want {
		t.Errorf("left: %s\nwant: %s", got, want)
	}
	if holds, err := Holds(root); holds || err != nil {
		t.Errorf("Holds: %v, %v; only mount points are left", holds, err)
	}
	for _, m := range []string{"/a/tmpfs", "/b/bind", "/c/bound"} {
		must(t, unix.Unmount(root+m, 0))
	}
	must(t, Remove(t.Context(), root, nil))
	if got := left(t, dir); got != ". outside outside/sub outside/sub/kept" {
		t.Errorf("left in the end: %s", got)
	}
}

// TestRemoveMountPoint empties a disk that is mounted at the tree's root.
func TestRemoveMountPoint(t *testing.T) {
	ownMounts(t)
	root := filepath.Join(t.TempDir(), "root")
	must(t, os.Mkdir(root, 0o755))
	must(t, unix.Mount("tmpfs", root, "tmpfs", 0, ""))
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	write(t, root+"/a/b", root+"/lost+found/x")
	must(t, Remove(t.Context(), root, nil))
	if got := left(t, root); got != ". lost+found lost+found/x" {
		t.Errorf("left: %s", got)
	}
	if holds, err := Holds(root); holds || err != nil {
		t.Errorf("Holds: %v, %v", holds, err)
	}
	write(t, root+"/a/b")
	if holds, err := Holds(root); !holds || err != nil {
		t.Errorf("Holds, with a file: %v, %v", holds, err)
	}
	if is, err := IsMountPoint(root); !is || err != nil {
		t.Errorf("IsMountPoint: %v, %v", is, err)
	}
	if is, err := IsMountPoint(root + "/lost+found"); is || err != nil {
		t.Errorf("IsMountPoint of a directory: %v, %v", is, err)
	}
}

// TestMountID is the way for kernels without openat2.
func TestMountID(t *testing.T) {
	ownMounts(t)
	dir := t.TempDir()
	must(t, os.MkdirAll(dir+"/a/b", 0o755))
	must(t, unix.Mount(dir+"/a", dir+"/a/b", "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(dir+"/a/b", unix.MNT_DETACH) })
	outer, err := pathMountID(dir + "/a")
	must(t, err)
	inner, err := pathMountID(dir + "/a/b")
	must(t, err)
	if outer == inner {
		t.Errorf("a bind mount has the ID %d of what is around it", inner)
	}
}
