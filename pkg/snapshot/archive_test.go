// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/pkg/datastore"
)

// testArchive makes a snapshot of a database that is none; whether it is one is found out elsewhere.
func testArchive(t testing.TB, change func(*Metadata), keys []byte, compress bool) []byte {
	t.Helper()
	db := bytes.Repeat([]byte("a page of the database\n"), 3000)
	sum := sha256.Sum256(db)
	m := &Metadata{Format: format, Name: "manual-s1-20261128T030000Z", Created: time.Date(2026, 11, 28, 3, 0, 0, 0, time.UTC), Trigger: Manual, Node: "s1", Version: "v1", Cluster: "c1",
		Data: datastore.Copy{Revision: 7, Keys: 3, Size: int64(len(db)), SHA256: hex.EncodeToString(sum[:])}}
	if keys != nil {
		m.Recipients = []string{"age1x"}
	}
	if change != nil {
		change(m)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "x"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := writeArchive(t.Context(), f, m, keys, bytes.NewReader(db), compress); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestArchive(t *testing.T) {
	for _, compress := range []bool{true, false} {
		for _, keys := range [][]byte{nil, []byte("sealed")} {
			b := testArchive(t, nil, keys, compress)
			var db bytes.Buffer
			m, got, err := readArchive(t.Context(), bytes.NewReader(b), &db)
			if err != nil || !bytes.Equal(got, keys) || int64(db.Len()) != m.Data.Size || m.Name != "manual-s1-20261128T030000Z" {
				t.Errorf("compressed %t: %v, keys %q, %d bytes of %d", compress, err, got, db.Len(), m.Data.Size)
			}
			// Any tar can take it apart.
			var names []string
			for r := tar.NewReader(bytes.NewReader(b)); ; {
				h, err := r.Next()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				names = append(names, h.Name)
			}
			want := "metadata.json"
			if keys != nil {
				want += " keys.age"
			}
			want += map[bool]string{true: " db.zst", false: " db"}[compress] + " sums.json"
			if s := strings.Join(names, " "); s != want {
				t.Errorf("entries are %s, want %s", s, want)
			}
		}
	}
}

// TestDamage: no cut and no changed byte goes unnoticed, but for those that mean nothing: they change nothing either.
func TestDamage(t *testing.T) {
	b := testArchive(t, nil, []byte("sealed"), true)
	want, _, err := readArchive(t.Context(), bytes.NewReader(b), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(bytes.TrimRight(b, "\x00")) {
		if _, _, err := readArchive(t.Context(), bytes.NewReader(b[:n]), io.Discard); !errors.Is(err, ErrDamaged) {
			t.Fatalf("cut off at %d of %d: %v", n, len(b), err)
		}
	}
	for i := range len(b) - 2*tarBlock {
		b[i] ^= 1
		m, keys, err := readArchive(t.Context(), bytes.NewReader(b), io.Discard)
		switch {
		case errors.Is(err, ErrDamaged), err != nil && strings.Contains(err.Error(), "newer Kedge"):
		case err != nil || string(keys) != "sealed" || fmt.Sprint(m) != fmt.Sprint(want):
			t.Fatalf("byte %d of %d changed: %v, %+v", i, len(b), err, m)
		}
		b[i] ^= 1
	}
}

func TestRefusedArchives(t *testing.T) {
	sized := func(n int64) func(*Metadata) { return func(m *Metadata) { m.Data.Size = n } }
	for name, c := range map[string]struct {
		change func(*Metadata)
		want   string
	}{
		"a larger database than it says":   {sized(1000), "not 1000"},
		"a smaller one":                    {sized(1 << 20), "not 1048576"},
		"one beyond every disk":            {sized(1 << 50), "a database of"},
		"nothing":                          {sized(0), "a database of"},
		"a path for a name":                {func(m *Metadata) { m.Name = "../../etc/passwd" }, "cannot be the name"},
		"a newer format":                   {func(m *Metadata) { m.Format = 2 }, "newer Kedge"},
		"keys that it says it has":         {func(m *Metadata) { m.Recipients = []string{"age1x"} }, "whether it has keys"},
		"a database of another's digest":   {func(m *Metadata) { m.Data.SHA256 = "00" }, "its digest"},
		"more metadata than anybody needs": {func(m *Metadata) { m.Version = strings.Repeat("x", maxMetadata) }, "metadata.json has"},
	} {
		_, _, err := readArchive(t.Context(), bytes.NewReader(testArchive(t, c.change, nil, true)), io.Discard)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	for _, text := range []string{"", "x", strings.Repeat("x", 5000)} {
		if _, err := readMetadata(strings.NewReader(text)); !errors.Is(err, ErrDamaged) {
			t.Errorf("%.10q: %v", text, err)
		}
	}
}

// FuzzArchive: whatever a file says, reading it ends, with no more memory and no more output than it is allowed.
func FuzzArchive(f *testing.F) {
	f.Add(testArchive(f, nil, nil, true))
	f.Add(testArchive(f, nil, []byte("sealed"), false))
	f.Add(testArchive(f, func(m *Metadata) { m.Data.Size = 1 << 40 }, nil, true))
	f.Add([]byte("no archive"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := readMetadata(bytes.NewReader(b)); err == nil && CheckName(m.Name) != nil {
			t.Errorf("the name %q is accepted", m.Name)
		}
		count := &counter{w: io.Discard}
		m, _, err := readArchive(context.Background(), bytes.NewReader(b), count)
		if err == nil && count.n != m.Data.Size {
			t.Errorf("%d bytes of %d", count.n, m.Data.Size)
		}
	})
}
