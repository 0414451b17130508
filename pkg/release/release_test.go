// SPDX-License-Identifier: Apache-2.0

package release

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

const top = "kedge-v1.37.2+kedge2-linux-amd64"

// signer is the same in all tests.
func signer() ed25519.PrivateKey { return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32)) }

func trusted() []Key { return []Key{{signer().Public().(ed25519.PublicKey), "the test"}} }

// files is a release as it is on disk.
func files(key ed25519.PrivateKey) map[string]string {
	m := map[string]string{Binary: "\x7fELF and so on", "install.sh": "#!/bin/sh\n", "docs/a.md": "text\n"}
	var sums strings.Builder
	for _, name := range slices.Sorted(maps.Keys(m)) {
		fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256([]byte(m[name])), name)
	}
	m[Sums] = sums.String()
	m[Signature] = string(ed25519.Sign(key, []byte(m[Sums])))
	return m
}

func archive(t testing.TB, files map[string]string, change func(h *tar.Header)) []byte {
	t.Helper()
	var buf bytes.Buffer
	enc, err := zstd.NewWriter(&buf)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(enc)
	if err := w.WriteHeader(&tar.Header{Name: top + "/", Typeflag: tar.TypeDir, Mode: 0o755}); err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Name: top + "/" + name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(files[name]))}
		if change != nil {
			change(h)
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if _, err := io.WriteString(w, files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), enc.Close()); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func extract(b []byte, keys []Key) (*Release, string, error) {
	var out bytes.Buffer
	rel, err := Extract(context.Background(), bytes.NewReader(b), keys, func(Info) (io.Writer, error) { return &out, nil })
	return rel, out.String(), err
}

func TestExtract(t *testing.T) {
	other := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{8}, 32))
	good := archive(t, files(signer()), nil)
	edit := func(f func(map[string]string)) []byte {
		m := files(signer())
		f(m)
		return archive(t, m, nil)
	}
	rename := func(from, to string) []byte {
		return archive(t, files(signer()), func(h *tar.Header) {
			if h.Name == top+"/"+from {
				h.Name = to
			}
		})
	}
	for name, c := range map[string]struct {
		archive []byte
		keys    []Key
		want    error // nil: it is good
		text    string
	}{
		"good":                 {good, trusted(), nil, ""},
		"good by a second key": {good, append([]Key{{other.Public().(ed25519.PublicKey), "x"}}, trusted()...), nil, ""},
		"no keys":              {good, nil, ErrUntrusted, "release.pub"},
		"signed by another":    {archive(t, files(other), nil), trusted(), ErrUntrusted, "none of the keys"},
		"binary changed":       {edit(func(m map[string]string) { m[Binary] += "x" }), trusted(), ErrUntrusted, "kedge is not the file"},
		"installer changed":    {edit(func(m map[string]string) { m["install.sh"] += "x" }), trusted(), ErrUntrusted, "install.sh"},
		"sums changed":         {edit(func(m map[string]string) { m[Sums] += "\n" }), trusted(), ErrUntrusted, "signature"},
		"file added":           {edit(func(m map[string]string) { m["more"] = "x" }), trusted(), ErrUntrusted, "more"},
		"short signature":      {edit(func(m map[string]string) { m[Signature] = "x" }), trusted(), ErrUntrusted, "signature"},
		"no signature":         {edit(func(m map[string]string) { delete(m, Signature) }), trusted(), ErrDamaged, Signature},
		"no binary":            {edit(func(m map[string]string) { delete(m, Binary) }), trusted(), ErrDamaged, Binary},
		"a document is gone":   {edit(func(m map[string]string) { delete(m, "docs/a.md") }), trusted(), nil, ""},
		"cut off":              {good[:len(good)-20], trusted(), ErrDamaged, ""},
		"cut off early":        {good[:40], trusted(), ErrDamaged, ""},
		"empty":                {nil, trusted(), ErrDamaged, ""},
		"something else":       {[]byte("<html>not found</html>"), trusted(), ErrDamaged, ""},
		"name climbs":          {rename("docs/a.md", top+"/../../etc/passwd"), trusted(), ErrDamaged, "outside"},
		"absolute name":        {rename("docs/a.md", "/etc/passwd"), trusted(), ErrDamaged, "outside"},
		"second directory":     {rename("docs/a.md", "kedge-v9-linux-amd64/kedge"), trusted(), ErrDamaged, "outside"},
		"twice":                {rename("docs/a.md", top+"/kedge"), trusted(), ErrDamaged, "twice"},
		"link": {archive(t, files(signer()), func(h *tar.Header) {
			if h.Name == top+"/docs/a.md" {
				h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, "/etc/passwd", 0
			}
		}), trusted(), ErrDamaged, "neither"},
	} {
		t.Run(name, func(t *testing.T) {
			rel, binary, err := extract(c.archive, c.keys)
			if c.want != nil {
				if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
					t.Errorf("%v; want %v with %q", err, c.want, c.text)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := files(signer())[Binary]
			if rel.Version != "v1.37.2+kedge2" || rel.Arch != "amd64" || rel.Size != int64(len(want)) || binary != want ||
				rel.SHA256 != fmt.Sprintf("%x", sha256.Sum256([]byte(want))) || rel.Signer != trusted()[0].Fingerprint() {
				t.Errorf("%+v, %q", rel, binary)
			}
		})
	}
}

// TestFlipped: a byte that is another one is noticed, and called what it is.
func TestFlipped(t *testing.T) {
	good := archive(t, files(signer()), nil)
	for i := range good {
		flipped := bytes.Clone(good)
		flipped[i] ^= 0x41
		if _, _, err := extract(flipped, trusted()); err != nil && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrUntrusted) {
			t.Errorf("byte %d: %v", i, err)
		}
	}
}

// TestRefused: whoever provides the place may refuse it, and the error stays what it is.
func TestRefused(t *testing.T) {
	no := errors.New("no space")
	_, err := Extract(t.Context(), bytes.NewReader(archive(t, files(signer()), nil)), trusted(), func(Info) (io.Writer, error) { return nil, no })
	if !errors.Is(err, no) || errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
}

func TestOpenDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), top)
	for name, text := range files(signer()) {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755), os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	r, _, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if rel, _, err := extract(b, trusted()); err != nil || rel.Version != "v1.37.2+kedge2" {
		t.Errorf("%+v, %v", rel, err)
	}
	if _, _, err := Open(filepath.Dir(dir)); err == nil {
		t.Error("a directory of another name was taken")
	}
}

func TestGet(t *testing.T) {
	good := archive(t, files(signer()), nil)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/good":
			w.Write(good)
		case "/short":
			w.Header().Set("Content-Length", fmt.Sprint(len(good)))
			w.Write(good[:10])
		case "/stalled":
			w.Header().Set("Content-Length", fmt.Sprint(len(good)))
			w.Write(good[:10])
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		case "/silent":
			<-r.Context().Done()
		case "/slow":
			for i := range good[:20] {
				w.Write(good[i : i+1])
				w.(http.Flusher).Flush()
				time.Sleep(20 * time.Millisecond)
			}
		default:
			http.NotFound(w, r)
		}
	}))
	defer srv.Close()
	const stall = 200 * time.Millisecond
	var got bytes.Buffer
	var seen int64
	if err := get(t.Context(), srv.URL+"/good", &got, time.Minute, func(done, _ int64) { seen = done }); err != nil || seen != int64(len(good)) || !bytes.Equal(got.Bytes(), good) {
		t.Errorf("%v, %d bytes reported", err, seen)
	}
	if err := get(t.Context(), srv.URL+"/slow", io.Discard, stall, nil); err != nil {
		t.Errorf("a slow server: %v", err)
	}
	size := fmt.Sprint(len(good))
	for from, want := range map[string]string{
		srv.URL + "/short":        "ended after 10 of " + size + " bytes: unexpected EOF; the same command begins it anew",
		srv.URL + "/stalled":      "ended after 10 of " + size + " bytes: nothing came for a while (200ms)",
		srv.URL + "/silent":       "nothing came for a while (200ms)",
		srv.URL + "/none":         `/none cannot be downloaded: the server says "404 Not Found"`,
		"http://127.0.0.1:1/none": "connection refused",
		"ftp://127.0.0.1/none":    "not the URL of a release",
		"http:///none":            "not the URL of a release",
	} {
		if err := get(t.Context(), from, io.Discard, stall, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", from, err, want)
		}
	}
}

func TestKeys(t *testing.T) {
	der, err := x509.MarshalPKIXPublicKey(signer().Public())
	if err != nil {
		t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	file := filepath.Join(t.TempDir(), "release.pub")
	if keys, err := TrustedKeys(file); err != nil || len(keys) != 0 {
		t.Errorf("without a file: %v, %v", keys, err)
	}
	if err := os.WriteFile(file, append(text, text...), 0o644); err != nil {
		t.Fatal(err)
	}
	if keys, err := TrustedKeys(file); err != nil || len(keys) != 2 || !keys[0].Public.Equal(signer().Public()) {
		t.Errorf("%v, %v", keys, err)
	}
	if err := os.WriteFile(file, []byte("no key"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := TrustedKeys(file); err == nil {
		t.Error("a file without a key was taken")
	}
}

func TestParseName(t *testing.T) {
	for name, want := range map[string]string{
		"kedge-v1.37.2+kedge1-linux-amd64.tar.zst": "v1.37.2+kedge1 amd64", "kedge-v1.38.0-rc.1+kedge2-linux-arm64": "v1.38.0-rc.1+kedge2 arm64",
		"kedge": "", "kedge-1.2-linux-amd64": "", "kedge-v1/..-linux-amd64": "", "kedge-v1.2-windows-amd64": "",
	} {
		i, err := ParseName(name)
		if got := strings.TrimSpace(i.Version + " " + i.Arch); got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// FuzzExtract: whatever the bytes, nothing unsigned comes out as trusted, and nothing panics.
func FuzzExtract(f *testing.F) {
	good := archive(f, files(signer()), nil)
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add([]byte{})
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd})
	dec, err := zstd.NewReader(bytes.NewReader(good))
	if err != nil {
		f.Fatal(err)
	}
	plain, err := io.ReadAll(dec)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(plain)
	want := files(signer())[Binary]
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, binary, err := extract(b, trusted()); err == nil && binary != want {
			t.Errorf("%q was taken", binary)
		}
	})
}

func FuzzParseSums(f *testing.F) {
	f.Add([]byte(files(signer())[Sums]))
	f.Add([]byte(strings.Repeat("0", 64) + " *./x\n"))
	f.Add([]byte(strings.Repeat("0", 64) + "  ../x\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		sums, err := ParseSums(b)
		if err != nil {
			return
		}
		for name := range sums {
			if !safe(name) || !filepath.IsLocal(name) {
				t.Errorf("%q", name)
			}
		}
	})
}

func FuzzParseKeys(f *testing.F) {
	f.Add([]byte("-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA" + base64.StdEncoding.EncodeToString(make([]byte, 32)) + "\n-----END PUBLIC KEY-----\n"))
	f.Add([]byte("-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if keys, err := ParseKeys(b); err == nil && len(keys) == 0 {
			t.Error("neither keys nor an error")
		}
	})
}
