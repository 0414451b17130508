// SPDX-License-Identifier: Apache-2.0

// Package testlog is a logger for what may still run when a test has ended.
package testlog

import (
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
)

// New gives a logger of all levels that writes to the log of t. What comes after the end of t is dropped: T.Output would panic.
func New(t testing.TB) *slog.Logger {
	w := &writer{t: t}
	t.Cleanup(func() { w.done.Store(true) })
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type writer struct {
	t    testing.TB
	done atomic.Bool
}

func (w *writer) Write(p []byte) (int, error) {
	if !w.done.Load() {
		w.t.Log(strings.TrimSpace(string(p)))
	}
	return len(p), nil
}
