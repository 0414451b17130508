// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/knftables"
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
			golden := "testdata/notrack." + name
			if *update {
				if err := os.WriteFile(golden, []byte(fake.Dump()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), fake.Dump()); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}
