// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// sizes measures the files that a user has to get, as they are and compressed: of Kedge the binary, of stock an archive of
// the programs that a node runs, so that xz finds what they have in common.
func sizes(ctx context.Context, o options, res *results) error {
	for _, side := range o.sides {
		rec := &recorder{results: res, side: side, run: 1}
		files := []string{o.kedge}
		if side == "stock" {
			var err error
			if files, err = stockFiles(o.stock); err != nil {
				return err
			}
		}
		var sum int64
		for _, f := range files {
			st, err := os.Stat(f)
			if err != nil {
				return err
			}
			sum += st.Size()
		}
		rec.add("files", float64(len(files)))
		rec.add("size", float64(sum)/1e6)
		packed, err := compressed(ctx, o, files)
		if err != nil {
			return fmt.Errorf("xz of %s: %w", side, err)
		}
		rec.add("xz", float64(packed)/1e6)
		fmt.Printf("%-5s %s\n", side, rec.line())
	}
	return nil
}

// compressed is the size after xz. It is remembered, because it takes minutes.
func compressed(ctx context.Context, o options, files []string) (int64, error) {
	hash := sha256.New()
	if err := pack(hash, files); err != nil {
		return 0, err
	}
	memory := filepath.Join(filepath.Dir(o.units), fmt.Sprintf("xz%s-%x", o.xz, hash.Sum(nil)[:8]))
	if b, err := os.ReadFile(memory); err == nil {
		return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	}
	fmt.Println("xz, once for the same files; it takes some minutes")
	cmd := exec.CommandContext(ctx, "nice", "xz", o.xz, "-T1", "-c")
	in, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	out := &counter{}
	var stderr strings.Builder
	cmd.Stdout, cmd.Stderr = out, &stderr
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	err = errors.Join(pack(in, files), in.Close())
	if err = errors.Join(cmd.Wait(), err); err != nil {
		return 0, fmt.Errorf("%w: %s", err, stderr.String())
	}
	return out.n, os.WriteFile(memory, []byte(strconv.FormatInt(out.n, 10)+"\n"), 0o644)
}

type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}

// pack writes one file as it is, several as a tar.
func pack(w io.Writer, files []string) error {
	if len(files) == 1 {
		return add(w, files[0])
	}
	t := tar.NewWriter(w)
	for _, f := range files {
		st, err := os.Stat(f)
		if err != nil {
			return err
		}
		if err := t.WriteHeader(&tar.Header{Name: filepath.Base(f), Mode: 0o755, Size: st.Size()}); err != nil {
			return err
		}
		if err := add(t, f); err != nil {
			return err
		}
	}
	return t.Close()
}

func add(w io.Writer, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	return errors.Join(err, f.Close())
}
