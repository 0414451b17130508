// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kedge-io/kedge/pkg/config"
)

// nowhere is an address that no machine has (RFC 5737).
var nowhere = netip.MustParseAddr("203.0.113.77")

func TestWatchAddress(t *testing.T) {
	// The machine's own: what a node would get that is not tied to an address.
	own, noAddress := (&config.Config{Cluster: clusterSettings()}).ChooseAddresses()
	for _, test := range []struct {
		name     string
		address  netip.Addr
		given    bool
		wantAt   time.Duration // 0: it runs on until it is stopped
		anywhere bool          // the result does not depend on the machine
	}{
		{"given by the operator", nowhere, true, -1, true},
		{"it is there", netip.MustParseAddr("127.0.0.1"), false, 0, true},
		{"it is gone", nowhere, false, 15 * time.Second, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if !test.anywhere && noAddress != nil {
				test.wantAt = 0 // there is no other to start again with
			}
			synctest.Test(t, func(t *testing.T) {
				cfg := &config.Config{NodeIP: []netip.Addr{test.address}, Cluster: clusterSettings(), Given: map[string]string{}}
				if test.given {
					cfg.Given["node-ip"] = "--node-ip"
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				start := time.Now()
				err := testMachine(t, cfg).watchAddress(ctx)
				took := time.Since(start)
				switch {
				case test.wantAt < 0:
					if err != nil || took != 0 {
						t.Errorf("ended with %v after %v", err, took)
					}
				case test.wantAt == 0:
					if err != nil || took != time.Hour {
						t.Errorf("ended with %v after %v", err, took)
					}
				default:
					if !errors.Is(err, ErrRestart) || took != test.wantAt {
						t.Errorf("ended with %v after %v, although this machine has %v", err, took, own)
					}
				}
			})
		})
	}
}

func TestHasAddresses(t *testing.T) {
	for text, want := range map[string]bool{"127.0.0.1": true, nowhere.String(): false, "::ffff:127.0.0.1": false} {
		if got, err := hasAddresses([]netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr(text)}); err != nil || got != want {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
}
