// SPDX-License-Identifier: Apache-2.0

// Package archive is the format of the embedded files: a zstd-compressed tar of regular files and of symbolic links
// between files of one directory, and beside it a manifest that says what must be in it. The manifest is what a staged
// directory is checked against, which needs no decompression.
package archive

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// Names of the two files within the directory that is embedded.
const (
	ArchiveName  = "files.tar.zst"
	ManifestName = "manifest.json"
)

// File describes one file of the archive.
type File struct {
	Name   string      `json:"name"`             // slash-separated, relative, without "." and ".."
	Mode   fs.FileMode `json:"mode,omitempty"`   // permission bits, 0755 or 0644; 0 for a link
	Size   int64       `json:"size,omitempty"`   // bytes
	SHA256 string      `json:"sha256,omitempty"` // of the content, hexadecimal
	Link   string      `json:"link,omitempty"`   // of a symbolic link: the name of a file in the same directory
}

// Manifest lists the files of an archive in the order in which they are in it.
type Manifest struct {
	Files []File `json:"files"`
}

// ParseManifest reads what Pack wrote and refuses names that lead out of the directory the files are unpacked to.
func ParseManifest(data []byte) (*Manifest, error) {
	m := &Manifest{}
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("manifest of the embedded files: %w", err)
	}
	for _, f := range m.Files {
		if err := f.validate(); err != nil {
			return nil, fmt.Errorf("manifest of the embedded files: %w", err)
		}
	}
	return m, nil
}

// ID is a hash over names, modes and contents, in 16 hexadecimal digits: the same files have the same ID, however they
// were compressed.
func (m *Manifest) ID() string {
	h := sha256.New()
	for _, f := range m.Files {
		fmt.Fprintf(h, "%s\x00%o\x00%d\x00%s\x00%s\n", f.Name, f.Mode, f.Size, f.SHA256, f.Link)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

func (f *File) validate() error {
	switch {
	case !fs.ValidPath(f.Name) || f.Name == "." || strings.Contains(f.Name, "\x00"):
		return fmt.Errorf("the name %q is not a path within the directory", f.Name)
	case f.Link != "" && (!fs.ValidPath(f.Link) || f.Link == "." || path.Base(f.Link) != f.Link):
		return fmt.Errorf("the link %q -> %q does not stay within its directory", f.Name, f.Link)
	case f.Mode != f.Mode.Perm():
		return fmt.Errorf("the file %q has mode %v: only permission bits are allowed", f.Name, f.Mode)
	}
	return nil
}

// Check compares a file below dir with its description and returns why it differs, or nil. With content it also reads
// and compares the whole content; without, it costs one or two system calls.
func (f *File) Check(dir string, content bool) error {
	name := filepath.Join(dir, f.Name)
	st, err := os.Lstat(name)
	if err != nil {
		return err
	}
	if f.Link != "" {
		to, err := os.Readlink(name)
		if err != nil {
			return err
		}
		if to != f.Link {
			return fmt.Errorf("%s links to %q instead of %q", f.Name, to, f.Link)
		}
		return nil
	}
	switch {
	case !st.Mode().IsRegular():
		return fmt.Errorf("%s is no regular file", f.Name)
	case st.Mode().Perm() != f.Mode:
		return fmt.Errorf("%s has mode %v instead of %v", f.Name, st.Mode().Perm(), f.Mode)
	case st.Size() != f.Size:
		return fmt.Errorf("%s has %d bytes instead of %d", f.Name, st.Size(), f.Size)
	case !content:
		return nil
	}
	r, err := os.Open(name)
	if err != nil {
		return err
	}
	defer r.Close()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return err
	}
	if hex.EncodeToString(h.Sum(nil)) != f.SHA256 {
		return fmt.Errorf("%s has another content", f.Name)
	}
	return nil
}
