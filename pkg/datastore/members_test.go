// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"errors"
	"maps"
	"os"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"

	"github.com/kedge-io/kedge/pkg/supervise"
)

// expect checks an error's kind and that its text names what a person has to know.
func expect(t *testing.T, err, kind error, texts ...string) {
	t.Helper()
	if err == nil || kind != nil && !errors.Is(err, kind) {
		t.Fatalf("got %v, want %v", err, kind)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%q is not in %q", text, err)
		}
	}
}

// TestLifecycle: servers join, one at a time; one dies, one is removed, notices, and joins afresh; the leader leaves.
func TestLifecycle(t *testing.T) {
	c := newCluster(t)
	first := c.config("m1")
	first.Bootstrap = true
	m1 := c.start(first).ready()
	m := c.members(m1)
	expect(t, m.Remove(t.Context(), "m1", true), ErrQuorum, "last server")

	cfg2, cfg3 := c.config("m2"), c.config("m3")
	id2, all, err := m.Add(t.Context(), "m2", cfg2.peerURL())
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 2 || !all[1].is("m2") && !all[0].is("m2") {
		t.Errorf("the new member is not in the list by its name: %+v", all)
	}
	_, _, err = m.Add(t.Context(), "m3", cfg3.peerURL())
	expect(t, err, ErrBusy, cfg2.peerURL())
	expect(t, m.Promote(t.Context(), "m2"), ErrNotReady) // its name is not known yet
	expect(t, m.Promote(t.Context(), id2), ErrNotReady, cfg2.peerURL())
	cfg2.InitialCluster = all
	m2 := c.start(cfg2).learner()
	_, _, err = m.Add(t.Context(), "m3", cfg3.peerURL())
	expect(t, err, ErrBusy, "m2")
	c.promote(m, "m2")
	m2.ready()
	if err := m.Promote(t.Context(), "m2"); err != nil {
		t.Errorf("a second promotion: %v", err)
	}
	m3 := c.join(m, cfg3)
	if want := map[string]string{"m1": "voter " + m1.cfg.peerURL(), "m2": "voter " + m2.cfg.peerURL(), "m3": "voter " + m3.cfg.peerURL()}; !maps.Equal(c.list(m), want) {
		t.Errorf("members are %v, want %v", c.list(m), want)
	}
	c.put(m3, "a", 20)

	// What must not be.
	_, _, err = m.Add(t.Context(), "m2", c.config("m2").peerURL())
	expect(t, err, ErrExists, "m2", "answers")
	_, _, err = m.Add(t.Context(), "m4", m2.cfg.peerURL())
	expect(t, err, ErrExists, "address of server m2")
	_, _, err = m.Add(t.Context(), "m4", "http://127.0.0.1")
	if err == nil {
		t.Error("a member without TLS and port is taken")
	}
	expect(t, m.Promote(t.Context(), "m9"), ErrNotMember)
	expect(t, m.Remove(t.Context(), "m9", false), ErrNotMember)

	// One server is off: another one cannot go.
	m3.stop()
	expect(t, m.Remove(t.Context(), "m2", false), ErrQuorum, "without m2", "m1, m3", "m3 does not answer", "1 of 2")
	_, _, err = m.Add(t.Context(), "m2", c.config("m2").peerURL())
	expect(t, err, ErrExists)
	m3 = c.start(m3.cfg).ready()

	// A removed member notices, at once and at its next start.
	if err := m.Remove(t.Context(), "m2", false); err != nil {
		t.Fatal(err)
	}
	expect(t, m2.ended(), ErrRemoved, "join afresh")
	if s, _ := m2.status(); s != supervise.Failed {
		t.Errorf("state %s", s)
	}
	checkRemoved(t, m2)
	if err := os.Remove(RemovedFile(m2.cfg.Dir)); err != nil {
		t.Fatal(err)
	}
	expect(t, c.start(m2.cfg).ended(), ErrRemoved)
	checkRemoved(t, m2)
	peers, err := membersFromPeers(t.Context(), []string{m2.cfg.peerURL(), m3.cfg.peerURL()}, c.files)
	if err != nil || len(peers) != 2 {
		t.Errorf("the peers say %+v, %v", peers, err)
	}

	// It joins afresh.
	moved, err := MoveAside(m2.cfg.Dir)
	if err != nil || !HasMember(moved) || HasMember(m2.cfg.Dir) {
		t.Fatalf("moved to %q: %v", moved, err)
	}
	m2 = c.join(m, c.config("m2"))
	if id(t, m2) == id2 {
		t.Error("the removed ID is used again")
	}

	// A dead server of the same name gives way.
	old := id(t, m3)
	m3.stop()
	if _, err := MoveAside(m3.cfg.Dir); err != nil {
		t.Fatal(err)
	}
	m3 = c.join(m, c.config("m3"))
	if len(c.list(m)) != 3 || id(t, m3) == old {
		t.Errorf("members are %v", c.list(m))
	}
	if n := c.count(m3, "a"); n != 20 {
		t.Errorf("%d of 20 keys", n)
	}

	// The leader leaves: it hands over first.
	if err := c.members(m1).Remove(t.Context(), "m1", false); err != nil {
		t.Fatal(err)
	}
	expect(t, m1.ended(), ErrRemoved)
	c.put(m2, "b", 1)
}

func checkRemoved(t *testing.T, p *proc) {
	t.Helper()
	r, err := ReadRemoved(p.cfg.Dir)
	if err != nil || r == nil || r.ID != id(t, p) || time.Since(r.Time) > time.Minute {
		t.Errorf("the note says %+v, %v", r, err)
	}
}

// TestLeftoverLearner: a server that was added and never came is replaced by its next try, or removed.
func TestLeftoverLearner(t *testing.T) {
	c := newCluster(t)
	first := c.config("m1")
	first.Bootstrap = true
	m := c.members(c.start(first).ready())
	cfg2 := c.config("m2")
	one, _, err := m.Add(t.Context(), "m2", cfg2.peerURL())
	if err != nil {
		t.Fatal(err)
	}
	two, all, err := m.Add(t.Context(), "m2", cfg2.peerURL())
	if err != nil || two == one || len(all) != 2 {
		t.Fatalf("got %s after %s, %+v, %v", two, one, all, err)
	}
	if err := m.UpdatePeerURL(t.Context(), two, "https://127.0.0.1:1"); err != nil {
		t.Error(err)
	}
	expect(t, m.UpdatePeerURL(t.Context(), two, first.peerURL()), ErrExists, first.peerURL())
	expect(t, m.UpdatePeerURL(t.Context(), "1", "https://127.0.0.1:1"), ErrNotMember)
	tidy := m.tender()
	seen := tidy.round(t.Context(), nil, c.log)
	if s, ok := seen[two]; !ok || len(seen) != 1 || len(c.list(m)) != 2 {
		t.Fatalf("a new learner is not left alone: %+v", s)
	}
	seen[two] = sighting{first: time.Now().Add(-time.Minute), heard: time.Now().Add(-learnerSilence)}
	tidy.round(t.Context(), seen, c.log)
	if len(c.list(m)) != 1 {
		t.Errorf("still there: %v", c.list(m))
	}
	// The server that was too slow is told.
	cfg2.InitialCluster = all
	p := c.start(cfg2)
	expect(t, p.ended(), ErrRemoved, "not among the members")
	if r, err := ReadRemoved(cfg2.Dir); err != nil || r == nil || r.ID != two {
		t.Errorf("the note says %+v, %v", r, err)
	}
	if HasMember(cfg2.Dir) {
		t.Error("it made a cluster of its own")
	}
}

// TestJoinAfterFailedStart: etcd leaves an empty database behind when the member that it asks does not know it yet.
func TestJoinAfterFailedStart(t *testing.T) {
	c := newCluster(t)
	first := c.config("m1")
	first.Bootstrap = true
	m := c.members(c.start(first).ready())
	cfg := c.config("m2")
	id, all, err := m.Add(t.Context(), "m2", cfg.peerURL())
	if err != nil {
		t.Fatal(err)
	}
	ec, err := etcdConfig(cfg, Disk{}, c.log)
	if err != nil {
		t.Fatal(err)
	}
	ec.ClusterState = embed.ClusterStateFlagExisting
	ec.InitialCluster = "m2=" + cfg.peerURL() + ",m1=" + first.peerURL() + ",m3=https://127.0.0.1:1"
	if _, err := start(ec); err == nil || !strings.Contains(err.Error(), "member count is unequal") {
		t.Fatalf("got %v", err)
	}
	cfg.InitialCluster = all
	p := c.start(cfg).learner()
	c.promote(m, id)
	p.ready()
}
