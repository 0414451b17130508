// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// While a peer is away etcd says so a dozen times a minute and for ever, and a slow disk yields a line a request. The first of
// a minute are worth reading.
const (
	quietWindow = time.Minute
	quietFirst  = 3
	quietKeep   = 256 // different messages that are remembered
)

// quiet lets each message through a few times a minute; the next one says how often it was left out.
func quiet(core zapcore.Core) zapcore.Core {
	return &quietCore{Core: core, counts: &messageCounts{seen: map[string]*messageCount{}}}
}

type quietCore struct {
	zapcore.Core
	counts *messageCounts
}

type messageCounts struct {
	mu   sync.Mutex
	seen map[string]*messageCount
}

type messageCount struct {
	since      time.Time
	written    int
	suppressed int
}

func (c *quietCore) With(fields []zapcore.Field) zapcore.Core {
	return &quietCore{Core: c.Core.With(fields), counts: c.counts}
}

func (c *quietCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !c.Enabled(e.Level) || e.Level <= zapcore.ErrorLevel && !c.counts.allow(e) {
		return ce
	}
	return ce.AddCore(e, c)
}

func (c *quietCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	if n := c.counts.takeSuppressed(e.Message); n > 0 {
		fields = append(fields, zap.Int("left-out", n))
	}
	return c.Core.Write(e, fields)
}

func (m *messageCounts) allow(e zapcore.Entry) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.seen[e.Message]
	if n == nil {
		if len(m.seen) >= quietKeep { // raft has numbers in its messages: most are never seen again
			clear(m.seen)
		}
		n = &messageCount{since: e.Time}
		m.seen[e.Message] = n
	}
	if e.Time.Sub(n.since) >= quietWindow {
		n.since, n.written = e.Time, 0
	}
	if n.written >= quietFirst {
		n.suppressed++
		return false
	}
	n.written++
	return true
}

func (m *messageCounts) takeSuppressed(message string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.seen[message]
	if n == nil {
		return 0
	}
	suppressed := n.suppressed
	n.suppressed = 0
	return suppressed
}
