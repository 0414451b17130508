// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"compress/gzip"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
)

const (
	sums      = "SHA256SUMS"
	signature = "SHA256SUMS.sig"
	// window is what unpacking takes in memory. More hardly makes the archive smaller.
	window = 8 << 20
)

// signTree writes the checksums of all files in a directory, and their signature.
func signTree(dir string, key ed25519.PrivateKey) error {
	files, err := regularFiles(dir)
	if err != nil {
		return err
	}
	return sign(dir, files, key)
}

// pack makes dist/NAME.tar.zst of the directory stage, and .tar.gz for machines without zstd, where NAME is the directory's.
// dist/SHA256SUMS is made anew, of all archives in dist.
func pack(stage, dist string, key ed25519.PrivateKey, mtime time.Time) error {
	if err := os.MkdirAll(dist, 0o755); err != nil {
		return err
	}
	if err := archives(stage, filepath.Join(dist, filepath.Base(stage)), mtime); err != nil {
		return err
	}
	return signDist(dist, key)
}

func signDist(dist string, key ed25519.PrivateKey) error {
	files, err := regularFiles(dist)
	if err != nil {
		return err
	}
	files = slices.DeleteFunc(files, func(name string) bool {
		return !strings.HasSuffix(name, ".tar.zst") && !strings.HasSuffix(name, ".tar.gz")
	})
	return sign(dist, files, key)
}

// regularFiles lists those of a directory but for the list itself, sorted. Anything else in there is an error.
func regularFiles(dir string) ([]string, error) {
	var files []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if !d.Type().IsRegular() {
			return fmt.Errorf("%s is neither file nor directory", path)
		}
		name, err := filepath.Rel(dir, path)
		if name != sums && name != signature {
			files = append(files, name)
		}
		return err
	})
	slices.Sort(files)
	return files, err
}

// sign writes the checksums of files in dir and their signature.
func sign(dir string, files []string, key ed25519.PrivateKey) error {
	var list strings.Builder
	for _, name := range files {
		hash := sha256.New()
		if err := copyTo(hash, filepath.Join(dir, name)); err != nil {
			return err
		}
		fmt.Fprintf(&list, "%s  %s\n", hex.EncodeToString(hash.Sum(nil)), name)
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, sums), []byte(list.String()), 0o644),
		os.WriteFile(filepath.Join(dir, signature), ed25519.Sign(key, []byte(list.String())), 0o644))
}

// archives packs stage twice. Each file appears under its name when it is complete.
func archives(stage, base string, mtime time.Time) (err error) {
	var compressors []io.WriteCloser
	var outputs []io.Writer
	for _, suffix := range []string{".tar.zst", ".tar.gz"} {
		name := base + suffix
		f, err := os.Create(name + ".part")
		if err != nil {
			return err
		}
		defer os.Remove(f.Name())
		var c io.WriteCloser
		if suffix == ".tar.zst" {
			c, err = zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1))
		} else {
			c, err = gzip.NewWriterLevel(f, gzip.BestCompression)
		}
		if err != nil {
			return err
		}
		compressors, outputs = append(compressors, closer{c, f, name}), append(outputs, c)
	}
	if err := writeTar(io.MultiWriter(outputs...), stage, mtime); err != nil {
		return err
	}
	for _, c := range compressors {
		if err := c.Close(); err != nil {
			return err
		}
	}
	return nil
}

// closer ends an archive and gives it its name.
type closer struct {
	io.WriteCloser
	file *os.File
	name string
}

// Close flushes and renames.
func (c closer) Close() error {
	return errors.Join(c.WriteCloser.Close(), c.file.Close(), os.Rename(c.file.Name(), c.name))
}

// writeTar packs dir under its base name, with nothing in it that depends on who packs and when. GNU's format, since busybox
// does not understand long names in the other one.
func writeTar(w io.Writer, dir string, mtime time.Time) error {
	tw := tar.NewWriter(w)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error { // sorted
		if err != nil {
			return err
		}
		name, err := filepath.Rel(filepath.Dir(dir), path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Size: info.Size(), Mode: 0o644, ModTime: mtime, Format: tar.FormatGNU}
		if info.Mode()&0o111 != 0 {
			h.Mode = 0o755
		}
		if d.IsDir() {
			h.Name, h.Typeflag, h.Size, h.Mode = name+"/", tar.TypeDir, 0, 0o755
		}
		if err := tw.WriteHeader(h); err != nil || d.IsDir() {
			return err
		}
		return copyTo(tw, path)
	})
	return errors.Join(err, tw.Close())
}

func copyTo(w io.Writer, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}
