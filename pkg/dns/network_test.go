// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"net/netip"
	"testing"

	"sigs.k8s.io/knftables"

	"github.com/kedge-io/kedge/tests/golden"
)

func TestNotrackRules(t *testing.T) {
	v6 := testConfig("/d")
	v6.Addr, v6.MetricsAddr = netip.MustParseAddr("fd00:43::10"), ""
	for name, cfg := range map[string]Config{"ipv4": testConfig("/d"), "ipv6": v6} {
		t.Run(name, func(t *testing.T) {
			fake := knftables.NewFake(knftables.InetFamily, nftTable)
			for range 2 { // installing again gives the same
				if err := fake.Run(context.Background(), notrackTransaction(fake, notrackRules(cfg), cfg.listen())); err != nil {
					t.Fatal(err)
				}
			}
			golden.Compare(t, "testdata/notrack."+name, fake.Dump())
		})
	}
}
