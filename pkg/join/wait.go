// SPDX-License-Identifier: Apache-2.0

package join

import (
	"cmp"
	"context"
	"fmt"
	"time"
)

const (
	firstRetry = 200 * time.Millisecond
	// lastRetry is how late a joiner notices that it can go on. A hundred waiting machines make twenty requests a second by it.
	lastRetry = 5 * time.Second
	// busyRetry is for servers that wait for each other, which takes a second or two.
	busyRetry   = time.Second
	reportEvery = 30 * time.Second
	// nameRetry is for a name whose former machine may be gone: that takes the better part of a minute to be sure of, and each try leaves a
	// denied request in the cluster.
	nameRetry = 15 * time.Second
)

// Wait calls f until it succeeds or fails in a way that waiting cannot cure, and returns its error in that case. A timeout
// other than 0 ends it with the last reason. report gets the reason for waiting when it changes, and every 30 seconds. Each call
// of f should have a time limit of its own.
func Wait(ctx context.Context, timeout time.Duration, report func(reason string), f func(ctx context.Context) error) error {
	if timeout != 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, timeout, fmt.Errorf("gave up after %s", timeout))
		defer cancel()
	}
	var last, reported error
	var reportedAt time.Time
	for delay := firstRetry; ; delay = min(2*delay, lastRetry) {
		err := f(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			// What f was cut off in says less than what it said before.
			return fmt.Errorf("%w: %w", context.Cause(ctx), cmp.Or(last, err))
		}
		if !Retryable(err) {
			return err
		}
		if KindOf(err) != KindOf(last) { // it goes on: the next step may not take as long as the last one
			delay = firstRetry
		}
		last = err
		if !sameReason(err, reported) || time.Since(reportedAt) >= reportEvery {
			report(err.Error())
			reported, reportedAt = err, time.Now()
		}
		pause := delay
		switch KindOf(err) {
		case KindName:
			pause = nameRetry
		case KindBusy:
			pause = min(delay, busyRetry)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), last)
		case <-time.After(pause):
		}
	}
}

// sameReason: differing clocks and names that were seen a moment ago are told with times, which are never the same.
func sameReason(a, b error) bool {
	if b == nil {
		return false
	}
	kind := KindOf(a)
	return a.Error() == b.Error() || kind == KindOf(b) && (kind == KindClock || kind == KindName)
}
