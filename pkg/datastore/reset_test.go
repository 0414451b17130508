// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/etcd/client/pkg/v3/types"

	"github.com/kedge-io/kedge/pkg/supervise"
)

// TestReset: two of three servers are lost; the third becomes a cluster of one with all its data, and the others join it.
func TestReset(t *testing.T) {
	c := newCluster(t)
	m1, m2, m3 := c.three()
	c.put(m2, "a", 50)
	c.put(m2, "leader", 2)
	ids := []string{id(t, m1), id(t, m2), id(t, m3)}
	expect(t, Reset(t.Context(), m2.cfg, ResetOptions{}, c.log), nil, "etcd is running")
	m1.stop()
	expect(t, Reset(t.Context(), m1.cfg, ResetOptions{}, c.log), ErrAlive, "m2 ("+m2.cfg.peerURL(), "m3 (")
	m2.stop()
	m3.stop()

	// An interrupted one is repeated; what it may have left is kept when it may be the data.
	if err := errors.Join(os.MkdirAll(m1.cfg.Dir+".reset.tmp/member", 0o700), os.MkdirAll(m1.cfg.Dir+".reset/member", 0o700)); err != nil {
		t.Fatal(err)
	}
	m1.cfg.PeerAddress = freePort(t) // the server has moved as well
	if err := Reset(t.Context(), m1.cfg, ResetOptions{Delete: []string{"leader1", "none"}}, c.log); err != nil {
		t.Fatal(err)
	}
	var kept int
	for _, dir := range entries(t, filepath.Dir(m1.cfg.Dir)) {
		switch {
		case strings.HasPrefix(dir, "etcd.before-reset-"):
			kept++
		case dir != "etcd" && dir != "etcd.member.json" && dir != "etcd.disk.json":
			t.Errorf("it leaves %s", dir)
		}
	}
	if kept != 2 {
		t.Errorf("%d copies are kept, want the former data and what the interruption left", kept)
	}
	m1 = c.start(m1.cfg).ready()
	m := c.members(m1)
	if got := c.list(m); len(got) != 1 || got["m1"] != "voter "+m1.cfg.peerURL() || id(t, m1) != ids[0] {
		t.Errorf("members are %v", got)
	}
	if n := c.count(m1, "a"); n != 50 {
		t.Errorf("%d of 50 keys", n)
	}
	if n := c.count(m1, "leader"); n != 1 {
		t.Errorf("%d entries, of two that were there and one that was to be deleted", n)
	}

	// m2 and m3 were not there. m1 has moved, so they cannot find it, but whoever starts them can ask it.
	now, err := membersFromPeers(t.Context(), []string{m1.cfg.peerURL(), m2.cfg.peerURL()}, c.files)
	if err != nil || len(now) != 1 || now[0].ID != ids[0] {
		t.Fatalf("the peers say %+v, %v", now, err)
	}
	if err := Reset(t.Context(), m2.cfg, ResetOptions{}, c.log); err != nil { // at the old address of m1 there is nobody
		t.Fatal(err)
	}
	for _, old := range []*proc{m2, m3} {
		if moved, err := MoveAside(old.cfg.Dir); err != nil || !HasMember(moved) {
			t.Fatal(moved, err)
		}
		fresh := c.join(m, old.cfg)
		if n := c.count(fresh, "a"); n != 50 {
			t.Errorf("%s has %d of 50 keys", old.cfg.Name, n)
		}
	}
}

// TestResetTellsTheOthers: servers that come back after a reset learn from the one that was reset that they are out.
func TestResetTellsTheOthers(t *testing.T) {
	c := newCluster(t)
	m1, m2, m3 := c.three()
	c.put(m1, "a", 5)
	first := id(t, m1)
	m1.stop()
	// m1 was the leader: it has handed that over before it ended.
	if s, err := c.client(m2).Status(t.Context(), Endpoint(m2.cfg.Socket)); err != nil || s.Leader == 0 || types.ID(s.Leader).String() == first {
		t.Errorf("leader is %x, %v", s.Leader, err)
	}
	if err := Reset(t.Context(), m1.cfg, ResetOptions{Force: true, InPlace: true}, c.log); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(resetMark(m1.cfg.Dir)); err == nil {
		t.Error("the mark is left")
	}
	m1 = c.start(m1.cfg).ready()
	for _, old := range []*proc{m2, m3} { // they run all the time
		expect(t, old.ended(), ErrRemoved)
		checkRemoved(t, old)
	}
	if n := c.count(m1, "a"); n != 5 {
		t.Errorf("%d of 5 keys", n)
	}
}

// TestResetRefuses: what a reset cannot be made from.
func TestResetRefuses(t *testing.T) {
	c := newCluster(t)
	cfg := c.config("m1")
	expect(t, Reset(t.Context(), cfg, ResetOptions{}, c.log), ErrNoData, cfg.Dir)
	cfg.Bootstrap = true
	m1 := c.start(cfg).ready()
	elsewhere := cfg
	elsewhere.Args = []string{"--wal-dir=" + t.TempDir()}
	if err := Reset(t.Context(), elsewhere, ResetOptions{}, c.log); err == nil || !strings.Contains(err.Error(), "write-ahead log") {
		t.Errorf("got %v", err)
	}
	// A learner has no vote to give.
	cfg2 := c.config("m2")
	_, all, err := c.members(m1).Add(t.Context(), "m2", cfg2.peerURL())
	if err != nil {
		t.Fatal(err)
	}
	cfg2.InitialCluster = all
	m2 := c.start(cfg2).learner()
	m1.stop()
	m2.stop()
	if err := Reset(t.Context(), cfg2, ResetOptions{}, c.log); err == nil || !strings.Contains(err.Error(), "has no vote") {
		t.Errorf("got %v", err)
	}
	// An unfinished reset in place is not started as if nothing were.
	if err := writeFile(resetMark(cfg.Dir), 1); err != nil {
		t.Fatal(err)
	}
	if err := c.start(cfg).ended(); err == nil || !strings.Contains(err.Error(), "--cluster-reset") {
		t.Errorf("got %v", err)
	}
	if err := Reset(t.Context(), cfg, ResetOptions{}, c.log); err != nil {
		t.Fatal(err)
	}
	c.start(cfg).ready()
}

// TestNeverBootstraps: a server that joins does not make a cluster of its own, and a lost disk does not become an empty one.
func TestNeverBootstraps(t *testing.T) {
	c := newCluster(t)
	cfg := c.config("m1")
	expect(t, c.start(cfg).ended(), ErrNoData, "added to the cluster")
	cfg.InitialCluster = []Member{{Name: "m0", ID: "1", PeerURLs: []string{PeerURL(freePort(t))}}, {ID: "2", PeerURLs: []string{cfg.peerURL()}}}
	p := c.start(cfg)
	p.wait("waiting for the others", func(s supervise.State, r string) bool {
		return s == supervise.Running && strings.Contains(r, "joining as learner: no member with a leader answers: "+cfg.InitialCluster[0].PeerURLs[0])
	})
	p.stop()
	if p.err != nil || HasMember(cfg.Dir) {
		t.Errorf("got %v, data: %v", p.err, HasMember(cfg.Dir))
	}
	cfg.Bootstrap = true
	if err := c.start(cfg).ended(); err == nil {
		t.Error("it both starts a cluster and joins one")
	}
	cfg.InitialCluster = nil
	c.start(cfg).ready().stop()
	if err := os.RemoveAll(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	expect(t, c.start(cfg).ended(), ErrNoData, "there was a member", MemberFile(cfg.Dir))
	if moved, err := MoveAside(cfg.Dir); err != nil || moved != "" {
		t.Errorf("moved to %q: %v", moved, err)
	}
	c.start(cfg).ready()
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

func TestMoveAsideKeepsAll(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etcd")
	for range 3 {
		if err := os.MkdirAll(walDir(dir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(writeFile(MemberFile(dir), Identity{ID: "1", ClusterID: "2"}), writeFile(RemovedFile(dir), Removal{ID: "1"})); err != nil {
			t.Fatal(err)
		}
		moved, err := MoveAside(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(moved, "member.json")); err != nil {
			t.Error(err)
		}
	}
	if names := entries(t, filepath.Dir(dir)); len(names) != 3 {
		t.Errorf("left are %v", names)
	}
}

func TestNoSpace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etcd")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "huge"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 43); err != nil {
		t.Fatal(err)
	}
	expect(t, copyData(t.Context(), dir, dir+".reset.tmp"), ErrNoSpace, dir, "MiB are needed")
}

func FuzzFiles(f *testing.F) {
	f.Add([]byte(`{"id":"8e9e05c52164694d","clusterID":"cdf818194e3a8c32","name":"m1"}`))
	f.Add([]byte(`{"id":"1","time":"2026-01-02T03:04:05Z"}`))
	f.Add([]byte(`[{"id":10276657743932975437,"peerURLs":["https://192.0.2.1:2380"],"name":"m1"}]`))
	f.Add([]byte(`[null]`))
	f.Add([]byte(`{"id":"-1"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if id, err := parseIdentity(data); err == nil && (checkID(id.ID) != nil || checkID(id.ClusterID) != nil) {
			t.Errorf("accepted %+v", id)
		}
		if r, err := parseRemoval(data); err == nil && checkID(r.ID) != nil {
			t.Errorf("accepted %+v", r)
		}
		if list, err := parseMembers(data); err == nil && len(list) == 0 {
			t.Error("accepted an empty list")
		}
	})
}

// TestOtherCluster: the first server was lost and set up anew at the same address; the second still has data of the former cluster.
func TestOtherCluster(t *testing.T) {
	c := newCluster(t)
	first := c.config("m1")
	first.Bootstrap = true
	m1 := c.start(first).ready()
	m2 := c.join(c.members(m1), c.config("m2"))
	m2.stop()
	m1.stop()
	if _, err := MoveAside(first.Dir); err != nil {
		t.Fatal(err)
	}
	c.start(first).ready()
	expect(t, c.start(m2.cfg).ended(), ErrRemoved, "form cluster")
	checkRemoved(t, m2)
}
