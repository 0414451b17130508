// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// TestSnapshot: a copy of a running member becomes the only member of a new cluster; what came after the copy is gone, revisions go on, and
// clients that knew the former cluster begin again.
func TestSnapshot(t *testing.T) {
	c := newCluster(t)
	m1, m2, m3 := c.three()
	c.put(m2, "a", 50)
	client, err := NewClient([]string{Endpoint(m2.cfg.Socket)}, TLSFiles{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.Put(t.Context(), "leader", "s2"); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(c.dir, "copy.db")
	copied, err := Fetch(t.Context(), client, path)
	if err != nil || len(copied.Members) != 3 || copied.Keys < 50 || copied.ClusterID == "" {
		t.Fatalf("%+v, %v", copied, err)
	}
	again, err := Examine(t.Context(), path)
	if err != nil || again.Hash != copied.Hash || again.SHA256 != copied.SHA256 {
		t.Errorf("%+v, %v", again, err)
	}
	c.put(m2, "b", 50)
	last, err := client.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	former, err := ReadMember(m1.cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	m1.stop()

	cfg := m1.cfg
	work := cfg.Dir + ".restore"
	if err := Restore(t.Context(), path, work, cfg.Name, cfg.peerURL(), c.log); err != nil {
		t.Fatal(err)
	}
	expect(t, Restore(t.Context(), path, work, cfg.Name, cfg.peerURL(), c.log), nil, "exists already")
	if err := Replace(cfg.Dir, work, cfg.Dir+".stale-x"); err != nil {
		t.Fatal(err)
	}
	if err := Replace(cfg.Dir, work, cfg.Dir+".stale-x"); err != nil || !HasMember(cfg.Dir+".stale-x") {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(cfg.Dir+".stale-x", "member.json")); err != nil {
		t.Error(err)
	}
	// The others go on as the former cluster: they must not take the restored one for one of theirs, nor it them.
	m1 = c.start(cfg).ready()
	now, err := ReadMember(cfg.Dir)
	if err != nil || now.ClusterID == former.ClusterID || now.ID == former.ID {
		t.Errorf("it was %+v and is %+v, %v", former, now, err)
	}
	if a, b := c.count(m1, "a"), c.count(m1, "b"); a != 50 || b != 0 {
		t.Errorf("%d of 50 keys from before, %d of those after", a, b)
	}
	restored, err := NewClient([]string{Endpoint(cfg.Socket)}, TLSFiles{})
	if err != nil {
		t.Fatal(err)
	}
	defer restored.Close()
	got, err := restored.Get(t.Context(), "x")
	if err != nil || got.Header.Revision <= last.Header.Revision {
		t.Errorf("revision %d after %d, %v", got.Header.Revision, last.Header.Revision, err)
	}
	for _, want := range []bool{true, false} { // what was in the copy, and what was written since
		if deleted, err := DeleteUpTo(t.Context(), restored, "leader", copied.Revision); err != nil || deleted != want {
			t.Errorf("deleted: %t, %v; want %t", deleted, err, want)
		}
		if _, err := restored.Put(t.Context(), "leader", "s1"); err != nil {
			t.Fatal(err)
		}
	}
	for _, rev := range []int64{copied.Revision, last.Header.Revision} {
		select {
		case w := <-restored.Watch(t.Context(), "a", clientv3.WithPrefix(), clientv3.WithRev(rev)):
			if !errors.Is(w.Err(), rpctypes.ErrCompacted) {
				t.Errorf("a watch from revision %d: %v, %d events", rev, w.Err(), len(w.Events))
			}
		case <-time.After(10 * time.Second):
			t.Errorf("a watch from revision %d waits", rev)
		}
	}
	m2.stop()
	m3.stop()
	// Both are a majority of the former cluster. They are started at the same moment, and neither takes part in it.
	m2, m3 = c.start(m2.cfg), c.start(m3.cfg)
	for _, m := range []*proc{m2, m3} {
		expect(t, m.ended(), ErrRemoved, "form cluster "+now.ClusterID+" now")
	}
	if n := len(c.list(c.members(m1))); n != 1 {
		t.Errorf("%d members", n)
	}
}

// TestDamagedCopy: what is not as etcd wrote it is refused before it is opened.
func TestDamagedCopy(t *testing.T) {
	c := newCluster(t)
	cfg := c.config("m1")
	cfg.Bootstrap = true
	m := c.start(cfg).ready()
	c.put(m, "a", 5)
	client, err := NewClient([]string{Endpoint(cfg.Socket)}, TLSFiles{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	path := filepath.Join(c.dir, "copy.db")
	if _, err := Fetch(t.Context(), client, path); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{
		"digest is missing": good[:len(good)-32], "is damaged": append(append([]byte{}, good[:9000]...), append([]byte{good[9000] ^ 1}, good[9001:]...)...), "it was cut off": good[:len(good)/2+7],
	} {
		file := filepath.Join(c.dir, "bad.db")
		if err := os.WriteFile(file, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Examine(t.Context(), file); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("want %q: %v", name, err)
		}
	}
}
