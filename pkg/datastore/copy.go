// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// copyMargin is what a copy may need beyond its size when etcd opens it: a new segment of the write-ahead log, and pages.
const copyMargin = 128 << 20

// copyData copies a directory of plain files, if there is room. On file systems that can, the copy shares its blocks
// with the original (copy_file_range).
func copyData(ctx context.Context, from, to string) error {
	size, err := treeSize(from)
	if err != nil {
		return err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(to), &fs); err != nil {
		return fmt.Errorf("free space of %s: %w", filepath.Dir(to), err)
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < size+copyMargin {
		return fmt.Errorf("%w for a copy of %s: %d MiB are free on that disk, %d MiB are needed; make room, for instance by moving older copies "+
			"(%s.before-reset-*, %s.stale-*) elsewhere", ErrNoSpace, from, free>>20, (size+copyMargin)>>20, from, from)
	}
	return copyTree(ctx, from, to)
}

func treeSize(dir string) (int64, error) {
	var size int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			size += info.Size()
		}
		return err
	})
	return size, err
}

func copyTree(ctx context.Context, from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err = errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			return os.Mkdir(target, 0o700)
		case d.Type().IsRegular():
			return copyFile(path, target)
		}
		return nil // sockets and the like are nothing of etcd's
	})
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// syncTree makes everything below dir safe against power loss.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() && !d.Type().IsRegular() {
			return err
		}
		return syncDir(path)
	})
}
