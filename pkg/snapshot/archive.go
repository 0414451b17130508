// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/zstd"
)

// The file is a tar archive of these entries, in this order. Metadata come first, so that a listing reads little; the digests come last,
// so that a file without its end is known as such. The database is as etcdctl writes it: `tar xf` and `etcdutl snapshot restore` can do
// without Kedge.
const (
	entryMetadata = "metadata.json"
	entryKeys     = "keys.age"  // optional
	entryData     = "db"        // or
	entryDataZstd = "db.zst"    // compressed
	entrySums     = "sums.json" // digest (SHA-256) of each entry before it
)

// What is believed of a file at most: it may come from anywhere.
const (
	maxMetadata = 1 << 20
	maxKeys     = 4 << 20
	maxSums     = 64 << 10
	maxDatabase = 64 << 30
	maxWindow   = 32 << 20 // of the decompressor
)

const tarBlock = 512

// writeArchive writes a snapshot. The size of a compressed database is known only afterwards: its header is filled in then.
func writeArchive(ctx context.Context, out io.WriteSeeker, m *Metadata, keys []byte, db io.Reader, compress bool) error {
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	sums := map[string]string{}
	small := func(name string, data []byte) error {
		sum := sha256.Sum256(data)
		sums[name] = hex.EncodeToString(sum[:])
		header, err := tarHeader(m, name, int64(len(data)))
		if err != nil {
			return err
		}
		_, err = out.Write(append(append(header, data...), make([]byte, padding(int64(len(data))))...))
		return err
	}
	if err := small(entryMetadata, append(text, '\n')); err != nil {
		return err
	}
	if keys != nil {
		if err := small(entryKeys, keys); err != nil {
			return err
		}
	}
	name := entryData
	if compress {
		name = entryDataZstd
	}
	if sums[name], err = writeData(out, m, name, &contextReader{ctx, db}, compress); err != nil {
		return err
	}
	list, err := json.Marshal(sums)
	if err != nil {
		return err
	}
	if err := small(entrySums, list); err != nil {
		return err
	}
	_, err = out.Write(make([]byte, 2*tarBlock)) // the end
	return err
}

func writeData(out io.WriteSeeker, m *Metadata, name string, db io.Reader, compress bool) (sum string, err error) {
	at, err := out.Seek(0, io.SeekCurrent)
	if err != nil {
		return "", err
	}
	if _, err := out.Write(make([]byte, tarBlock)); err != nil {
		return "", err
	}
	h := sha256.New()
	count := &counter{w: io.MultiWriter(out, h)}
	var to io.WriteCloser = nopCloser{count}
	if compress {
		// One thread: it runs beside the cluster.
		if to, err = zstd.NewWriter(count, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(4<<20)); err != nil {
			return "", err
		}
	}
	_, err = io.Copy(to, db)
	if err := errors.Join(err, to.Close()); err != nil {
		return "", err
	}
	if _, err := out.Write(make([]byte, padding(count.n))); err != nil {
		return "", err
	}
	header, err := tarHeader(m, name, count.n)
	if err != nil {
		return "", err
	}
	if _, err := out.Seek(at, io.SeekStart); err != nil {
		return "", err
	}
	if _, err := out.Write(header); err != nil {
		return "", err
	}
	_, err = out.Seek(0, io.SeekEnd)
	return hex.EncodeToString(h.Sum(nil)), err
}

// tarHeader is always one block: names are short, and GNU's format has room for any size.
func tarHeader(m *Metadata, name string, size int64) ([]byte, error) {
	var b bytes.Buffer
	err := tar.NewWriter(&b).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: m.Created.UTC().Truncate(1e9), Format: tar.FormatGNU})
	if err == nil && b.Len() != tarBlock {
		err = fmt.Errorf("tar header of %d bytes", b.Len())
	}
	return b.Bytes(), err
}

func padding(size int64) int64 { return (tarBlock - size%tarBlock) % tarBlock }

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// readMetadata reads the beginning of a snapshot.
func readMetadata(r io.Reader) (*Metadata, error) {
	a := &reader{tar: tar.NewReader(r)}
	return a.metadata()
}

// readArchive reads a whole snapshot and writes the database to db. Whatever is in it that is not as it was written is an error that wraps
// ErrDamaged; what db has got by then is of no use.
func readArchive(ctx context.Context, r io.Reader, db io.Writer) (m *Metadata, keys []byte, err error) {
	a := &reader{tar: tar.NewReader(&contextReader{ctx, r}), sums: map[string]string{}}
	if m, err = a.metadata(); err != nil {
		return nil, nil, err
	}
	name, size, err := a.next()
	if err != nil {
		return nil, nil, err
	}
	if name == entryKeys {
		if keys, err = a.small(name, size, maxKeys); err != nil {
			return nil, nil, err
		}
		if name, _, err = a.next(); err != nil {
			return nil, nil, err
		}
	}
	if m.HasKeys() != (keys != nil) {
		return nil, nil, damaged("whether it has keys is not as it says")
	}
	if err := a.data(name, m, db); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, nil, err
	}
	if name, size, err = a.next(); err != nil {
		return nil, nil, err
	}
	if name != entrySums {
		return nil, nil, damaged("%q in the place of the digests", name)
	}
	written := a.sums
	a.sums = map[string]string{}
	text, err := a.small(name, size, maxSums)
	if err != nil {
		return nil, nil, err
	}
	var want map[string]string
	if err := json.Unmarshal(text, &want); err != nil {
		return nil, nil, damaged("digests: %w", err)
	}
	for name, sum := range written {
		if want[name] != sum {
			return nil, nil, damaged("%s does not have its digest", name)
		}
	}
	return m, keys, nil
}

// reader reads the entries in order. sums collects their digests, if it is not nil.
type reader struct {
	tar  *tar.Reader
	sums map[string]string
}

func (a *reader) next() (name string, size int64, err error) {
	h, err := a.tar.Next()
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "", 0, damaged("its end is missing")
	case err != nil:
		return "", 0, damaged("%w", err)
	case h.Typeflag != tar.TypeReg:
		return "", 0, damaged("%q is not a file", h.Name)
	}
	return h.Name, h.Size, nil
}

func (a *reader) metadata() (*Metadata, error) {
	name, size, err := a.next()
	if err != nil {
		return nil, err
	}
	if name != entryMetadata {
		return nil, damaged("it begins with %q: is it a snapshot of Kedge?", name)
	}
	text, err := a.small(name, size, maxMetadata)
	if err != nil {
		return nil, err
	}
	return parseMetadata(text)
}

func (a *reader) small(name string, size, limit int64) ([]byte, error) {
	if size > limit {
		return nil, damaged("%s has %d bytes", name, size)
	}
	data := make([]byte, size)
	if _, err := io.ReadFull(a.tar, data); err != nil {
		return nil, damaged("%s: %w", name, err)
	}
	if a.sums != nil {
		sum := sha256.Sum256(data)
		a.sums[name] = hex.EncodeToString(sum[:])
	}
	return data, nil
}

// data takes the database apart from what it is packed in, and never more than it is said to be.
func (a *reader) data(name string, m *Metadata, db io.Writer) error {
	var stored hash.Hash = sha256.New()
	in := io.TeeReader(a.tar, stored)
	var plain io.Reader = in
	switch name {
	case entryData:
	case entryDataZstd:
		dec, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(2*maxWindow))
		if err != nil {
			return damaged("%s: %w", name, err)
		}
		defer dec.Close()
		plain = dec
	default:
		return damaged("%q in the place of the database", name)
	}
	content := sha256.New()
	n, err := io.Copy(io.MultiWriter(db, content), io.LimitReader(plain, m.Data.Size+1))
	if pathErr := writeError(err); pathErr != nil {
		return pathErr
	}
	switch {
	case err != nil:
		return damaged("%s: %w", name, err)
	case n != m.Data.Size:
		return damaged("the database has %d bytes or more, not %d", n, m.Data.Size)
	case hex.EncodeToString(content.Sum(nil)) != m.Data.SHA256:
		return damaged("the database does not have its digest")
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return damaged("%s: %w", name, err)
	}
	a.sums[name] = hex.EncodeToString(stored.Sum(nil))
	return nil
}
