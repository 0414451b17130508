// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"hash/fnv"
	"log/slog"
	"time"
)

const (
	// catchUp is how long after a start a snapshot is taken that was due while the machine was off: not while everything starts.
	catchUp = 10 * time.Minute
	// retryAfter a failure.
	retryAfter = 30 * time.Minute
	// lookAgain is how long a wait is at most: a timer stands still in a suspended machine, and does not follow a clock that is set.
	lookAgain = 10 * time.Minute
	// maxStagger keeps servers of one cluster from working for the same snapshot at the same moment.
	maxStagger = 5 * time.Minute
)

// RunSchedule calls take when a snapshot is due, until ctx ends. When the last one was taken is read from the snapshots in the directory, so
// that neither a restart nor a machine that is off at night changes the rhythm.
func RunSchedule(ctx context.Context, s Settings, take func(context.Context) error, log *slog.Logger) {
	start := time.Now()
	var failed time.Time
	for {
		due, ok := s.due(ctx, start, failed, log)
		if !ok {
			return
		}
		for time.Now().Before(due) {
			select {
			case <-ctx.Done():
				return
			case <-time.After(min(time.Until(due), lookAgain)):
			}
		}
		if ctx.Err() != nil {
			return
		}
		failed = time.Time{}
		if err := take(ctx); err != nil && ctx.Err() == nil {
			failed = time.Now()
			log.Error("scheduled snapshot failed, trying again", "error", err, "in", retryAfter)
		}
	}
}

// due is when the next snapshot is to be taken.
func (s Settings) due(ctx context.Context, start, failed time.Time, log *slog.Logger) (time.Time, bool) {
	if !failed.IsZero() {
		return failed.Add(retryAfter), true
	}
	last, err := s.last(ctx)
	if err != nil {
		log.Warn("when the last snapshot was taken is not known", "error", err)
	}
	return dueAfter(s, last, start, time.Now())
}

// dueAfter is due without the disk. last is zero if there is no snapshot yet.
func dueAfter(s Settings, last, start, now time.Time) (time.Time, bool) {
	schedule := s.Snapshots.Schedule
	regular, ok := schedule.Next(now)
	if !ok {
		return time.Time{}, false
	}
	gap := s.gap(now)
	stagger := time.Duration(staggerOf(s.Node) * float64(min(maxStagger, gap/10)))
	if !last.IsZero() && !last.After(now) { // one from the future is of a clock that was wrong
		if due, _ := schedule.Next(last); !due.Before(start) {
			return due.Add(stagger), true
		}
	}
	// Overdue since before the start.
	if late := start.Add(catchUp); late.Before(regular) {
		return late.Add(stagger), true
	}
	return regular.Add(stagger), true
}

// gap is the time from one snapshot to the next.
func (s Settings) gap(now time.Time) time.Duration {
	first, ok := s.Snapshots.Schedule.Next(now)
	if !ok {
		return 0
	}
	second, _ := s.Snapshots.Schedule.Next(first)
	return second.Sub(first)
}

// staggerOf gives each server its own place, from 0 to 1.
func staggerOf(node string) float64 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(node)) // never fails
	return float64(h.Sum32()%1000) / 1000
}

// last is when this server took its last scheduled snapshot of its cluster.
func (s Settings) last(ctx context.Context) (time.Time, error) {
	cluster, err := localIdentity(s.PKIDir)
	if err != nil {
		return time.Time{}, err
	}
	list, err := Directory(s.Snapshots.Dir).List(ctx)
	if err != nil {
		return time.Time{}, err
	}
	for _, e := range list {
		if e.Problem == "" && e.Trigger == Scheduled && e.Of(cluster) {
			return e.Created, nil
		}
	}
	return time.Time{}, nil
}
