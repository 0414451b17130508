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
)

// Unpack writes the files of an archive to root, which must have none of them yet. want chooses them by name, nil means
// all. An archive that has anything else in it than the manifest says is refused, and so is one in which a wanted file
// is missing.
func Unpack(ctx context.Context, r io.Reader, m *Manifest, root *os.Root, want func(name string) bool) error {
	left := make(map[string]File, len(m.Files))
	for _, f := range m.Files {
		left[f.Name] = f
	}
	// The decoder works in goroutines of its own: while it decompresses, this one writes.
	dec, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(windowSize))
	if err != nil {
		return fmt.Errorf("embedded files: %w", err)
	}
	defer dec.Close()

	u := unpacker{tar: tar.NewReader(dec), root: root, dirs: map[string]bool{".": true}, buf: make([]byte, 256<<10)}
	if err := u.all(ctx, left, want); err != nil {
		return err
	}
	// The checksum comes after the end of the tar.
	if _, err := io.Copy(io.Discard, dec); err != nil {
		return fmt.Errorf("embedded files: %w", err)
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
	buf  []byte
}

// all deletes from left what it has seen.
func (u *unpacker) all(ctx context.Context, left map[string]File, want func(string) bool) error {
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
		if err := u.one(f); err != nil {
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

func (u *unpacker) one(f File) error {
	if err := u.mkdir(path.Dir(f.Name)); err != nil {
		return err
	}
	if f.Link != "" {
		return u.root.Symlink(f.Link, f.Name)
	}
	w, err := u.root.OpenFile(f.Name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, f.Mode)
	if err != nil {
		return err
	}
	// Only Write: io.CopyBuffer would let the file choose a smaller buffer.
	_, err = io.CopyBuffer(struct{ io.Writer }{w}, u.tar, u.buf)
	return errors.Join(err, w.Chmod(f.Mode), w.Close())
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
