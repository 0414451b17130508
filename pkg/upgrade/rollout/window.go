// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"fmt"
	"strings"
	"time"
)

// Window is a time of the day, local to this machine, in which upgrades begin. The zero value is all day.
type Window struct {
	from, to time.Duration // since midnight
	text     string
}

// ParseWindow reads one like 22:00-05:00; empty is all day.
func ParseWindow(text string) (Window, error) {
	if text == "" {
		return Window{}, nil
	}
	from, to, ok := strings.Cut(text, "-")
	w := Window{text: text}
	var err error
	if ok {
		if w.from, err = clock(from); err == nil {
			w.to, err = clock(to)
		}
	}
	if !ok || err != nil || w.from == w.to {
		return Window{}, fmt.Errorf("%q is not a window like 22:00-05:00", text)
	}
	return w, nil
}

func clock(text string) (time.Duration, error) {
	t, err := time.Parse("15:04", text)
	return time.Duration(t.Hour())*time.Hour + time.Duration(t.Minute())*time.Minute, err
}

// String is what was parsed.
func (w Window) String() string { return w.text }

// Wait is how long it takes until the window is open; 0: it is.
func (w Window) Wait(now time.Time) time.Duration {
	if w.text == "" {
		return 0
	}
	at := time.Duration(now.Hour())*time.Hour + time.Duration(now.Minute())*time.Minute + time.Duration(now.Second())*time.Second
	open := at >= w.from && at < w.to
	if w.from > w.to {
		open = at >= w.from || at < w.to
	}
	if open {
		return 0
	}
	return (w.from - at + 24*time.Hour) % (24 * time.Hour)
}

// until says to people how long it takes until the window is open, and when that is.
func (w Window) until(now time.Time, wait time.Duration) string {
	return fmt.Sprintf("for the time window %s, until %s (%s)", w, now.Add(wait).Format("Mon 15:04"), wait.Round(time.Second))
}
