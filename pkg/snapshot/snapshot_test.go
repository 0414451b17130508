// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/keyring"
)

// memoryRing is a keyring that another server may write to in between.
type memoryRing struct {
	data     []byte
	revision int64
	between  func()
}

func (r *memoryRing) Get(context.Context, string) ([]byte, int64, error) {
	return r.data, r.revision, nil
}
func (r *memoryRing) Put(_ context.Context, _ string, data []byte, revision int64) error {
	if f := r.between; f != nil {
		r.between = nil
		f()
	}
	if revision != r.revision {
		return keyring.ErrConflict
	}
	r.data, r.revision = data, revision+1
	return nil
}

// TestOneRecoveryKey: of two servers that make a recovery key at the same moment, one wins, and both use it.
func TestOneRecoveryKey(t *testing.T) {
	r := &memoryRing{}
	nothing := func(*RecoveryKey) (bool, error) { return false, nil }
	var other *RecoveryKey
	r.between = func() {
		var err error
		if other, err = changeKey(t.Context(), r, nothing); err != nil {
			t.Error(err)
		}
	}
	k, err := changeKey(t.Context(), r, nothing)
	if err != nil || k.Identity != other.Identity || r.revision != 1 {
		t.Errorf("%v; %v and %v at revision %d", err, k, other, r.revision)
	}
}

func TestKeys(t *testing.T) {
	own, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	other, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"server-ca.key": []byte("secret"), "encryption.yaml": []byte("more")}
	m := &Metadata{Name: "x", Keys: digests(files), Recipients: []string{own.Recipient().String(), other.Recipient().String()}}
	sealed, err := sealKeys(files, m.Recipients)
	if err != nil {
		t.Fatal(err)
	}
	k := &RecoveryKey{Identity: own.String()}
	text, err := k.Text("abc")
	if err != nil {
		t.Fatal(err)
	}
	for _, identity := range []string{text, other.String(), "\n" + own.String() + "\n"} {
		if got, err := openKeys(m, sealed, identity); err != nil || string(got["server-ca.key"]) != "secret" || len(got) != 2 {
			t.Errorf("%v, %v", got, err)
		}
	}
	stranger, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	for identity, want := range map[string]string{"": "what was given is none", "hello": "what was given is none", stranger.String(): "the key given is another one"} {
		if _, err := openKeys(m, sealed, identity); !errors.Is(err, ErrRecoveryKey) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", identity, err)
		}
	}
	if _, err := openKeys(m, append(slices.Clone(sealed[:len(sealed)-1]), 0), text); !errors.Is(err, ErrDamaged) {
		t.Errorf("changed: %v", err)
	}
	for _, name := range []string{"../x.key", "/etc/shadow", "a/b.key", "", "x"} {
		evil := map[string][]byte{name: []byte("x")}
		sealed, err := sealKeys(evil, m.Recipients)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := openKeys(&Metadata{Keys: digests(evil)}, sealed, text); !errors.Is(err, ErrDamaged) {
			t.Errorf("a key called %q: %v", name, err)
		}
	}
}

// put writes a snapshot into a directory.
func put(t *testing.T, dir Directory, name string, change func(*Metadata)) {
	t.Helper()
	b := testArchive(t, func(m *Metadata) {
		m.Name, m.Trigger = name, Scheduled
		if change != nil {
			change(m)
		}
	}, nil, true)
	if err := os.WriteFile(dir.Path(name), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestPrune(t *testing.T) {
	dir := Directory(t.TempDir())
	at := func(hour int) func(*Metadata) {
		return func(m *Metadata) { m.Created = time.Date(2026, 1, 1, hour, 0, 0, 0, time.UTC) }
	}
	for hour := range 8 {
		node := "s1"
		if hour < 4 {
			node = "old-name" // the node has been renamed since, and the CAs rotated
		}
		put(t, dir, fmt.Sprintf("scheduled-%s-%d", node, hour), func(m *Metadata) {
			at(hour)(m)
			if hour < 4 {
				m.Cluster, m.Keys = "c0", map[string]string{keyringFile: "r1"}
			}
		})
	}
	put(t, dir, "before-the-change", func(m *Metadata) { at(0)(m); m.Trigger = Manual })
	put(t, dir, "scheduled-elsewhere", func(m *Metadata) { at(0)(m); m.Cluster = "c2" })
	// The newest two are of no use: cut off, and without a beginning.
	newest := dir.Path("scheduled-s1-7")
	if b, err := os.ReadFile(newest); err != nil || os.WriteFile(newest, b[:len(b)-3000], 0o600) != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir.Path("scheduled-s1-6"), []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Old ones that cannot be read: of this cluster by the name; of a server that it does not know; of two clusters' servers of one name.
	put(t, dir, "scheduled-twin-9", func(m *Metadata) { at(9)(m); m.Cluster = "c2" })
	put(t, dir, "scheduled-twin-3", at(3))
	for _, name := range []string{"scheduled-s1-0", "scheduled-s2-0", "scheduled-twin-0"} {
		err := os.WriteFile(dir.Path(name), []byte("nothing"), 0o600)
		if err = errors.Join(err, os.Chtimes(dir.Path(name), time.Time{}, time.Date(2026, 1, 1, 0, 30, 0, 0, time.UTC))); err != nil {
			t.Fatal(err)
		}
	}
	dry, err := Prune(t.Context(), dir, Identity{Ring: "r1", CA: "c1"}, 3, true)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Prune(t.Context(), dir, Identity{Ring: "r1", CA: "c1"}, 3, false)
	if err != nil {
		t.Fatal(err)
	}
	names := func(list []Entry) string {
		var n []string
		for _, e := range list {
			n = append(n, e.Name)
		}
		slices.Sort(n)
		return strings.Join(n, " ")
	}
	if got, want := names(p.Removed), "scheduled-old-name-0 scheduled-old-name-1 scheduled-old-name-2 scheduled-s1-0 scheduled-twin-3"; got != want || names(dry.Removed) != want {
		t.Errorf("removed %s, dry %s, want %s", got, names(dry.Removed), want)
	}
	if got, want := names(p.Broken), "scheduled-s1-6 scheduled-s1-7"; got != want {
		t.Errorf("broken are %s, want %s", got, want)
	}
	left, err := dir.List(t.Context())
	if want := "before-the-change scheduled-elsewhere scheduled-old-name-3 scheduled-s1-4 scheduled-s1-5 scheduled-s1-6 scheduled-s1-7 scheduled-s2-0 scheduled-twin-0 scheduled-twin-9"; err != nil || names(left) != want {
		t.Errorf("left are %s, %v, want %s", names(left), err, want)
	}
}

func TestDue(t *testing.T) {
	day := time.Date(2026, 1, 10, 0, 0, 0, 0, time.Local)
	at := func(hour, minute int) time.Time {
		return day.Add(time.Duration(hour)*time.Hour + time.Duration(minute)*time.Minute)
	}
	for _, c := range []struct {
		what, schedule   string
		last, start, now time.Time
		want             time.Time
	}{
		{"none yet", "12h", time.Time{}, at(10, 0), at(10, 0), at(10, 10)},
		{"the last one was four hours ago", "12h", at(6, 0), at(10, 0), at(10, 0), at(18, 0)},
		{"overdue at the start", "12h", at(-30, 0), at(10, 0), at(10, 0), at(10, 10)},
		{"one just taken", "12h", at(10, 20), at(10, 0), at(10, 20), at(22, 20)},
		{"from the future", "12h", at(90, 0), at(10, 0), at(10, 0), at(10, 10)},
		{"at half past three", "30 3 * * *", at(3, 30), at(10, 0), at(10, 0), at(27, 30)},
		{"missed at half past three", "30 3 * * *", at(-20, 30), at(10, 0), at(10, 0), at(10, 10)},
		{"and soon again", "5 10 * * *", at(-24, 0), at(10, 0), at(10, 0), at(10, 5)},
	} {
		s := Settings{Node: "", Snapshots: config.Snapshot{Schedule: config.Schedule(c.schedule)}}
		got, ok := dueAfter(s, c.last, c.start, c.now)
		if slack := got.Sub(c.want); !ok || slack < 0 || slack > maxStagger {
			t.Errorf("%s: %s (%t), want %s", c.what, got, ok, c.want)
		}
	}
	if _, ok := dueAfter(Settings{Snapshots: config.Snapshot{Schedule: config.ScheduleOff}}, time.Time{}, day, day); ok {
		t.Error("something is due although it is off")
	}
}

// TestResume: wherever the exchange was interrupted, it ends in the same way.
func TestResume(t *testing.T) {
	write := func(path, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	move := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	steps := []string{"nothing done", "data aside", "note aside", "data in place", "keys aside", "keys in place", "all but the journal"}
	for n, step := range steps {
		for _, former := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, former data %t", step, former), func(t *testing.T) {
				dir := t.TempDir()
				j := &journal{Snapshot: "x", Stamp: "19700101T000000Z", Phase: phaseSwap, EtcdDir: filepath.Join(dir, "etcd"), PKIDir: filepath.Join(dir, "pki"), Membership: json.RawMessage(`{}`),
					Pending: Pending{Revision: 7}}
				write(filepath.Join(j.newData(), "x"), "new")
				write(filepath.Join(j.newKeys(), "x"), "new")
				if former {
					write(filepath.Join(j.EtcdDir, "x"), "old")
					write(filepath.Join(j.PKIDir, "x"), "old")
					write(j.EtcdDir+".member.json", "old")
					write(j.EtcdDir+".removed.json", "old")
				}
				if err := j.write(dir); err != nil {
					t.Fatal(err)
				}
				if n >= 1 && former {
					move(j.EtcdDir, j.formerData())
				}
				if n >= 2 && former {
					move(j.EtcdDir+".member.json", filepath.Join(j.formerData(), "member.json"))
				}
				if n >= 3 {
					if former {
						if err := os.Remove(j.EtcdDir + ".removed.json"); err != nil {
							t.Fatal(err)
						}
					}
					move(j.newData(), j.EtcdDir)
				}
				if n >= 4 && former {
					move(j.PKIDir, j.formerKeys())
				}
				if n >= 5 {
					move(j.newKeys(), j.PKIDir)
				}
				if n >= 6 {
					write(filepath.Join(dir, "cluster.json"), "{}\n")
				}
				if !Interrupted(Settings{DataDir: dir, EtcdDir: j.EtcdDir, PKIDir: j.PKIDir}) {
					t.Error("it is not seen that there is something to do")
				}
				if name, err := Resume(dir); name != "x" || err != nil {
					t.Fatal(name, err)
				}
				// The first start has its part of it.
				if pending, err := Unfinished(dir); err != nil || pending == nil || pending.Revision != 7 {
					t.Errorf("%+v is left to do, %v", pending, err)
				}
				if name, err := Resume(dir); name != "" || err != nil {
					t.Errorf("again: %s, %v", name, err)
				}
				if err := Finish(dir); err != nil {
					t.Error(err)
				}
				want := map[string]string{"etcd/x": "new", "pki/x": "new", "cluster.json": "{}\n"}
				if former {
					want["etcd.stale-19700101T000000Z/x"], want["etcd.stale-19700101T000000Z/member.json"], want["pki.stale-19700101T000000Z/x"] = "old", "old", "old"
				}
				got := map[string]string{}
				err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
					if err != nil || d.IsDir() {
						return err
					}
					b, err := os.ReadFile(path)
					got[strings.TrimPrefix(path, dir+"/")] = string(b)
					return err
				})
				if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("%v\ngot  %v\nwant %v", err, got, want)
				}
				if name, err := Resume(dir); name != "" || err != nil {
					t.Errorf("again: %s, %v", name, err)
				}
			})
		}
	}
}

// TestTidy: what was left before the point of no return goes, and nothing else.
func TestTidy(t *testing.T) {
	dir := t.TempDir()
	s := Settings{DataDir: dir, EtcdDir: filepath.Join(dir, "etcd"), PKIDir: filepath.Join(dir, "pki")}
	for _, name := range []string{"etcd/x", "etcd.restore/x", "etcd.restore.tmp/x", "pki/x", "pki.restore/x", "pki.restore.tmp/x", "etcd.restore.db.tmp", "etcd.stale-1/x"} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if name, err := Resume(dir); name != "" || err != nil {
		t.Error(name, err)
	}
	if err := Tidy(s); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(left) != 3 || Interrupted(s) {
		t.Errorf("left are %v, %v", left, err)
	}
}

func TestNames(t *testing.T) {
	for _, name := range []string{"a", "manual-s1.example-20260101T000000Z", "before_1.2"} {
		if err := CheckName(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", ".", "..", "a/b", "-x", ".x", "x.", "a b", strings.Repeat("x", 201), "ä"} {
		if CheckName(name) == nil {
			t.Errorf("%q is accepted", name)
		}
	}
	c := config.S3{}
	for _, location := range []string{"s3://", "s3://b", "s3://b/x", "s3://b/../x.kedge/", "s3:///x.kedge", "s3://b/.kedge"} {
		if _, _, err := bucketFor(c, location); err == nil || !strings.Contains(err.Error(), "form s3://") {
			t.Errorf("%s: %v", location, err)
		}
	}
}
