// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	fsyncRecord = 2300                   // bytes; what etcd's own disk test writes: https://etcd.io/docs/v3.6/op-guide/hardware/
	fsyncTime   = 500 * time.Millisecond // how long is measured
	fsyncMax    = 2000                   // records; more says nothing new and wears out flash
)

func probeFsync(ctx context.Context, o Options) Result {
	if o.Agent {
		return Result{Status: Info, Finding: "not measured: an agent has no datastore"}
	}
	dir := existing(o.DataDir)
	latencies, err := MeasureFsync(ctx, dir, fsyncTime, fsyncMax)
	if err != nil {
		return unprobed(err)
	}
	return judgeFsync(dir, latencies)
}

// MeasureFsync appends records to a file in dir and syncs each, as etcd's write-ahead log does, for some time or until there are as many, but at
// least one. The file is removed.
func MeasureFsync(ctx context.Context, dir string, limit time.Duration, records int) (latencies []time.Duration, err error) {
	f, err := os.CreateTemp(dir, ".kedge-check-")
	if err != nil {
		return nil, err
	}
	// The name goes last: btrfs does not log a file without one, so its syncs would cost nothing.
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	// etcd allocates its log in advance, too. Where the file system cannot, the measurement is worth as much.
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(records)*fsyncRecord); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return nil, fmt.Errorf("allocate %d bytes in %s: %w", records*fsyncRecord, dir, err)
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	record := make([]byte, fsyncRecord)
	end := time.Now().Add(limit)
	for len(latencies) < records && (len(latencies) == 0 || time.Now().Before(end)) && ctx.Err() == nil {
		record[0]++
		start := time.Now()
		if _, err := f.Write(record); err != nil {
			return nil, err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return nil, fmt.Errorf("fdatasync in %s: %w", dir, err)
		}
		latencies = append(latencies, time.Since(start))
	}
	if len(latencies) == 0 {
		return nil, ctx.Err()
	}
	return latencies, nil
}

// judgeFsync: etcd wants the 99th percentile below 10 ms (https://etcd.io/docs/v3.6/faq/, "wal_fsync_duration"). Its
// followers expect a heartbeat every 100 ms and call an election after a second without one.
func judgeFsync(dir string, latencies []time.Duration) Result {
	slices.Sort(latencies)
	n := len(latencies)
	median, p99 := latencies[n/2], latencies[min(n-1, n*99/100)]
	finding := fmt.Sprintf("%s: median %s, 99%% within %s (%d synced writes)", dir, roundLatency(median), roundLatency(p99), n)
	const remedy = "Put the data directory on an SSD:\n$ kedge server --data-dir DIR\n" +
		"SD cards and USB sticks stall for seconds when they erase and wear out; a small USB or NVMe SSD is the single best improvement to such a board."
	switch {
	case p99 >= 100*time.Millisecond:
		return Result{Status: Warning, Finding: finding + ": far too slow for etcd. Every change of the cluster waits for a sync; several servers would lose their leader again and again", Remedy: remedy}
	case p99 >= 25*time.Millisecond:
		return Result{Status: Warning, Finding: finding + ": slow for etcd (good: below 10ms). One server works but feels sluggish; with several, elections may occur under load", Remedy: remedy}
	case p99 >= 10*time.Millisecond:
		return Result{Status: Pass, Finding: finding + ": sufficient (good would be below 10ms)"}
	}
	return Result{Status: Pass, Finding: finding}
}

func roundLatency(d time.Duration) time.Duration {
	if d >= 10*time.Millisecond {
		return d.Round(time.Millisecond)
	}
	return d.Round(10 * time.Microsecond)
}
