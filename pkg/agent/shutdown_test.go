// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

// Who asks Kedge to take its pods along hears of it until it has stopped. If it cannot be stopped, the wish is taken back.
func TestStopPods(t *testing.T) {
	cfg := serverConfig(t)
	m := testMachine(t, cfg)
	stop := running(t, m)
	failed := errors.New("the service manager says no")
	if err := StopPods(t.Context(), cfg.RunDir, StopOptions{}, io.Discard, func(context.Context) error { return failed }); !errors.Is(err, failed) {
		t.Errorf("it could not be stopped: %v", err)
	}
	eventually(t, "the wish to be taken back", func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.podStop != nil {
			return errors.New("not yet")
		}
		return nil
	})
	var out strings.Builder
	if err := StopPods(t.Context(), cfg.RunDir, StopOptions{Timeout: time.Minute}, &out, func(context.Context) error { return stop() }); err != nil {
		t.Errorf("%v; it said %q", err, out.String())
	}
	if err := StopPods(t.Context(), cfg.RunDir, StopOptions{}, io.Discard, nil); !errors.Is(err, ErrNotRunning) {
		t.Errorf("afterwards: %v", err)
	}
}

func TestSplit(t *testing.T) {
	for _, c := range []struct{ timeout, grace, critical time.Duration }{
		{0, 30 * time.Second, 10 * time.Second},
		{20 * time.Second, 15 * time.Second, 5 * time.Second},
		{10 * time.Minute, 590 * time.Second, 10 * time.Second},
	} {
		if grace, critical := (StopOptions{Timeout: c.timeout}).split(30*time.Second, 10*time.Second); grace != c.grace || critical != c.critical {
			t.Errorf("%s: %s and %s", c.timeout, grace, critical)
		}
	}
}
