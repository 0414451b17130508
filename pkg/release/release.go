// SPDX-License-Identifier: Apache-2.0

// Package release reads what `make release` writes: kedge-VERSION-linux-ARCH.tar.zst, with one directory of that name that holds
// the binary, the installer, documents, their checksums (SHA256SUMS) and an ed25519 signature of those (SHA256SUMS.sig).
//
// What comes out of Extract has been signed by a key that this machine trusts. The name of the directory is not signed: the version
// of a binary is what the binary itself says.
package release

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// Files of a release that have a meaning here.
const (
	Binary    = "kedge"
	Sums      = "SHA256SUMS"
	Signature = "SHA256SUMS.sig"
)

// Limits on what is read before anything is trusted, far above what a release has.
const (
	maxEntries = 10000
	maxSums    = 1 << 20
	maxBytes   = 2 << 30  // of all files together
	maxWindow  = 64 << 20 // of the decompressor
)

var (
	// ErrUntrusted says that no key that this machine trusts has signed the release, or that it is not what was signed.
	ErrUntrusted = errors.New("the release is not trusted")
	// ErrDamaged says that it cannot be read: an incomplete download, another kind of file.
	ErrDamaged = errors.New("not a complete release archive")
)

// Info is what the name of a release says.
type Info struct {
	Version string `json:"version"` // as `kedge version` prints it
	Arch    string `json:"arch"`    // as Go calls it
	Size    int64  `json:"size"`    // of the binary, bytes
}

// Trusts says why what a key with this fingerprint has signed is not trusted.
func Trusts(keys []Key, fingerprint string) error {
	switch {
	case len(keys) == 0:
		return fmt.Errorf("%w: this build of kedge knows no key, and there is none in %s: put the release.pub of whoever made the release there, "+
			"when you have compared it with what they publish", ErrUntrusted, DefaultKeyFile)
	case slices.ContainsFunc(keys, func(k Key) bool { return k.Fingerprint() == fingerprint }):
		return nil
	}
	return fmt.Errorf("%w: its signature is by none of the keys that this machine trusts (%s); if you know who signed it, add their release.pub to %s",
		ErrUntrusted, describe(keys), DefaultKeyFile)
}

// Release has been checked.
type Release struct {
	Info
	SHA256 string `json:"sha256"` // of the binary
	Signer string `json:"signer"` // fingerprint of the key, see Fingerprint
}

// nameExpression is that of the directory in the archive, which is the archive's, too.
const nameExpression = `^kedge-(v[0-9][0-9A-Za-z.+-]{0,60})-linux-([0-9a-z]{1,16})$`

// ParseName takes the name of a release apart, with or without .tar.zst.
func ParseName(name string) (Info, error) {
	re, err := regexp.Compile(nameExpression)
	if err != nil {
		return Info{}, err
	}
	m := re.FindStringSubmatch(strings.TrimSuffix(name, ".tar.zst"))
	if m == nil {
		return Info{}, fmt.Errorf("%q is not kedge-VERSION-linux-ARCH", name)
	}
	return Info{Version: m[1], Arch: m[2]}, nil
}

// ParseSums reads the output of sha256sum: names, relative to the release, and hashes.
func ParseSums(text []byte) (map[string][sha256.Size]byte, error) {
	sums := map[string][sha256.Size]byte{}
	for i, line := range strings.Split(strings.TrimRight(string(text), "\n"), "\n") {
		hash, name, ok := strings.Cut(line, "  ")
		if !ok { // of files in binary mode
			hash, name, ok = strings.Cut(line, " *")
		}
		name = strings.TrimPrefix(name, "./")
		b, err := hex.DecodeString(hash)
		if !ok || err != nil || len(b) != sha256.Size || !safe(name) {
			return nil, fmt.Errorf("%s: line %d is not a checksum and a name", Sums, i+1)
		}
		if _, double := sums[name]; double {
			return nil, fmt.Errorf("%s: %s is there twice", Sums, name)
		}
		sums[name] = [sha256.Size]byte(b)
	}
	return sums, nil
}

// safe says whether a name stays within its directory.
func safe(name string) bool {
	return name != "" && name == path.Clean(name) && !path.IsAbs(name) && name != "." && name != ".." && !strings.HasPrefix(name, "../") &&
		!strings.ContainsAny(name, "\x00\\\n\r")
}

// Extract reads a release and hands out the binary in it, and nothing else. open is asked for a place for it once its size is known,
// and may refuse; what was written there is worth nothing unless Extract returns no error, which wraps ErrUntrusted or ErrDamaged
// where that is what is wrong. src is as Open gives it, or comes over the network.
func Extract(ctx context.Context, src io.Reader, keys []Key, open func(Info) (io.Writer, error)) (*Release, error) {
	if len(keys) == 0 {
		return nil, Trusts(nil, "")
	}
	unpacked, closer, err := decompress(&contextReader{ctx: ctx, src: src})
	if err != nil {
		return nil, err
	}
	defer closer()
	x := extraction{open: open, hashes: map[string][sha256.Size]byte{}, small: map[string][]byte{}}
	if err := x.all(tar.NewReader(unpacked)); err != nil {
		return nil, err
	}
	// The checksum of the compression comes after the end of the tar.
	if _, err := io.Copy(io.Discard, io.LimitReader(unpacked, maxSums)); err != nil {
		return nil, readError(err)
	}
	return x.verify(keys)
}

// decompress takes a plain tar, too: an unpacked directory is read as one.
func decompress(src *contextReader) (io.Reader, func(), error) {
	in := bufio.NewReaderSize(src, 1<<16)
	magic, err := in.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	if !bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}) {
		return in, func() {}, nil
	}
	dec, err := zstd.NewReader(in, zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return &unpacker{dec, src}, dec.Close, nil
}

// unpacker tells what is wrong with an archive from what is wrong with where it comes from.
type unpacker struct {
	dec io.Reader
	src *contextReader
}

func (u *unpacker) Read(p []byte) (int, error) {
	n, err := u.dec.Read(p)
	if err != nil && !errors.Is(err, io.EOF) && u.src.err == nil {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return n, err
}

// contextReader ends with a context.
type contextReader struct {
	ctx context.Context //nolint:containedctx // io.Reader has no place for it
	src io.Reader
	err error // that ended it, other than io.EOF
}

func (r *contextReader) Read(p []byte) (n int, err error) {
	if r.ctx.Err() != nil {
		err = context.Cause(r.ctx)
	} else {
		n, err = r.src.Read(p)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return n, err
}

type extraction struct {
	open func(Info) (io.Writer, error)

	info   Info
	top    string // the one directory
	hashes map[string][sha256.Size]byte
	small  map[string][]byte
	bytes  int64
}

func (x *extraction) all(r *tar.Reader) error {
	for entries := 0; ; entries++ {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		if entries == maxEntries {
			return fmt.Errorf("%w: more than %d files", ErrDamaged, maxEntries)
		}
		if err := x.entry(h, r); err != nil {
			return err
		}
	}
}

func (x *extraction) entry(h *tar.Header, r io.Reader) error {
	name := strings.TrimPrefix(strings.TrimSuffix(h.Name, "/"), "./")
	if name == "" || name == "." {
		return nil
	}
	top, rest, _ := strings.Cut(name, "/")
	if x.top == "" {
		info, err := ParseName(top)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		x.top, x.info = top, info
	}
	switch {
	case top != x.top || !safe(name):
		return fmt.Errorf("%w: it has %q outside of %s", ErrDamaged, h.Name, x.top)
	case h.Typeflag == tar.TypeDir:
		return nil
	case h.Typeflag != tar.TypeReg || rest == "":
		return fmt.Errorf("%w: %q is neither a file nor a directory", ErrDamaged, h.Name)
	}
	if _, double := x.hashes[rest]; double {
		return fmt.Errorf("%w: it has %q twice", ErrDamaged, h.Name)
	}
	if x.bytes += h.Size; h.Size < 0 || x.bytes > maxBytes {
		return fmt.Errorf("%w: more than %d bytes", ErrDamaged, maxBytes)
	}
	out, err := x.place(rest, h.Size)
	if err != nil {
		return err
	}
	hash := sha256.New()
	if _, err := io.Copy(io.MultiWriter(hash, out), r); err != nil {
		return readError(err)
	}
	x.hashes[rest] = [sha256.Size]byte(hash.Sum(nil))
	if b, ok := out.(*bytes.Buffer); ok {
		x.small[rest] = b.Bytes()
	}
	return nil
}

// readError leaves errors of the caller's place as they are: a full disk is no damaged archive.
func readError(err error) error {
	if !errors.Is(err, ErrDamaged) && (errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrHeader)) {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return err
}

// place says where a file's content goes.
func (x *extraction) place(name string, size int64) (io.Writer, error) {
	switch name {
	case Binary:
		x.info.Size = size
		return x.open(x.info)
	case Sums, Signature:
		if size > maxSums {
			return nil, fmt.Errorf("%w: %s has %d bytes", ErrDamaged, name, size)
		}
		return &bytes.Buffer{}, nil
	}
	return io.Discard, nil
}

// verify compares what was read with what was signed. A file that is listed and not there is no matter: it is not used.
func (x *extraction) verify(keys []Key) (*Release, error) {
	sums, sig := x.small[Sums], x.small[Signature]
	for _, name := range []string{Binary, Sums, Signature} {
		if _, ok := x.hashes[name]; !ok {
			return nil, fmt.Errorf("%w: there is no %s in it", ErrDamaged, name)
		}
	}
	signer := ""
	for _, k := range keys {
		if len(sig) == ed25519.SignatureSize && ed25519.Verify(k.Public, sums, sig) {
			signer = k.Fingerprint()
			break
		}
	}
	if signer == "" {
		return nil, Trusts(keys, "")
	}
	want, err := ParseSums(sums)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	for name, got := range x.hashes {
		if name == Sums || name == Signature {
			continue
		}
		if sum, listed := want[name]; !listed {
			return nil, fmt.Errorf("%w: %s is not in %s", ErrUntrusted, name, Sums)
		} else if sum != got {
			return nil, fmt.Errorf("%w: %s is not the file that was signed", ErrUntrusted, name)
		}
	}
	binary := x.hashes[Binary]
	return &Release{Info: x.info, SHA256: hex.EncodeToString(binary[:]), Signer: signer}, nil
}
