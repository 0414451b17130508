// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
)

func writeTree(t *testing.T, dir string, files map[string]string, mode fs.FileMode) {
	t.Helper()
	for name, content := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
}

// packed returns the archive and the manifest of a small tree.
func packed(t *testing.T) ([]byte, *Manifest) {
	t.Helper()
	src := t.TempDir()
	writeTree(t, src, map[string]string{"runc": "#!runc", "cni/ptp": "#!ptp"}, 0o700)
	writeTree(t, src, map[string]string{"lib/libc.so.6": "libc", "empty": ""}, 0o600)
	if err := os.Symlink("libc.so.6", filepath.Join(src, "lib/libc.so")); err != nil {
		t.Fatal(err)
	}
	data, text, err := Pack(src)
	if err != nil {
		t.Fatal(err)
	}
	m, err := ParseManifest(text)
	if err != nil {
		t.Fatal(err)
	}
	return data, m
}

func openRoot(t *testing.T, dir string) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}

func TestPackUnpack(t *testing.T) {
	data, m := packed(t)
	again, same := packed(t)
	if !bytes.Equal(data, again) || m.ID() != same.ID() {
		t.Error("packing the same files again gives another archive")
	}
	dir := t.TempDir()
	if err := Unpack(t.Context(), bytes.NewReader(data), m, openRoot(t, dir), nil); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, f := range m.Files {
		if err := f.Check(dir, true); err != nil {
			t.Error(err)
		}
		st, err := os.Lstat(filepath.Join(dir, f.Name))
		if err != nil {
			t.Fatal(err)
		}
		got[f.Name] = st.Mode().String()
	}
	want := map[string]string{"runc": "-rwxr-xr-x", "cni/ptp": "-rwxr-xr-x", "lib/libc.so.6": "-rw-r--r--", "empty": "-rw-r--r--",
		"lib/libc.so": "Lrwxrwxrwx"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("unpacked files (-want +got):\n%s", diff)
	}
}

func TestUnpackSome(t *testing.T) {
	data, m := packed(t)
	dir := t.TempDir()
	only := func(name string) bool { return name == "cni/ptp" }
	if err := Unpack(t.Context(), bytes.NewReader(data), m, openRoot(t, dir), only); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "cni/ptp")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "runc")); err == nil {
		t.Error("a file was written that nobody wanted")
	}
}

func TestIDFollowsContent(t *testing.T) {
	_, m := packed(t)
	id := m.ID()
	for name, change := range map[string]func(f *File){
		"content": func(f *File) { f.SHA256 = strings.Repeat("0", 64) },
		"name":    func(f *File) { f.Name += "x" },
		"mode":    func(f *File) { f.Mode ^= 0o111 },
	} {
		other := Manifest{Files: append([]File(nil), m.Files...)}
		change(&other.Files[0])
		if other.ID() == id {
			t.Errorf("the ID does not depend on the %s", name)
		}
	}
}

// tarOf compresses a tar of single headers, each with Size bytes of "x".
func tarOf(t *testing.T, headers ...tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	enc, err := zstd.NewWriter(&buf)
	if err != nil {
		t.Fatal(err)
	}
	tw := tar.NewWriter(enc)
	for _, h := range headers {
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(bytes.Repeat([]byte("x"), int(h.Size))); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	if err := enc.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestUnpackRefuses(t *testing.T) {
	reg := func(name string, size int64) tar.Header {
		return tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644}
	}
	link := func(name, to string) tar.Header {
		return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
	}
	tests := map[string]struct {
		manifest []File
		archive  []tar.Header
	}{
		"parent directory":          {[]File{{Name: "../evil", Mode: 0o644, Size: 1}}, []tar.Header{reg("../evil", 1)}},
		"parent directory inside":   {[]File{{Name: "a/../../evil", Mode: 0o644, Size: 1}}, []tar.Header{reg("a/../../evil", 1)}},
		"absolute name":             {[]File{{Name: "/evil", Mode: 0o644, Size: 1}}, []tar.Header{reg("/evil", 1)}},
		"link upwards":              {[]File{{Name: "l", Link: "../.."}}, []tar.Header{link("l", "../..")}},
		"link to an absolute name":  {[]File{{Name: "l", Link: "/etc"}}, []tar.Header{link("l", "/etc")}},
		"setuid":                    {[]File{{Name: "su", Mode: 0o755 | fs.ModeSetuid, Size: 1}}, []tar.Header{reg("su", 1)}},
		"not in the manifest":       {nil, []tar.Header{reg("extra", 1)}},
		"in the archive twice":      {[]File{{Name: "a", Mode: 0o644, Size: 1}}, []tar.Header{reg("a", 1), reg("a", 1)}},
		"not in the archive":        {[]File{{Name: "a", Mode: 0o644, Size: 1}}, nil},
		"another size":              {[]File{{Name: "a", Mode: 0o644, Size: 2}}, []tar.Header{reg("a", 1)}},
		"link instead of a file":    {[]File{{Name: "a", Mode: 0o644}}, []tar.Header{link("a", "b")}},
		"device instead of a file":  {[]File{{Name: "a", Mode: 0o644}}, []tar.Header{{Typeflag: tar.TypeChar, Name: "a"}}},
		"through a link":            {[]File{{Name: "l", Link: "f"}, {Name: "l/f", Mode: 0o644, Size: 1}}, []tar.Header{link("l", "f"), reg("l/f", 1)}},
		"directory under a file":    {[]File{{Name: "f", Mode: 0o644}, {Name: "f/g", Mode: 0o644}}, []tar.Header{reg("f", 0), reg("f/g", 0)}},
		"hard link instead of file": {[]File{{Name: "a", Mode: 0o644}}, []tar.Header{{Typeflag: tar.TypeLink, Name: "a", Linkname: "/etc/passwd"}}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			outer := t.TempDir()
			dir := filepath.Join(outer, "a", "b")
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			err := Unpack(t.Context(), bytes.NewReader(tarOf(t, tt.archive...)), &Manifest{Files: tt.manifest}, openRoot(t, dir), nil)
			if err == nil {
				t.Error("the archive was accepted")
			}
			for _, p := range []string{filepath.Join(outer, "evil"), filepath.Join(outer, "a", "evil")} {
				if _, err := os.Lstat(p); err == nil {
					t.Errorf("%s was written outside of the directory", p)
				}
			}
		})
	}
}

func TestUnpackTruncated(t *testing.T) {
	data, m := packed(t)
	for _, n := range []int{0, 1, len(data) / 2, len(data) - 1} {
		if err := Unpack(t.Context(), bytes.NewReader(data[:n]), m, openRoot(t, t.TempDir()), nil); err == nil {
			t.Errorf("an archive cut after %d of %d bytes was accepted", n, len(data))
		}
	}
}

func TestUnpackDamaged(t *testing.T) {
	data, m := packed(t)
	data[len(data)-1] ^= 1 // of the checksum
	if err := Unpack(t.Context(), bytes.NewReader(data), m, openRoot(t, t.TempDir()), nil); err == nil {
		t.Error("an archive with a wrong checksum was accepted")
	}
}

func TestUnpackCancelled(t *testing.T) {
	data, m := packed(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Unpack(ctx, bytes.NewReader(data), m, openRoot(t, t.TempDir()), nil); err == nil {
		t.Error("no error although the context had ended")
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(`{"files":[{"name":"lib/libc.so.6","mode":420,"size":1,"sha256":"00"},{"name":"lib/l","link":"libc.so.6"}]}`))
	f.Add([]byte(`{"files":[{"name":"../x"}]}`))
	f.Add([]byte(`{"files":[{"name":"x","link":"/etc/passwd"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := ParseManifest(data)
		if err != nil {
			return
		}
		for _, file := range m.Files {
			if !filepath.IsLocal(file.Name) || (file.Link != "" && !filepath.IsLocal(file.Link)) || file.Mode&^0o777 != 0 {
				t.Errorf("accepted %+v", file)
			}
		}
		if _, err := json.Marshal(m); err != nil {
			t.Error(err)
		}
	})
}
