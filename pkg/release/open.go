// SPDX-License-Identifier: Apache-2.0

package release

import (
	"archive/tar"
	"cmp"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"
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

// stallTimeout is how long a server may send nothing. A slow one may take as long as it does.
const stallTimeout = time.Minute

// errStalled ends a download of which nothing comes any more.
var errStalled = errors.New("nothing came for a while")

// Get downloads a release, and says how far it is. What was written when it returns an error is worth nothing.
func Get(ctx context.Context, from string, to io.Writer, progress func(done, total int64)) error {
	return get(ctx, from, to, stallTimeout, progress)
}

func get(ctx context.Context, from string, to io.Writer, stall time.Duration, progress func(done, total int64)) error {
	u, err := url.Parse(from)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
		return fmt.Errorf("%q is not the URL of a release: https://HOST/kedge-VERSION-linux-ARCH.tar.zst", from)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(stall, func() { cancel(fmt.Errorf("%w (%s)", errStalled, stall)) })
	defer watchdog.Stop()
	failed := func(n, total int64, err error) error {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		after := ""
		if total > 0 {
			after = fmt.Sprintf(" after %d of %d bytes", n, total)
		}
		return fmt.Errorf("the download of %s ended%s: %w; the same command begins it anew", u.Redacted(), after, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		var inner *url.Error // it would name the URL again
		if errors.As(err, &inner) {
			err = inner.Err
		}
		return failed(0, 0, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s cannot be downloaded: the server says %q", u.Redacted(), res.Status)
	}
	total := max(res.ContentLength, 0)
	counter := &Progress{Total: total, Report: func(done, total int64) {
		watchdog.Reset(stall)
		if progress != nil {
			progress(done, total)
		}
	}}
	n, err := io.Copy(to, io.TeeReader(io.LimitReader(res.Body, maxBytes), counter))
	if err != nil || total > 0 && n != total {
		return failed(n, total, cmp.Or(err, io.ErrUnexpectedEOF))
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
