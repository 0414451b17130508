// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
)

// windowSize lets the encoder find what the programs, most of them written in Go, have in common.
const windowSize = 64 << 20

// Pack reads the directory src and returns its archive and the manifest of it. Owners and times are left out and modes
// are reduced to 0755 (somebody may execute it) and 0644, so that the same contents give the same bytes.
func Pack(src string) (data, manifest []byte, err error) {
	var (
		m   Manifest
		buf bytes.Buffer
		tw  = tar.NewWriter(&buf)
	)
	err = filepath.WalkDir(src, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(src, name)
		if err != nil {
			return err
		}
		f, content, err := describe(name, filepath.ToSlash(rel), d)
		if err != nil {
			return err
		}
		m.Files = append(m.Files, f)
		if err := tw.WriteHeader(header(f)); err != nil {
			return err
		}
		_, err = tw.Write(content)
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("packing %s: %w", src, err)
	}
	if err := tw.Close(); err != nil {
		return nil, nil, fmt.Errorf("packing %s: %w", src, err)
	}
	if manifest, err = json.Marshal(m); err != nil {
		return nil, nil, err
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(windowSize),
		zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, nil, err
	}
	defer enc.Close()
	return enc.EncodeAll(buf.Bytes(), nil), manifest, nil
}

func describe(name, rel string, d fs.DirEntry) (File, []byte, error) {
	switch {
	case d.Type() == fs.ModeSymlink:
		to, err := os.Readlink(name)
		f := File{Name: rel, Link: to}
		if err == nil {
			err = f.validate()
		}
		return f, nil, err
	case !d.Type().IsRegular():
		return File{}, nil, fmt.Errorf("%s is neither a regular file nor a symbolic link", name)
	}
	st, err := d.Info()
	if err != nil {
		return File{}, nil, err
	}
	content, err := os.ReadFile(name)
	if err != nil {
		return File{}, nil, err
	}
	sum := sha256.Sum256(content)
	f := File{Name: rel, Mode: 0o644, Size: int64(len(content)), SHA256: hex.EncodeToString(sum[:])}
	if st.Mode()&0o111 != 0 {
		f.Mode = 0o755
	}
	return f, content, nil
}

func header(f File) *tar.Header {
	if f.Link != "" {
		return &tar.Header{Typeflag: tar.TypeSymlink, Name: f.Name, Linkname: f.Link, Mode: 0o777}
	}
	return &tar.Header{Typeflag: tar.TypeReg, Name: f.Name, Size: f.Size, Mode: int64(f.Mode)}
}
