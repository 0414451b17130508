// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

func TestDecide(t *testing.T) {
	at := func(revision int64, hash string) *known { return &known{revision, hash} }
	live := func(revision int64, hash string) *inCluster { return &inCluster{revision: revision, hash: hash} }
	gone := func(revision int64) *inCluster { return &inCluster{revision: revision, deleted: true} }
	for _, tt := range []struct {
		what    string
		local   string
		known   *known
		cluster *inCluster
		want    action
	}{
		{"nobody has it", "", nil, nil, nothing},
		{"a new file", "a", nil, nil, push},
		{"in step", "a", at(1, "a"), live(1, "a"), nothing},
		{"the same file on two servers", "a", nil, live(1, "a"), remember},
		{"written, but the state was not kept", "b", at(1, "a"), live(2, "b"), remember},
		{"a server that joins", "", nil, live(3, "a"), write},
		{"changed here", "b", at(1, "a"), live(1, "a"), push},
		{"changed elsewhere", "a", at(1, "a"), live(2, "b"), write},
		{"removed here", "", at(1, "a"), live(1, "a"), pushDelete},
		{"removed elsewhere, this server was off", "a", at(1, "a"), gone(2), remove},
		{"removed and gone here", "", at(1, "a"), gone(2), forget},
		{"removed long ago", "", nil, gone(2), nothing},
		{"changed here and elsewhere", "c", at(1, "a"), live(2, "b"), asideWrite},
		{"another file of this name on a server that joins", "c", nil, live(2, "b"), asideWrite},
		{"removed here, changed elsewhere", "", at(1, "a"), live(2, "b"), write},
		{"changed here, removed elsewhere", "c", at(1, "a"), gone(2), asideOnly},
		{"a new file with the name of one that was removed", "c", nil, gone(2), push},
		{"a cluster that was put back", "c", at(5, "c"), live(3, "a"), push},
		{"a cluster that was put back before the file was made", "c", at(5, "c"), nil, push},
		{"a cluster that was put back to the same", "c", at(5, "c"), live(3, "c"), remember},
		{"a cluster that was put back before the file was removed", "", at(5, "c"), live(3, "a"), write},
		{"a record that was deleted, and the file, too", "", at(5, "c"), nil, forget},
	} {
		if got := decide(tt.local, tt.known, tt.cluster); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.what, got, tt.want)
		}
	}
}

// model is a cluster of servers that do what decide says, without a network and disks.
type model struct {
	record  *inCluster
	servers []*modelServer
}

type modelServer struct {
	off    bool
	file   string
	known  *known
	asides []string
}

// step lets one server do what there is to do, as syncer.do does it.
func (m *model) step(s *modelServer) {
	next := func() int64 {
		n := int64(1)
		if s.known != nil {
			n = s.known.Revision + 1
		}
		if m.record != nil {
			n = max(n, m.record.revision+1)
		}
		return n
	}
	switch decide(s.file, s.known, m.record) {
	case push:
		m.record = &inCluster{revision: next(), hash: s.file}
		s.known = &known{m.record.revision, s.file}
	case pushDelete:
		m.record = &inCluster{revision: next(), deleted: true}
		s.known = nil
	case asideWrite:
		s.asides = append(s.asides, s.file)
		fallthrough
	case write:
		s.file = m.record.hash
		fallthrough
	case remember:
		s.known = &known{m.record.revision, m.record.hash}
	case asideOnly:
		s.asides = append(s.asides, s.file)
		fallthrough
	case remove:
		s.file = ""
		fallthrough
	case forget:
		s.known = nil
	case nothing:
	}
}

// TestConvergence: whatever people do to the files of servers that come and go, in the end all have the same, nothing that was written is
// lost without a copy unless somebody replaced or removed it afterwards, and a removed version never comes back.
func TestConvergence(t *testing.T) {
	for seed := range uint64(2000) {
		random := rand.New(rand.NewPCG(seed, 86))
		m := &model{}
		for range 3 {
			m.servers = append(m.servers, &modelServer{})
		}
		var history []string
		replaced := map[string]bool{} // versions that somebody who saw them replaced or removed
		for i := range 12 {
			s := m.servers[random.IntN(len(m.servers))]
			switch random.IntN(6) {
			case 0, 1:
				if s.file != "" {
					replaced[s.file] = true
				}
				s.file = fmt.Sprintf("v%d", i)
				history = append(history, s.file)
			case 2:
				if s.file != "" {
					replaced[s.file] = true
				}
				s.file = ""
			case 3:
				s.off = !s.off
			default:
				if !s.off {
					m.step(s)
				}
			}
		}
		for range 4 {
			for _, s := range m.servers {
				m.step(s)
			}
		}
		want := ""
		if m.record != nil && !m.record.deleted {
			want = m.record.hash
		}
		for i, s := range m.servers {
			if s.file != want {
				t.Fatalf("seed %d: server %d has %q, the cluster %+v", seed, i, s.file, m.record)
			}
		}
		for _, version := range history {
			kept := version == want || replaced[version]
			for _, s := range m.servers {
				for _, aside := range s.asides {
					kept = kept || aside == version
				}
			}
			if !kept {
				t.Fatalf("seed %d: %s is lost", seed, version)
			}
		}
	}
}
