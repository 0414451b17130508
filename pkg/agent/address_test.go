// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kedge-io/kedge/pkg/config"
)

// nowhere is an address that no machine has (RFC 5737).
var nowhere = netip.MustParseAddr("203.0.113.77")

func TestWatchAddressGiven(t *testing.T) {
	cfg := &config.Config{NodeIP: []netip.Addr{nowhere}, Cluster: clusterSettings(), Given: map[string]string{"node-ip": "--node-ip"}}
	if err := testMachine(t, cfg).watchAddress(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestFollowAddress(t *testing.T) {
	type state struct {
		at    time.Duration
		has   bool
		other string // empty: none
	}
	const second, never = time.Second, -time.Second
	for name, test := range map[string]struct {
		states []state
		deaf   bool // the kernel tells nothing
		want   string
		wantAt time.Duration
	}{
		"it stays":                      {states: []state{{0, true, ""}}, wantAt: never},
		"another one in its place":      {states: []state{{0, true, ""}, {10 * second, false, "192.0.2.2"}}, want: "192.0.2.2", wantAt: 12 * second},
		"it comes back":                 {states: []state{{0, true, ""}, {10 * second, false, "192.0.2.2"}, {11 * second, true, ""}}, wantAt: never},
		"it keeps coming back":          {states: []state{{0, true, ""}, {1 * second, false, "192.0.2.2"}, {2 * second, true, ""}, {3 * second, false, "192.0.2.2"}, {4 * second, true, ""}}, wantAt: never},
		"the other one comes later":     {states: []state{{0, false, ""}, {10 * second, false, "192.0.2.2"}}, want: "192.0.2.2", wantAt: 12 * second},
		"the other one changes":         {states: []state{{0, false, "192.0.2.2"}, {second, false, "192.0.2.3"}}, want: "192.0.2.3", wantAt: 3 * second},
		"the other one goes":            {states: []state{{0, false, "192.0.2.2"}, {second, false, ""}, {2 * second, false, "192.0.2.2"}}, want: "192.0.2.2", wantAt: 4 * second},
		"the link is down":              {states: []state{{0, false, ""}}, wantAt: never},
		"the kernel's word went astray": {states: []state{{0, true, ""}, {10 * second, false, "192.0.2.2"}}, deaf: true, want: "192.0.2.2", wantAt: 62 * second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				start := time.Now()
				changed := make(chan struct{}, 1)
				go func() {
					for _, s := range test.states {
						time.Sleep(time.Until(start.Add(s.at)))
						if !test.deaf {
							tell(changed)
						}
					}
				}()
				got, err := followAddress(ctx, changed, func() (bool, []netip.Addr) {
					i := slices.IndexFunc(test.states, func(s state) bool { return s.at > time.Since(start) })
					if i < 0 {
						i = len(test.states)
					}
					s := test.states[i-1]
					if s.other == "" {
						return s.has, nil
					}
					return s.has, []netip.Addr{netip.MustParseAddr(s.other)}
				}, addressSettles)
				took := time.Since(start)
				switch {
				case err != nil:
					t.Error(err)
				case test.wantAt == never:
					if got != nil || took != time.Hour {
						t.Errorf("%v after %s", got, took)
					}
				case len(got) != 1 || got[0].String() != test.want || took != test.wantAt:
					t.Errorf("%v after %s, want %s after %s", got, took, test.want, test.wantAt)
				}
			})
		})
	}
}

func TestAddresses(t *testing.T) {
	// The machine's own: what a node would get that is not tied to an address.
	own, errOwn := (&config.Config{Cluster: clusterSettings()}).ChooseAddresses()
	m := testMachine(t, &config.Config{NodeIP: []netip.Addr{nowhere}, Cluster: clusterSettings()})
	if has, others := m.addresses(); has || errOwn == nil && !slices.Equal(others, own) || errOwn != nil && others != nil {
		t.Errorf("%v, %v; this machine has %v, %v", has, others, own, errOwn)
	}
	m.cfg.NodeIP = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	if has, others := m.addresses(); !has || others != nil {
		t.Errorf("%v, %v", has, others)
	}
}

func TestHasAddresses(t *testing.T) {
	for text, want := range map[string]bool{"127.0.0.1": true, nowhere.String(): false, "::ffff:127.0.0.1": false} {
		if got, err := hasAddresses([]netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr(text)}); err != nil || got != want {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
}
