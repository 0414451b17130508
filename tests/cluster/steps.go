// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/testbed"
)

// Within gives a context for one step of a test.
func Within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// Do takes steps one after the other and fails the test if one fails, or lasts longer than two minutes.
func Do(t testing.TB, steps ...func(context.Context) error) {
	t.Helper()
	for _, step := range steps {
		if err := step(Within(t, 2*time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
}

// Eventually waits until cond returns nil, and fails the test if that takes longer than a minute and a half.
func Eventually(t testing.TB, what string, cond func(context.Context) error) {
	t.Helper()
	EventuallyWithin(t, 90*time.Second, what, cond)
}

// EventuallyWithin is Eventually with another limit.
func EventuallyWithin(t testing.TB, d time.Duration, what string, cond func(context.Context) error) {
	t.Helper()
	if err := testbed.Wait(Within(t, d), what, cond); err != nil {
		t.Fatal(err)
	}
}
