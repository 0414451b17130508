// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A datastore that is full says so, takes deletions, and takes writes again once what filled it is gone.
func TestFull(t *testing.T) {
	c := newCluster(t)
	cfg := c.config("m1")
	cfg.Bootstrap, cfg.Args = true, []string{"--quota-backend-bytes=16777216"}
	if err := os.MkdirAll(filepath.Dir(cfg.Dir), 0o700); err != nil {
		t.Fatal(err)
	}
	ec, err := etcdConfig(cfg, Disk{}, c.log)
	if err != nil {
		t.Fatal(err)
	}
	e, err := start(ec)
	if err != nil {
		t.Fatal(err)
	}
	defer shut(e)
	<-e.Server.ReadyNotify()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{Endpoint(cfg.Socket)}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	tender := &spaceTender{member: &member{cfg: cfg, etcd: e, log: c.log}}
	remark := func(want string) {
		t.Helper()
		if got := *tender.remark.Load(); got != want && (want == "" || !strings.HasPrefix(got, want)) {
			t.Errorf("remark %q, want %q", got, want)
		}
	}

	now := time.Now()
	tender.once(t.Context(), now)
	remark("")
	value := strings.Repeat("x", 512<<10)
	warned := false
	for i := 0; ; i++ {
		if i == 100 {
			t.Fatal("the quota is not kept")
		}
		_, err := client.Put(t.Context(), fmt.Sprintf("/registry/configmaps/%d", i), value)
		if errors.Is(err, rpctypes.ErrNoSpace) {
			// Some of the file may have been free.
			if tender.once(t.Context(), now); tender.space().alarm {
				break
			}
		} else if err != nil {
			t.Fatal(err)
		}
		e.Server.Backend().ForceCommit() // the quota goes by the file
		tender.once(t.Context(), now)
		warned = warned || strings.HasPrefix(*tender.remark.Load(), "nearly full: the database has ")
	}
	if !warned {
		t.Error("it was not foreseen")
	}
	tender.once(t.Context(), now)
	remark("NOSPACE: ")
	if _, err := client.Put(t.Context(), "a", "b"); !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Errorf("a write while everything is in use: %v", err)
	}

	if _, err := client.Delete(t.Context(), "/registry/configmaps/", clientv3.WithPrefix()); err != nil {
		t.Fatalf("deletions are refused: %v", err)
	}
	// What is deleted is there until the next compaction.
	tender.once(t.Context(), now.Add(compactEvery))
	remark("")
	if _, err := client.Put(t.Context(), "a", "b"); err != nil {
		t.Errorf("after deletions: %v", err)
	}
	if s := tender.space(); s.size > 4<<20 {
		t.Errorf("the file has still %s", s)
	}
}

func TestWorthDefragmenting(t *testing.T) {
	const mib = 1 << 20
	for name, tt := range map[string]struct {
		space space
		want  bool
	}{
		"full of data":      {space{size: 500 * mib, inUse: 400 * mib, diskFree: 1000 * mib}, false},
		"half empty":        {space{size: 500 * mib, inUse: 200 * mib, diskFree: 1000 * mib}, true},
		"small":             {space{size: 100 * mib, inUse: mib, diskFree: 1000 * mib}, false},
		"small, with alarm": {space{size: 100 * mib, inUse: mib, diskFree: 1000 * mib, alarm: true}, true},
		"no room for it":    {space{size: 500 * mib, inUse: 200 * mib, diskFree: 210 * mib}, false},
		"alarm, all in use": {space{size: 100 * mib, inUse: 95 * mib, diskFree: 1000 * mib, alarm: true}, false},
	} {
		if got := tt.space.worthDefragmenting(); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// At any time at most one member may, each gets its turn, and around the change of turns none may.
func TestDefragTurn(t *testing.T) {
	ids := []uint64{30, 10, 20}
	turns := map[uint64]int{}
	start := time.Unix(1_800_000_000, 0)
	for s := range 3600 {
		var may []uint64
		for _, id := range ids {
			// Clocks that differ by up to a minute.
			for _, skew := range []time.Duration{-time.Minute, 0, time.Minute} {
				if defragTurn(id, ids, start.Add(time.Duration(s)*time.Second+skew)) {
					may = append(may, id)
					turns[id]++
					break
				}
			}
		}
		if len(may) > 1 {
			t.Fatalf("after %d s: %v", s, may)
		}
	}
	if len(turns) != 3 {
		t.Errorf("turns: %v", turns)
	}
	if !defragTurn(7, []uint64{7}, start) {
		t.Error("a single member has to wait")
	}
}
