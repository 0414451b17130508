// SPDX-License-Identifier: Apache-2.0

// Package logging gives every process of Kedge one log: slog on stderr, as text or JSON, and the loggers of the linked
// projects (klog, zap, logrus) led into it.
package logging

import (
	"context"
	"flag"
	"io"
	"log/slog"
	"os"
	"strconv"

	containerdlog "github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"k8s.io/klog/v2"
)

// Config is part of every process's configuration.
type Config struct {
	// Format is "text" or "json".
	Format string `json:"format"`
	// Debug shows debug lines and raises the verbosity of the Kubernetes components to 4.
	Debug bool `json:"debug,omitempty"`
}

// New returns the process's logger and makes it slog's default.
func New(c Config) *slog.Logger {
	opts := &slog.HandlerOptions{Level: slog.LevelInfo}
	if c.Debug {
		opts.Level = slog.LevelDebug
	}
	var handler slog.Handler = slog.NewTextHandler(os.Stderr, opts)
	if c.Format == "json" {
		handler = slog.NewJSONHandler(os.Stderr, opts)
	}
	logger := slog.New(handler)
	slog.SetDefault(logger)
	return logger
}

// Klog leads klog, which all Kubernetes components write to, into logger.
func Klog(logger *slog.Logger, debug bool) error {
	fs := flag.NewFlagSet("klog", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	klog.InitFlags(fs)
	verbosity := 0
	if debug {
		verbosity = 4
	}
	if err := fs.Set("v", strconv.Itoa(verbosity)); err != nil {
		return err
	}
	klog.SetSlogLogger(logger)
	return nil
}

// Logrus leads containerd's global logger into logger.
func Logrus(logger *slog.Logger, debug bool) {
	logrus.SetOutput(io.Discard)
	logrus.SetLevel(logrus.InfoLevel)
	if debug {
		logrus.SetLevel(logrus.DebugLevel)
	}
	logrus.AddHook(logrusHook{logger})
	containerdlog.L = logrus.NewEntry(logrus.StandardLogger())
}

type logrusHook struct{ log *slog.Logger }

func (logrusHook) Levels() []logrus.Level { return logrus.AllLevels }

func (h logrusHook) Fire(e *logrus.Entry) error {
	attrs := make([]slog.Attr, 0, len(e.Data))
	for k, v := range e.Data {
		attrs = append(attrs, slog.Any(k, v))
	}
	level := slog.LevelDebug
	switch e.Level {
	case logrus.InfoLevel:
		level = slog.LevelInfo
	case logrus.WarnLevel:
		level = slog.LevelWarn
	case logrus.ErrorLevel, logrus.FatalLevel, logrus.PanicLevel:
		level = slog.LevelError
	}
	h.log.LogAttrs(context.Background(), level, e.Message, attrs...)
	return nil
}

// Zap returns a zap logger (etcd's) that writes to logger.
func Zap(logger *slog.Logger) *zap.Logger { return zap.New(zapCore{logger}) }

type zapCore struct{ log *slog.Logger }

func zapLevel(l zapcore.Level) slog.Level {
	switch {
	case l < zapcore.InfoLevel:
		return slog.LevelDebug
	case l == zapcore.InfoLevel:
		return slog.LevelInfo
	case l == zapcore.WarnLevel:
		return slog.LevelWarn
	default:
		return slog.LevelError
	}
}

func zapAttrs(fields []zapcore.Field) []any {
	enc := zapcore.NewMapObjectEncoder()
	attrs := make([]any, 0, len(fields))
	for _, f := range fields {
		f.AddTo(enc)
	}
	for k, v := range enc.Fields {
		attrs = append(attrs, slog.Any(k, v))
	}
	return attrs
}

func (c zapCore) Enabled(l zapcore.Level) bool {
	return c.log.Enabled(context.Background(), zapLevel(l))
}
func (c zapCore) With(fields []zapcore.Field) zapcore.Core {
	return zapCore{c.log.With(zapAttrs(fields)...)}
}
func (c zapCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}
func (c zapCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	c.log.Log(context.Background(), zapLevel(e.Level), e.Message, zapAttrs(fields)...)
	return nil
}
func (zapCore) Sync() error { return nil }

// Child sets up the logging of a child process of that name: its own logger and everything that is linked into it. The lines say
// which process wrote them, and add the component where the process has several.
func Child(c Config, name string) (*slog.Logger, error) {
	log := New(c).With("process", name)
	slog.SetDefault(log)
	if err := Klog(log, c.Debug); err != nil {
		return nil, err
	}
	Logrus(log, c.Debug)
	return log, nil
}
