// SPDX-License-Identifier: Apache-2.0

package embed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/embed/archive"
)

const (
	// marker says that all contents have reached the disk. Settle writes it.
	marker = ".complete"
	// tempPrefix begins the names of directories that are being filled.
	tempPrefix = ".tmp-"
)

// Stage makes sure that the embedded files are in dataDir/bin/<content hash> and returns that directory. It takes a few
// milliseconds when they are there already.
//
// The directory is filled under another name and renamed, so a crash leaves nothing half-written under the final one.
// Nothing is synced here: writing 50 MB to a slow card takes seconds, and a node that starts must not wait for it. A
// power cut can therefore leave truncated files in a stage whose files Settle has not synced and marked yet. That is
// why the contents of an unmarked stage are compared, of a marked one only names, sizes and modes. Files that differ
// are replaced one by one through a rename: what runs from the old ones goes on.
//
// It fails with ErrNoAssets when nothing is embedded, and when the directory cannot be written or programs cannot be
// run from it.
func Stage(ctx context.Context, dataDir string, logger *slog.Logger) (*Tree, error) {
	sub, err := fs.Sub(assets, assetsDir)
	if err != nil {
		return nil, fmt.Errorf("embedded files: %w", err)
	}
	return stage(ctx, source{files: sub}, dataDir, logger)
}

type stager struct {
	src      source
	manifest *archive.Manifest
	base     string // dataDir/bin
	dir      string // base/ID
	log      *slog.Logger
}

func stage(ctx context.Context, src source, dataDir string, logger *slog.Logger) (*Tree, error) {
	m, err := src.manifest()
	if err != nil {
		return nil, err
	}
	dataDir, err = filepath.Abs(dataDir)
	if err != nil {
		return nil, err
	}
	// Their loader takes a list of directories, in which these characters have a meaning.
	if strings.ContainsAny(dataDir, ":;$") {
		return nil, fmt.Errorf("the data directory %q must not have any of the characters : ; $ in its path", dataDir)
	}
	base := filepath.Join(dataDir, "bin")
	s := &stager{src: src, manifest: m, base: base, dir: filepath.Join(base, m.ID()),
		log: logger.With("component", "embed")}
	if err := s.ensure(ctx); err != nil {
		return nil, fmt.Errorf("staging the embedded programs in %s: %w", s.dir, err)
	}
	return &Tree{Dir: s.dir, stager: s}, nil
}

func (s *stager) ensure(ctx context.Context) error {
	if err := os.MkdirAll(s.base, 0o755); err != nil {
		return err
	}
	if err := executable(s.base); err != nil {
		return err
	}
	unlock, err := lock(ctx, s.base)
	if err != nil {
		return err
	}
	defer unlock()

	if _, err := os.Lstat(s.dir); errors.Is(err, fs.ErrNotExist) {
		return s.create(ctx)
	} else if err != nil {
		return err
	}
	bad := s.check()
	if len(bad) == 0 {
		return nil
	}
	return s.repair(ctx, bad)
}

// executable refuses a file system on which nothing can be executed; the error would come much later otherwise.
func executable(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	if st.Flags&unix.ST_NOEXEC != 0 {
		return fmt.Errorf("%s is on a file system mounted with noexec: mount it without, or choose another place by --data-dir", dir)
	}
	return nil
}

// create fills a new directory.
func (s *stager) create(ctx context.Context) error {
	start := time.Now()
	tmp, root, err := s.temp()
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp) // gone already after the rename
	defer root.Close()
	if err := s.unpack(ctx, root, nil); err != nil {
		return err
	}
	if err := os.Rename(tmp, s.dir); err != nil {
		return err
	}
	s.log.Info("embedded programs staged", "dir", s.dir, "files", len(s.manifest.Files), "took", time.Since(start))
	return nil
}

// temp makes a directory to fill, after removing those that a crash has left.
func (s *stager) temp() (string, *os.Root, error) {
	left, err := filepath.Glob(filepath.Join(s.base, tempPrefix+"*"))
	if err != nil {
		return "", nil, err
	}
	for _, dir := range left {
		if err := os.RemoveAll(dir); err != nil {
			return "", nil, err
		}
	}
	tmp, err := os.MkdirTemp(s.base, tempPrefix)
	if err != nil {
		return "", nil, err
	}
	root, err := os.OpenRoot(tmp)
	if err == nil {
		err = root.Chmod(".", 0o755)
	}
	if err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(tmp))
	}
	return tmp, root, nil
}

func (s *stager) unpack(ctx context.Context, root *os.Root, want func(string) bool) error {
	r, err := s.src.open()
	if err != nil {
		return err
	}
	defer r.Close()
	return archive.Unpack(ctx, r, s.manifest, root, want)
}

// check returns the files that are not as they should be, with the reasons.
func (s *stager) check() map[string]error {
	_, err := os.Lstat(filepath.Join(s.dir, marker))
	content := err != nil
	bad := map[string]error{}
	for _, f := range s.manifest.Files {
		if err := f.Check(s.dir, content); err != nil {
			bad[f.Name] = err
		}
	}
	return bad
}

// repair replaces single files. Without the marker an interrupted repair is found by the next start.
func (s *stager) repair(ctx context.Context, bad map[string]error) error {
	var example error
	for _, example = range bad {
		break
	}
	s.log.Warn("staged programs are damaged, repairing", "dir", s.dir, "files", len(bad), "example", example)
	if err := os.Remove(filepath.Join(s.dir, marker)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	tmp, fresh, err := s.temp()
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	defer fresh.Close()
	if err := s.unpack(ctx, fresh, func(name string) bool { return bad[name] != nil }); err != nil {
		return err
	}
	for name := range bad {
		to := filepath.Join(s.dir, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		err := os.Rename(filepath.Join(tmp, name), to)
		if err != nil { // something that is no file has its name
			err = errors.Join(os.RemoveAll(to), os.Rename(filepath.Join(tmp, name), to))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// lock keeps two processes from staging at the same time. It waits until ctx ends.
func lock(ctx context.Context, base string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(base, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, &fs.PathError{Op: "lock", Path: f.Name(), Err: err}
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for another Kedge process that stages its programs: %w", context.Cause(ctx))
		case <-time.After(20 * time.Millisecond):
		}
	}
}
