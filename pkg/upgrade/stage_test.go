// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"archive/tar"
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/pkg/release"
)

// The test program is the one that is staged: it says a version.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "version" {
		fmt.Println("kedge v1.37.2+kedge2 0123")
		return
	}
	os.Exit(m.Run())
}

func signedTar(t *testing.T, name string, program []byte) ([]byte, []release.Key) {
	t.Helper()
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	sums := fmt.Appendf(nil, "%x  kedge\n", sha256.Sum256(program))
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for file, data := range map[string][]byte{release.Binary: program, release.Sums: sums, release.Signature: ed25519.Sign(key, sums)} {
		if err := w.WriteHeader(&tar.Header{Name: name + "/" + file, Mode: 0o755, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), []release.Key{{Public: key.Public().(ed25519.PublicKey), Source: "the test"}}
}

func TestStage(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	refused := errors.New("refused")
	for name, c := range map[string]struct {
		top     string
		program []byte
		accept  error
		trusted bool
		want    string // part of the error
	}{
		"good":             {"kedge-v1.37.2+kedge2-linux-" + Arch, program, nil, true, ""},
		"renamed":          {"kedge-v1.37.9+kedge1-linux-" + Arch, program, nil, true, "has been renamed"},
		"another machine":  {"kedge-v1.37.2+kedge2-linux-riscv64", program, nil, true, "this machine is " + Arch},
		"refused":          {"kedge-v1.37.2+kedge2-linux-" + Arch, program, refused, true, "refused"},
		"not trusted":      {"kedge-v1.37.2+kedge2-linux-" + Arch, program, nil, false, "not trusted"},
		"no program":       {"kedge-v1.37.2+kedge2-linux-" + Arch, []byte("#!/bin/sh\necho kedge v1.37.2+kedge2\n"), nil, true, "not a program for Linux"},
		"does not run":     {"kedge-v1.37.2+kedge2-linux-" + Arch, program[:4096], nil, true, ""},
		"cut off in bytes": {"kedge-v1.37.2+kedge2-linux-" + Arch, append(bytes.Clone(program[:64]), make([]byte, 4096)...), nil, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			g := Staging{Store: In(dir), DataDir: dir, Program: filepath.Join(dir, "kedge")}
			if err := os.WriteFile(g.Program, []byte("old"), 0o755); err != nil {
				t.Fatal(err)
			}
			archive, keys := signedTar(t, c.top, c.program)
			if g.Keys = keys; !c.trusted {
				g.Keys[0].Public = bytes.Repeat([]byte{1}, 32)
			}
			rel, err := g.Stage(t.Context(), bytes.NewReader(archive), func(release.Info) error { return c.accept })
			_, statErr := os.Stat(g.Program + nextSuffix)
			if name == "good" {
				if err != nil || rel.Version != "v1.37.2+kedge2" || statErr != nil {
					t.Errorf("%+v, %v, %v", rel, err, statErr)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if statErr == nil {
				t.Error("something is left")
			}
		})
	}
}

// While an upgrade is under way there is no other one, and the way back needs something to go to.
func TestRefusals(t *testing.T) {
	b := newBench(t)
	g := Staging{Store: b.store, DataDir: filepath.Dir(b.prog), Program: b.prog}
	if _, err := g.Back(t.Context()); err == nil || !strings.Contains(err.Error(), "no way back") {
		t.Error(err)
	}
	if err := g.Check(1 << 60); err == nil || !strings.Contains(err.Error(), "MiB free") {
		t.Error(err)
	}
	b.begin()
	if err := g.Check(0); !errors.Is(err, ErrUnderWay) {
		t.Error(err)
	}
}
