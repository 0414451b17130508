// SPDX-License-Identifier: Apache-2.0

package embed

import (
	"context"
	"errors"
	"log/slog"
	"testing"
)

func BenchmarkStageCold(b *testing.B) {
	for b.Loop() {
		if _, err := Stage(context.Background(), b.TempDir(), slog.New(slog.DiscardHandler)); errors.Is(err, ErrNoAssets) {
			b.Skip(err)
		} else if err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStageWarm(b *testing.B) {
	for _, settled := range []bool{true, false} {
		name := map[bool]string{true: "settled", false: "not settled"}[settled]
		b.Run(name, func(b *testing.B) {
			dir := b.TempDir()
			tree, err := Stage(context.Background(), dir, slog.New(slog.DiscardHandler))
			if errors.Is(err, ErrNoAssets) {
				b.Skip(err)
			}
			if err == nil && settled {
				err = tree.Settle(context.Background())
			}
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if _, err := Stage(context.Background(), dir, slog.New(slog.DiscardHandler)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
