// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/utils/ptr"
)

const (
	tendSpaceEvery = time.Minute // in memory
	// A database that is as full is announced until it is as empty again.
	nearlyFull, hasRoom = 0.8, 0.75
	// clearBelow is how empty the database of a member has to be for its alarm to be taken back.
	clearBelow = 0.9
	// A file of which more than half is free, and not only a little, is written anew.
	defragFrom = 128 << 20
	// defragSlot is the time that each member has to itself for that; the last part of it is left to clocks that differ.
	defragSlot, defragSlack = 5 * time.Minute, 2 * time.Minute
	// compactEvery bounds the compactions while an alarm lasts: each costs the watchers that lag behind a new list.
	compactEvery = 5 * time.Minute
	spaceTimeout = 10 * time.Second
)

// space is how full the member's database is. Sizes are in bytes.
type space struct {
	size, inUse, quota int64
	diskFree           int64
	alarm              bool // of this member: it takes no more writes
}

func (s space) String() string {
	return fmt.Sprintf("%s of at most %s, of which %s in use", mebibytes(s.size), mebibytes(s.quota), mebibytes(s.inUse))
}

func mebibytes(n int64) string { return resource.NewQuantity(n>>20<<20, resource.BinarySI).String() }

// worthDefragmenting tells whether writing the file anew gives much back, and whether the disk has room for the copy.
func (s space) worthDefragmenting() bool {
	gain := s.size - s.inUse
	if s.diskFree < s.inUse+s.inUse/10 {
		return false
	}
	return s.alarm && gain > s.size/10 || s.size >= defragFrom && gain > s.size/2
}

// defragTurn says whether a member may write its file anew now: its requests wait meanwhile, so it is one member after the other, without any
// message between them. ids are those of all members.
func defragTurn(self uint64, ids []uint64, now time.Time) bool {
	turn := now.Unix() / int64(defragSlot.Seconds()) % int64(len(ids))
	within := time.Duration(now.Unix()%int64(defragSlot.Seconds())) * time.Second
	return slices.Sorted(slices.Values(ids))[turn] == self && within < defragSlot-defragSlack
}

// tendSpace watches how full the database is: it announces what is going to happen, gives free space back to the disk, and recovers from
// the alarm NOSPACE as soon as there is room.
func (m *member) tendSpace(ctx context.Context) {
	ticker := time.NewTicker(tendSpaceEvery)
	defer ticker.Stop()
	t := spaceTender{member: m}
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		t.once(ctx, time.Now())
	}
}

type spaceTender struct {
	*member
	announced bool
	compacted time.Time
}

func (t *spaceTender) once(ctx context.Context, now time.Time) {
	s := t.space()
	if s.alarm {
		s = t.recover(ctx, s, now)
	}
	if !s.alarm && s.worthDefragmenting() && t.mayDefragment(now) {
		t.defragment()
		s = t.space()
	}
	full := float64(s.size) / float64(s.quota)
	remark := ""
	switch {
	case s.alarm:
		remark = "NOSPACE: the datastore takes no writes but deletions: its database has " + s.String() + "; delete what fills it, see docs/disks.md"
	case full >= nearlyFull || t.announced && full >= hasRoom:
		remark = "nearly full: the database has " + s.String() + "; see docs/disks.md"
	}
	if announced := remark != ""; announced != t.announced {
		t.announced = announced
		if announced {
			t.log.Warn("datastore " + remark)
		} else {
			t.log.Info("the datastore has room again", "database", s.String())
		}
	}
	t.remark.Store(ptr.To(remark))
}

func (m *member) space() space {
	server := m.etcd.Server
	s := space{size: server.Backend().Size(), inUse: server.Backend().SizeInUse(), quota: server.Cfg.QuotaBackendBytes}
	for _, a := range server.Alarms() {
		s.alarm = s.alarm || a.Alarm == pb.AlarmType_NOSPACE && a.MemberID == uint64(server.MemberID())
	}
	var disk unix.Statfs_t
	if unix.Statfs(m.cfg.Dir, &disk) == nil {
		s.diskFree = int64(disk.Bavail) * disk.Bsize
	}
	return s
}

// recover makes room while the alarm lasts. The API server cannot: what it compacts by is itself a write.
func (t *spaceTender) recover(ctx context.Context, s space, now time.Time) space {
	server := t.etcd.Server
	ctx, cancel := context.WithTimeout(ctx, spaceTimeout)
	defer cancel()
	if now.Sub(t.compacted) >= compactEvery {
		t.compacted = now
		// Physical: it returns when the space is free.
		if _, err := server.Compact(ctx, &pb.CompactionRequest{Revision: server.KV().Rev(), Physical: true}); err != nil {
			t.log.Warn("compaction of the full datastore", "error", err)
		}
		s = t.space()
	}
	if s.worthDefragmenting() {
		t.defragment()
		s = t.space()
	}
	if float64(s.size) >= clearBelow*float64(s.quota) {
		return s
	}
	_, err := server.Alarm(ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, MemberID: uint64(server.MemberID()), Alarm: pb.AlarmType_NOSPACE})
	if err != nil {
		t.log.Warn("the alarm NOSPACE cannot be taken back", "error", err)
		return s
	}
	t.log.Info("the datastore takes writes again", "database", s.String())
	return t.space()
}

func (t *spaceTender) mayDefragment(now time.Time) bool {
	var ids []uint64
	for _, m := range t.etcd.Server.Cluster().Members() {
		ids = append(ids, uint64(m.ID))
	}
	return defragTurn(uint64(t.etcd.Server.MemberID()), ids, now)
}

// defragment writes the database file anew without what is free in it. Requests to this member wait for it; another one leads meanwhile.
func (m *member) defragment() {
	if s := m.etcd.Server; s.Leader() == s.MemberID() && !m.handOver() {
		m.log.Warn("the leader writes its database anew: no other member can lead now")
	}
	before, start := m.space(), time.Now()
	err := m.etcd.Server.Defragment()
	m.log.Info("database file written anew", "before", before.String(), "after", m.space().String(), "took", time.Since(start).Round(time.Millisecond),
		"error", cmp.Or(err, errors.New("none")))
}
