// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// file is one file to write.
type file struct {
	path string
	data []byte
	mode fs.FileMode
}

// lockDir makes the directory if need be, closes it to everybody else and locks it until the returned handle is closed.
func lockDir(path string) (*os.File, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(dir.Chmod(0o700), unix.Flock(int(dir.Fd()), unix.LOCK_EX)); err != nil {
		dir.Close()
		return nil, fmt.Errorf("lock: %w", err)
	}
	return dir, nil
}

// removeTemporary deletes what writes to files with this prefix have left when a crash cut them off: package renameio
// puts a dot before a name and digits behind it.
func removeTemporary(dir, prefix string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, "."+prefix) && name[len(name)-1] >= '0' && name[len(name)-1] <= '9' && e.Type().IsRegular() {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// readSecret reads a file and takes away the access of group and others, which a copied or restored file may have.
func readSecret(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		if err := os.Chmod(path, 0o600); err != nil {
			return nil, err
		}
	}
	return os.ReadFile(path)
}

// writeFiles replaces files so that, whenever the power fails, each one is there in its old or its new form. When it
// returns, all are durable. Slow disks take tens of milliseconds for a sync: all files are written before the first sync,
// and all syncs wait at the same time, so that a journaling file system needs one commit for all of them.
func writeFiles(files []file) error {
	var pending []*renameio.PendingFile
	defer func() {
		for _, p := range pending {
			p.Cleanup() //nolint:errcheck // does nothing after success; after a failure that one is reported
		}
	}()
	dirs := map[string]bool{}
	for _, f := range files {
		dir := filepath.Dir(f.path)
		dirs[dir] = true
		p, err := renameio.NewPendingFile(f.path, renameio.WithTempDir(dir), renameio.WithStaticPermissions(f.mode))
		if err == nil {
			pending = append(pending, p)
			_, err = p.Write(f.data)
		}
		if err != nil {
			return fmt.Errorf("write %s: %w", f.path, err)
		}
	}
	var group errgroup.Group
	for i, p := range pending {
		group.Go(func() error {
			if err := p.CloseAtomicallyReplace(); err != nil {
				return fmt.Errorf("write %s: %w", files[i].path, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	// Renames become durable with their directory, and a new directory with its parent.
	for dir := range dirs {
		group.Go(func() error { return syncDir(dir) })
		group.Go(func() error { return syncDir(filepath.Dir(dir)) })
	}
	return group.Wait()
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err == nil {
		err = errors.Join(dir.Sync(), dir.Close())
	}
	if err != nil {
		return fmt.Errorf("write to directory %s: %w", path, err)
	}
	return nil
}

// unchanged tells whether a file is on disk already, and corrects its mode if only that differs.
func unchanged(f file) (bool, error) {
	info, err := os.Stat(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	data, err := os.ReadFile(f.path)
	if err != nil || !bytes.Equal(data, f.data) {
		return false, err
	}
	if info.Mode().Perm() != f.mode.Perm() {
		return true, os.Chmod(f.path, f.mode)
	}
	return true, nil
}
