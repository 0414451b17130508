// SPDX-License-Identifier: Apache-2.0

// Package tree removes directory trees without ever following a mount or a symbolic link out of them: what is mounted below a directory
// that goes away, somebody else's disk or a share on the network, keeps its data.
package tree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// MountError says that a path was left alone because something is mounted there.
type MountError struct{ Path string }

// Error names the path.
func (e *MountError) Error() string {
	return e.Path + ": something is mounted there, it was left alone"
}

// lostAndFound is what every ext file system has in its root.
const lostAndFound = "lost+found"

// Remove removes a file, a symbolic link or a directory with all that it holds. It enters no mount below path, bind mounts of the same
// file system included; each is reported by a MountError and stays, with the directories above it. When path itself is a mount
// point it is emptied and stays, which is no error; neither is a path that is not there. count, if not nil, goes up with each thing
// that is removed. The error joins all that was left.
func Remove(ctx context.Context, path string, count *atomic.Int64) error {
	if count == nil {
		count = new(atomic.Int64)
	}
	r := &remover{ctx: ctx, count: count}
	if err := r.remove(filepath.Clean(path)); err != nil {
		r.errs = append(r.errs, err)
	}
	return errors.Join(r.errs...)
}

type remover struct {
	ctx   context.Context
	count *atomic.Int64
	mount int // its ID, of the tree's root
	errs  []error
}

func (r *remover) remove(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP): // a file, a link
		return ignoreMissing(os.Remove(path))
	case err != nil:
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	dir := os.NewFile(uintptr(fd), path)
	defer dir.Close()
	if r.mount, err = mountID(fd); err != nil {
		return err
	}
	mounted, err := IsMountPoint(path)
	if err != nil {
		return err
	}
	r.empty(dir, mounted)
	if mounted || len(r.errs) > 0 {
		return nil
	}
	r.count.Add(1)
	return ignoreMissing(os.Remove(path))
}

// empty removes what is in a directory.
func (r *remover) empty(dir *os.File, isRoot bool) {
	entries, err := dir.ReadDir(-1)
	if err != nil {
		r.fail("read", dir.Name(), err)
	}
	for _, e := range entries {
		if err := r.ctx.Err(); err != nil {
			r.fail("remove", dir.Name(), context.Cause(r.ctx))
			return
		}
		if isRoot && e.Name() == lostAndFound {
			continue
		}
		path := filepath.Join(dir.Name(), e.Name())
		if !e.IsDir() {
			r.unlink(dir, e.Name(), 0)
			continue
		}
		sub, err := r.open(dir, e.Name())
		switch {
		case errors.Is(err, unix.ENOENT):
			continue
		case errors.Is(err, unix.EXDEV):
			r.errs = append(r.errs, &MountError{path})
			continue
		case err != nil:
			r.fail("open", path, err)
			continue
		}
		had := len(r.errs)
		r.empty(sub, false)
		sub.Close()
		if len(r.errs) == had {
			r.unlink(dir, e.Name(), unix.AT_REMOVEDIR)
		}
	}
}

func (r *remover) unlink(dir *os.File, name string, flags int) {
	err := unix.Unlinkat(int(dir.Fd()), name, flags)
	path := filepath.Join(dir.Name(), name)
	switch {
	case err == nil:
		r.count.Add(1)
	case errors.Is(err, unix.ENOENT):
	case errors.Is(err, unix.EBUSY):
		r.errs = append(r.errs, &MountError{path})
	default:
		r.fail("remove", path, err)
	}
}

func (r *remover) fail(op, path string, err error) {
	r.errs = append(r.errs, &fs.PathError{Op: op, Path: path, Err: err})
}

// open opens a directory in another one. The error is EXDEV if something is mounted on it.
func (r *remover) open(dir *os.File, name string) (*os.File, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	how := unix.OpenHow{Flags: flags, Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_BENEATH}
	fd, err := unix.Openat2(int(dir.Fd()), name, &how)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) { // Linux before 5.6; a seccomp profile of before
		if fd, err = unix.Openat(int(dir.Fd()), name, flags, 0); err == nil {
			var id int
			if id, err = mountID(fd); err == nil && id != r.mount {
				err = unix.EXDEV
			}
			if err != nil {
				unix.Close(fd)
			}
		}
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), filepath.Join(dir.Name(), name)), nil
}

// mountID is that of the mount that an open file was reached by (proc(5)).
func mountID(fd int) (int, error) {
	info, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(info)) {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strconv.Atoi(strings.TrimSpace(id))
		}
	}
	return 0, errors.New("the kernel tells no mount IDs")
}

// IsMountPoint says whether something is mounted on a directory or a file. A path that is not there is none.
func IsMountPoint(path string) (bool, error) {
	parent, err := pathMountID(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	own, err := pathMountID(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return own != parent, err
}

func pathMountID(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return 0, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	return mountID(fd)
}

// Holds says whether there is anything at path that Remove would remove: mount points, and the directories that lead to them and nothing
// else, are nothing.
func Holds(path string) (bool, error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !info.IsDir() {
		return true, nil
	}
	own, err := pathMountID(path)
	if err != nil {
		return false, err
	}
	mounted, err := IsMountPoint(path)
	if err != nil {
		return false, err
	}
	return holds(path, own, mounted)
}

func holds(dir string, mount int, mounted bool) (bool, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false, err
	}
	if len(entries) == 0 {
		return !mounted, nil
	}
	for _, e := range entries {
		if mounted && e.Name() == lostAndFound {
			continue
		}
		path := filepath.Join(dir, e.Name())
		own, err := pathMountID(path)
		if errors.Is(err, fs.ErrNotExist) || err == nil && own != mount {
			continue
		}
		if err != nil || !e.IsDir() {
			return err == nil, err
		}
		if found, err := holds(path, mount, false); found || err != nil {
			return found, err
		}
	}
	return false, nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, unix.EBUSY) {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			return &MountError{pe.Path}
		}
	}
	return err
}

// MountPoints are the paths that an error of Remove says were left because of a mount; others says whether anything else was left.
func MountPoints(err error) (paths []string, others error) {
	list := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		list = joined.Unwrap()
	}
	var rest []error
	for _, e := range list {
		var m *MountError
		if errors.As(e, &m) {
			paths = append(paths, m.Path)
		} else if e != nil {
			rest = append(rest, e)
		}
	}
	if len(rest) > 3 {
		rest = append(rest[:3], fmt.Errorf("and %d more", len(rest)-3))
	}
	return paths, errors.Join(rest...)
}
