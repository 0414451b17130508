// SPDX-License-Identifier: Apache-2.0

package release

import (
	"archive/tar"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
)

// Open gives a release archive as Extract takes it, from a file or from an unpacked directory, which has kept the name that it had in
// the archive. The caller closes it. size is that of a file, and 0 when it is not known.
func Open(path string) (r io.ReadCloser, size int64, err error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, 0, err
	}
	if !st.IsDir() {
		f, err := os.Open(path)
		return f, st.Size(), err
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, 0, err
	}
	top := filepath.Base(abs)
	if _, err := ParseName(top); err != nil {
		return nil, 0, fmt.Errorf("an unpacked release keeps its name: %w", err)
	}
	pr, pw := io.Pipe()
	go func() { pw.CloseWithError(pack(pw, abs, top)) }()
	return pr, 0, nil
}

// Get downloads a release to a file that must not exist, and says how far it is. An incomplete file is removed.
func Get(ctx context.Context, from, to string, progress func(done, total int64)) (err error) {
	u, err := url.Parse(from)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" {
		return fmt.Errorf("%q is not the URL of a release", from)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("download: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("download %s: %s", from, res.Status)
	}
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(to))
		}
	}()
	counter := &Progress{Total: max(res.ContentLength, 0), Report: progress}
	n, err := io.Copy(f, io.TeeReader(io.LimitReader(res.Body, maxBytes), counter))
	switch {
	case err != nil:
		return fmt.Errorf("download %s: %w", from, err)
	case res.ContentLength > 0 && n != res.ContentLength:
		return fmt.Errorf("download %s: it ended after %d of %d bytes", from, n, res.ContentLength)
	}
	return nil
}

// Progress counts what is written to it.
type Progress struct {
	Total  int64 // bytes, 0: not known
	Report func(done, total int64)

	done int64
}

// Write only counts.
func (p *Progress) Write(b []byte) (int, error) {
	p.done += int64(len(b))
	if p.Report != nil {
		p.Report(p.done, p.Total)
	}
	return len(b), nil
}

// ProgramArch says for which architecture a program is, as Go calls it.
func ProgramArch(path string) (string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return "", fmt.Errorf("%s is not a program for Linux: %w", path, err)
	}
	defer f.Close()
	switch f.Machine {
	case elf.EM_X86_64:
		return "amd64", nil
	case elf.EM_AARCH64:
		return "arm64", nil
	}
	return f.Machine.String(), nil
}

// pack writes the part of an unpacked release that Extract needs as a tar.
func pack(w io.Writer, dir, top string) error {
	out := tar.NewWriter(w)
	for _, name := range []string{Sums, Signature, Binary} {
		if err := add(out, filepath.Join(dir, name), top+"/"+name); err != nil {
			return err
		}
	}
	return out.Close()
}

func add(out *tar.Writer, file, name string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is not a file", file)
	}
	if err := out.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: st.Size(), Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	_, err = io.Copy(out, f)
	return err
}
