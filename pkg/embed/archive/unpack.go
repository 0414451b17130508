// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"
)

// writers is how many files are written at the same time as the next one is decompressed. It bounds the memory that
// Unpack takes to the window of the compression and writers+1 files.
const writers = 2

// Unpack writes the files of an archive to root, which must have none of them yet. want chooses them by name, nil means
// all. An archive that has anything else in it than the manifest says is refused, and so is one in which a wanted file
// is missing.
func Unpack(ctx context.Context, r io.Reader, m *Manifest, root *os.Root, want func(name string) bool) error {
	left := make(map[string]File, len(m.Files))
	for _, f := range m.Files {
		left[f.Name] = f
	}
	// One goroutine decompresses faster here than the decoder's own pipeline of three does on two cores.
	dec, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(windowSize))
	if err != nil {
		return fmt.Errorf("embedded files: %w", err)
	}
	defer dec.Close()

	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(writers)
	u := unpacker{tar: tar.NewReader(dec), root: root, dirs: map[string]bool{".": true}}
	err = u.all(ctx, g, left, want)
	if werr := g.Wait(); werr != nil {
		return werr // the cause when ctx was ended by a writer
	}
	if err != nil {
		return err
	}
	for name := range left {
		if want == nil || want(name) {
			return fmt.Errorf("embedded files: %s is in the manifest but not in the archive", name)
		}
	}
	return nil
}

type unpacker struct {
	tar  *tar.Reader
	root *os.Root
	dirs map[string]bool // those that exist
}

// all deletes from left what it has seen.
func (u *unpacker) all(ctx context.Context, g *errgroup.Group, left map[string]File, want func(string) bool) error {
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		h, err := u.tar.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("embedded files: %w", err)
		}
		f, ok := left[h.Name]
		if !ok {
			return fmt.Errorf("embedded files: the archive has %q, the manifest does not", h.Name)
		}
		if err := matches(h, &f); err != nil {
			return fmt.Errorf("embedded files: %w", err)
		}
		delete(left, f.Name)
		if want != nil && !want(f.Name) {
			continue
		}
		if err := u.one(g, f); err != nil {
			return fmt.Errorf("embedded files: %s: %w", f.Name, err)
		}
	}
}

// matches repeats the checks of ParseManifest: this is where a bad name would do harm.
func matches(h *tar.Header, f *File) error {
	if err := f.validate(); err != nil {
		return err
	}
	typeflag := byte(tar.TypeReg)
	if f.Link != "" {
		typeflag = tar.TypeSymlink
	}
	if h.Typeflag != typeflag || h.Linkname != f.Link || h.Size != f.Size {
		return fmt.Errorf("%q is not what the manifest says", f.Name)
	}
	return nil
}

func (u *unpacker) one(g *errgroup.Group, f File) error {
	if err := u.mkdir(path.Dir(f.Name)); err != nil {
		return err
	}
	if f.Link != "" {
		return u.root.Symlink(f.Link, f.Name)
	}
	content := make([]byte, f.Size)
	if _, err := io.ReadFull(u.tar, content); err != nil {
		return err
	}
	g.Go(func() error { return write(u.root, f, content) })
	return nil
}

// mkdir makes a directory and its parents, readable by everybody whatever the umask is.
func (u *unpacker) mkdir(dir string) error {
	if u.dirs[dir] {
		return nil
	}
	if err := u.mkdir(path.Dir(dir)); err != nil {
		return err
	}
	if err := u.root.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	u.dirs[dir] = true
	return u.root.Chmod(dir, 0o755)
}

func write(root *os.Root, f File, content []byte) error {
	w, err := root.OpenFile(f.Name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, f.Mode)
	if err != nil {
		return err
	}
	_, err = w.Write(content)
	return errors.Join(err, w.Chmod(f.Mode), w.Close())
}
