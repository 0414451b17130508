// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

const name = "kedge-v1.2.3+kedge1-linux-amd64"

// stage makes a directory as mk/release.mk does, with times and modes of today.
func stage(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	long := "LICENSES/go/" + strings.Repeat("a-long-name/", 10) + "LICENSE"
	for file, mode := range map[string]os.FileMode{"kedge": 0o755, "install.sh": 0o744, "README.md": 0o600, "docs/ha.md": 0o644, long: 0o644} {
		file = filepath.Join(dir, file)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte("this is "+filepath.Base(file)), mode)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestPack(t *testing.T) {
	work := t.TempDir()
	key, pub := filepath.Join(work, "new", "release.key"), filepath.Join(work, "release.pub")
	if err := run([]string{"key", key, pub}); err != nil {
		t.Fatal(err)
	}
	var packed [2][]byte
	for i := range packed {
		dist := filepath.Join(work, string(rune('a'+i)))
		dir := stage(t)
		if err := errors.Join(run([]string{"sign", dir, key}), run([]string{"pack", dir, dist, key, "1700000000"})); err != nil {
			t.Fatal(err)
		}
		for _, file := range []string{name + ".tar.zst", name + ".tar.gz", sums, signature} {
			data, err := os.ReadFile(filepath.Join(dist, file))
			if err != nil {
				t.Fatal(err)
			}
			packed[i] = append(packed[i], data...)
		}
		if left, _ := filepath.Glob(filepath.Join(dist, "*.part")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
	if !bytes.Equal(packed[0], packed[1]) {
		t.Error("the same files give different archives")
	}
	for _, suffix := range []string{".tar.zst", ".tar.gz"} {
		files := unpack(t, filepath.Join(work, "a", name+suffix))
		if got := files[name+"/README.md"]; got != "this is README.md" {
			t.Errorf("%s: README.md is %q", suffix, got)
		}
		list, sig := files[name+"/"+sums], files[name+"/"+signature]
		if n := strings.Count(list, "\n"); n != 5 || strings.Contains(list, sums) {
			t.Errorf("%s: checksums of %d files: %s", suffix, n, list)
		}
		if !ed25519.Verify(publicKey(t, pub), []byte(list), []byte(sig)) {
			t.Errorf("%s: the signature is wrong", suffix)
		}
	}
	dist := filepath.Join(work, "a")
	for _, args := range [][]string{
		{"sha256sum", "--strict", "-c", sums},
		{"openssl", "pkeyutl", "-verify", "-pubin", "-inkey", pub, "-rawin", "-in", sums, "-sigfile", signature},
	} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir = dist
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", args[0], err, out)
		}
	}
}

func publicKey(t *testing.T, file string) ed25519.PublicKey {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(data)
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	// What the Makefile takes for the linker.
	if raw := block.Bytes[len(block.Bytes)-ed25519.PublicKeySize:]; !bytes.Equal(raw, key.(ed25519.PublicKey)) {
		t.Error("the key is not the end of its encoding")
	}
	return key.(ed25519.PublicKey)
}

// unpack gives the contents by name, and complains about what depends on the packing machine.
func unpack(t *testing.T, file string) map[string]string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var r io.Reader
	if strings.HasSuffix(file, ".gz") {
		r, err = gzip.NewReader(f)
	} else {
		r, err = zstd.NewReader(f)
	}
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	var names []string
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		program := h.Typeflag == tar.TypeDir || strings.HasSuffix(h.Name, "/kedge") || strings.HasSuffix(h.Name, ".sh")
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || !h.ModTime.Equal(time.Unix(1700000000, 0)) || (h.Mode == 0o755) != program || (h.Mode == 0o644) == program {
			t.Errorf("%s: %+v", h.Name, h)
		}
		files[h.Name] = string(data)
		names = append(names, h.Name)
	}
	if !slices.IsSortedFunc(names, func(a, b string) int {
		return slices.Compare(strings.Split(strings.TrimSuffix(a, "/"), "/"), strings.Split(strings.TrimSuffix(b, "/"), "/"))
	}) || names[0] != name+"/" {
		t.Errorf("not sorted, or not in one directory: %q", names)
	}
	return files
}

func TestKeyStays(t *testing.T) {
	dir := t.TempDir()
	key, pub := filepath.Join(dir, "key"), filepath.Join(dir, "pub")
	read := func() string {
		if err := makeKey(key, pub); err != nil {
			t.Fatal(err)
		}
		k, err := os.ReadFile(key)
		p, err2 := os.ReadFile(pub)
		if err := errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}
		return string(k) + string(p)
	}
	if first := read(); read() != first {
		t.Error("a second call made another key")
	}
	if info, err := os.Stat(key); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the private key: %v %v", info.Mode(), err)
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	other := filepath.Join(dir, "rsa.pem")
	if out, err := exec.Command("openssl", "genpkey", "-algorithm", "RSA", "-out", other).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.WriteFile(filepath.Join(dir, "text"), []byte("no key"), 0o644); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{other: "ed25519 is wanted", filepath.Join(dir, "text"): "is not PEM", filepath.Join(dir, "none"): "no such file"} {
		if _, err := readKey(file); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q", file, err, want)
		}
	}
	s := stage(t)
	if err := os.Symlink("kedge", filepath.Join(s, "kubectl")); err != nil {
		t.Fatal(err)
	}
	if err := signTree(s, nil); err == nil || !strings.Contains(err.Error(), "neither file nor directory") {
		t.Errorf("a symbolic link: %v", err)
	}
	if err := run(nil); err == nil {
		t.Error("no arguments: no error")
	}
}

// TestLicenses: of this program itself, with one package of Debian's.
func TestLicenses(t *testing.T) {
	if _, err := os.Stat(commonLicenses); err != nil {
		t.Skip("releases are made on Debian: ", err)
	}
	dir, sysroot := filepath.Join(t.TempDir(), "LICENSES"), t.TempDir()
	doc := filepath.Join(sysroot, "usr/share/doc/nftables")
	packages := filepath.Join(sysroot, "packages")
	if err := errors.Join(os.MkdirAll(doc, 0o755), os.WriteFile(filepath.Join(doc, "copyright"), []byte("GPL-2"), 0o644),
		os.WriteFile(packages, []byte("nftables 1.0.6-2 nftables 1.0.6-2\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := run([]string{"licenses", dir, "arm64", sysroot, packages, "."}); err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{"go/std@*/LICENSE", "go/github.com/klauspost/compress@*/LICENSE", "go/github.com/klauspost/compress@*/zstd/internal/xxhash/LICENSE.txt",
		"go/github.com/kedge-io/kedge/LICENSE", "debian/nftables/copyright", "debian/packages", "debian/common-licenses/GPL-2"} {
		if found, err := filepath.Glob(filepath.Join(dir, pattern)); err != nil || len(found) != 1 {
			t.Errorf("%s: %v %v", pattern, found, err)
		}
	}
	if err := os.WriteFile(packages, []byte("unheard-of 1 unheard-of 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := debian(dir, sysroot, packages); err == nil || !strings.Contains(err.Error(), "unheard-of") {
		t.Errorf("a package without a copyright file: %v", err)
	}
	empty := source{name: "m@v1", root: sysroot, dirs: []string{sysroot}}
	if err := empty.collect(dir); err == nil || !strings.Contains(err.Error(), "m@v1 has no licence") {
		t.Errorf("a module without a licence: %v", err)
	}
}
