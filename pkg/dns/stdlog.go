// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"strings"
)

// captureStdLog leads what CoreDNS and caddy write to the standard logger ("[INFO] plugin/forward: …") into logger. Lines of others, without
// such a level, go where they went before. It returns the function that undoes it.
func captureStdLog(logger *slog.Logger) (restore func()) {
	if strings.HasSuffix(fmt.Sprintf("%T", logger.Handler()), "slog.defaultHandler") {
		return func() {} // that handler writes to the standard logger itself
	}
	before, flags := log.Writer(), log.Flags()
	log.SetOutput(stdLog{logger: logger, others: before})
	log.SetFlags(0)
	return func() {
		log.SetOutput(before)
		log.SetFlags(flags)
	}
}

type stdLog struct {
	logger *slog.Logger
	others io.Writer
}

// Write takes one message: the standard logger calls it once for each.
func (w stdLog) Write(p []byte) (int, error) {
	level, text, ok := cutLevel(strings.TrimSuffix(string(p), "\n"))
	if !ok {
		return w.others.Write(p)
	}
	var attrs []slog.Attr
	if after, isPlugin := strings.CutPrefix(text, "plugin/"); isPlugin {
		if name, rest, found := strings.Cut(after, ": "); found {
			attrs, text = []slog.Attr{slog.String("plugin", name)}, rest
		}
	}
	w.logger.LogAttrs(context.Background(), level, text, attrs...)
	return len(p), nil
}

func cutLevel(line string) (slog.Level, string, bool) {
	tag, text, ok := strings.Cut(line, " ")
	switch tag {
	case "[DEBUG]":
		return slog.LevelDebug, text, ok
	case "[INFO]":
		return slog.LevelInfo, text, ok
	case "[WARNING]":
		return slog.LevelWarn, text, ok
	case "[ERROR]", "[FATAL]", "[PANIC]":
		return slog.LevelError, text, ok
	}
	return 0, "", false
}
