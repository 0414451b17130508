// SPDX-License-Identifier: Apache-2.0

package join

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

func TestWait(t *testing.T) {
	start := problem(KindNotReady, nil, "starting")
	closed := problem(KindUnreachable, nil, "closed")
	fatal := problem(KindRole, nil, "role")
	// script gives an error until a time, in order.
	type step struct {
		until time.Duration
		err   error
	}
	for name, tt := range map[string]struct {
		timeout time.Duration
		script  []step
		reports []string
		want    string
		took    time.Duration // at least
		late    time.Duration // and at most this more
	}{
		"at once": {},
		"quick": {
			script: []step{{100 * time.Millisecond, start}}, reports: []string{"0s starting"}, took: 200 * time.Millisecond,
		},
		"changes and repeats": {
			script:  []step{{time.Second, closed}, {40 * time.Second, start}, {110 * time.Second, closed}, {111 * time.Second, start}},
			reports: []string{"0s closed", "1.4s starting", "32.6s starting", "42.6s closed", "1m13.8s closed", "1m43.8s closed"},
			took:    111 * time.Second, late: 5 * time.Second,
		},
		"the clocks' times are no change": {
			script:  []step{{time.Second, problem(KindClock, nil, "it is 1")}, {25 * time.Second, problem(KindClock, nil, "it is 2")}},
			reports: []string{"0s it is 1"}, took: 25 * time.Second, late: 5 * time.Second,
		},
		"gives up": {
			script: []step{{time.Second, start}, {3 * time.Second, fatal}}, reports: []string{"0s starting"}, want: "role", took: time.Second, late: time.Second,
		},
		"timeout": {
			timeout: time.Minute, script: []step{{time.Hour, start}}, reports: []string{"0s starting", "31.2s starting"},
			want: "gave up after 1m0s: starting", took: time.Minute,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begin := time.Now()
				var reports []string
				err := Wait(t.Context(), tt.timeout, func(reason string) { reports = append(reports, fmt.Sprint(time.Since(begin), " ", reason)) },
					func(ctx context.Context) error {
						for _, s := range tt.script {
							if time.Since(begin) < s.until {
								return s.err
							}
						}
						return nil
					})
				if (err == nil) != (tt.want == "") || err != nil && err.Error() != tt.want {
					t.Errorf("got %v, want %q", err, tt.want)
				}
				if !slices.Equal(reports, tt.reports) {
					t.Errorf("got  %q\nwant %q", reports, tt.reports)
				}
				if took := time.Since(begin); took < tt.took || took > tt.took+tt.late {
					t.Errorf("took %s", took)
				}
			})
		})
	}
}

// TestWaitEnds: what is told is the reason for waiting, not that an attempt was cut off.
func TestWaitEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		f := func(ctx context.Context) error {
			if n++; n == 1 {
				return problem(KindNotReady, nil, "starting")
			}
			<-ctx.Done()
			return ctx.Err()
		}
		err := Wait(t.Context(), time.Minute, func(string) {}, f)
		if err == nil || err.Error() != "gave up after 1m0s: starting" || KindOf(err) != KindNotReady {
			t.Error(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Minute, cancel)
		n = 0
		err = Wait(ctx, 0, func(string) {}, f)
		if !errors.Is(err, context.Canceled) || err.Error() != "context canceled: starting" {
			t.Error(err)
		}
	})
}

func TestRetryable(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want bool
	}{
		{errors.New("x"), false},
		{context.Canceled, false},
		{context.DeadlineExceeded, true}, // of an attempt
		{fmt.Errorf("x: %w", io.ErrUnexpectedEOF), true},
		{fmt.Errorf("x: %w", &net.OpError{Op: "dial", Err: errors.New("refused")}), true},
		{apierrors.NewServiceUnavailable("x"), true},
		{apierrors.NewUnauthorized("x"), false},
		{apierrors.NewTooManyRequestsError("x"), true},
		{fmt.Errorf("x: %w", apierrors.NewGenericServerResponse(http.StatusConflict, "post", schema.GroupResource{}, "", "", 0, true)), true},
		{fmt.Errorf("x: %w", problem(KindClock, nil, "x")), true},
		{problem(KindCA, &net.OpError{Op: "dial", Err: errors.New("x")}, "x"), false},
	} {
		if Retryable(tt.err) != tt.want {
			t.Errorf("%v: not %v", tt.err, tt.want)
		}
	}
}
