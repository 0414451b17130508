// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
	"go.uber.org/zap"
	"k8s.io/klog/v2"
)

// TestBridges writes through each linked logger and looks for one line of ours.
func TestBridges(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelInfo})).With("process", "test")
	if err := Klog(log, false); err != nil {
		t.Fatal(err)
	}
	Logrus(log, false)
	z := Zap(log)
	for _, tt := range []struct {
		write func()
		want  string // empty: nothing
	}{
		{func() { z.With(zap.String("a", "b")).Warn("from zap", zap.Int("n", 1)) }, `level=WARN msg="from zap" process=test a=b n=1`},
		{func() { z.Debug("quiet") }, ""},
		{func() { logrus.WithField("a", "b").Error("from logrus") }, `level=ERROR msg="from logrus" process=test a=b`},
		{func() { logrus.Debug("quiet") }, ""},
		{func() { klog.ErrorS(errors.New("why"), "from klog", "a", "b") }, `level=ERROR msg="from klog" process=test err=why a=b`},
		{func() { klog.V(2).Info("quiet") }, ""},
		{func() { klog.Background().V(2).Info("quiet") }, ""},
	} {
		out.Reset()
		tt.write()
		klog.Flush()
		if got := out.String(); tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}
