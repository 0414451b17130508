// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/check"
)

// A first start measures the disk for no longer than this; later the member's own syncs tell more.
const (
	measureTime    = 200 * time.Millisecond
	measureRecords = 32
)

// What a member goes by.
const (
	// An election has to wait for several syncs of the slowest disk. etcd's defaults fit disks that need up to 50 ms.
	syncsPerElection = 20
	electionMin      = time.Second
	electionMax      = 5 * time.Second
	// A member with another disk may have the shortest election: three heartbeats of the slowest fit in.
	heartbeatMax = 300 * time.Millisecond
	// slowSync is what etcd wants the 99th percentile of syncs to be below: https://etcd.io/docs/v3.6/faq/
	slowSync = 10 * time.Millisecond

	quotaMin = 512 << 20
	quotaMax = 8 << 30 // what etcd recommends at most: https://etcd.io/docs/v3.6/dev-guide/limit/
	// roomForWrites is what a database that is there already may grow at least.
	roomForWrites = 64 << 20

	watchDiskEvery = time.Hour
	// fewSyncs are too few for a percentile.
	fewSyncs = 1000
)

// Disk is what is known of the disk that a member's data is on.
type Disk struct {
	// Sync is the 99th percentile of the time that a sync of the write-ahead log takes.
	Sync time.Duration `json:"syncNanoseconds"`

	total, free, database int64 // bytes
}

// DiskFile is where it is kept what was measured.
func DiskFile(dir string) string { return filepath.Clean(dir) + ".disk.json" }

func parseDisk(data []byte) (*Disk, error) {
	var d Disk
	if err := json.Unmarshal(data, &d); err != nil {
		return nil, err
	}
	if d.Sync <= 0 {
		return nil, fmt.Errorf("%d ns are no time that a sync takes", d.Sync)
	}
	return &d, nil
}

// knowDisk reads what was measured before, or measures.
func knowDisk(ctx context.Context, dir string) (Disk, error) {
	parent := filepath.Dir(filepath.Clean(dir))
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return Disk{}, err
	}
	known, err := readFile(DiskFile(dir), parseDisk)
	if err != nil || known == nil { // a damaged file is no reason not to start
		known = &Disk{}
		syncs, err := check.MeasureFsync(ctx, parent, measureTime, measureRecords)
		if err != nil {
			return Disk{}, fmt.Errorf("measure the disk: %w", err)
		}
		known.Sync = percentile99(syncs)
		if err := writeFile(DiskFile(dir), known); err != nil {
			return Disk{}, err
		}
	}
	var s unix.Statfs_t
	if err := unix.Statfs(parent, &s); err != nil {
		return Disk{}, fmt.Errorf("%s: %w", parent, err)
	}
	known.total, known.free = int64(s.Blocks)*s.Bsize, int64(s.Bavail)*s.Bsize
	info, err := os.Stat(filepath.Join(dir, "member", "snap", "db"))
	if err == nil {
		known.database = info.Size()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return Disk{}, err
	}
	return *known, nil
}

func percentile99(d []time.Duration) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[(len(d)*99+99)/100-1]
}

// timeouts are how often a leader lets the others know of it, and how long they wait without hearing from it.
func (d Disk) timeouts() (heartbeat, election time.Duration) {
	election = min(max(syncsPerElection*d.Sync, electionMin), electionMax).Round(100 * time.Millisecond)
	return min(election/10, heartbeatMax), election
}

// quota is the size of the database at which the datastore takes no more writes: a tenth of the disk, and no more than there is room for. Of a
// disk that was not looked at nothing is known: 0 is etcd's default.
func (d Disk) quota() int64 {
	if d.total == 0 {
		return 0
	}
	q := min(max(d.total/10, quotaMin), quotaMax)
	return max(min(q, d.database+d.free/10*8), d.database+roomForWrites)
}

// watchDisk compares the member's own syncs with what it goes by, and says once if they differ so much that the next start will go by
// other figures. Nothing is written while they do not.
func (m *member) watchDisk(ctx context.Context) {
	var before *dto.Histogram
	warned := m.disk.Sync >= slowSync
	if warned {
		heartbeat, election := m.disk.timeouts()
		m.log.Warn("the disk is slow for a datastore", "sync", m.disk.Sync.Round(time.Millisecond), "wanted", slowSync, "heartbeat", heartbeat, "election", election,
			"see", "docs/disks.md")
	}
	ticker := time.NewTicker(watchDiskEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := syncHistogram()
		sync, ok := percentileBetween(before, now)
		if before = now; !ok {
			continue
		}
		seen := Disk{Sync: sync}
		_, was := m.disk.timeouts()
		_, is := seen.timeouts()
		if sync >= slowSync && !warned {
			warned = true
			m.log.Warn("the disk has become slow for a datastore", "sync", sync.Round(time.Millisecond), "wanted", slowSync, "see", "docs/disks.md")
		}
		if was != is {
			m.disk.Sync = sync
			m.log.Info("the next start of the datastore goes by another speed of the disk", "sync", sync.Round(time.Millisecond), "election", is, "now", was)
			if err := writeFile(DiskFile(m.cfg.Dir), seen); err != nil {
				m.log.Warn("what was measured of the disk cannot be kept", "error", err)
			}
		}
	}
}

// syncHistogram is etcd's own measurement in this process; nil if there is none.
func syncHistogram() *dto.Histogram {
	families, err := prometheus.DefaultGatherer.Gather()
	if err != nil {
		return nil
	}
	for _, f := range families {
		if f.GetName() == "etcd_disk_wal_fsync_duration_seconds" && len(f.GetMetric()) == 1 {
			return f.GetMetric()[0].GetHistogram()
		}
	}
	return nil
}

// percentileBetween is the upper bound of the bucket that has the 99th percentile of what was counted between two looks.
func percentileBetween(before, now *dto.Histogram) (time.Duration, bool) {
	count := now.GetSampleCount() - before.GetSampleCount()
	if count < fewSyncs {
		return 0, false
	}
	for i, b := range now.GetBucket() {
		under := b.GetCumulativeCount()
		if before != nil {
			under -= before.GetBucket()[i].GetCumulativeCount()
		}
		if bound := b.GetUpperBound(); float64(under) >= 0.99*float64(count) && !math.IsInf(bound, 1) {
			return time.Duration(bound * float64(time.Second)), true
		}
	}
	return electionMax, true
}
