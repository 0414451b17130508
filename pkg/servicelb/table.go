// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"sigs.k8s.io/knftables"
)

// table keeps the rules in the kernel.
type table struct {
	nft  knftables.Interface
	pods []netip.Prefix

	known bool // what is in the kernel is what was written last
	last  served
	text  string
	rules int // in the chain prerouting
}

// write makes the kernel serve s. It returns whether something had to be done.
func (t *table) write(ctx context.Context, s served) (bool, error) {
	r := newRuleset(s, t.pods)
	text := ""
	if len(s.frontends) > 0 {
		text = r.transaction(t.nft, existing{}).String()
	}
	if t.known && text == t.text {
		return false, nil
	}
	t.known = false
	if text == "" {
		if err := removeTable(ctx, t.nft); err != nil {
			return false, err
		}
	} else {
		have, err := list(ctx, t.nft)
		if err != nil {
			return false, fmt.Errorf("list nftables table inet %s: %w", nftTable, err)
		}
		if err := t.nft.Run(ctx, r.transaction(t.nft, have)); err != nil {
			return false, fmt.Errorf("write nftables table inet %s: %w", nftTable, err)
		}
	}
	before := t.last
	t.known, t.last, t.text = true, s, text
	t.rules = len(r.chains[slices.IndexFunc(r.chains, func(c chain) bool { return c.name == prerouting })].rules)
	return true, cleanUDP(before, s)
}

// look notices that somebody else has flushed the rules. The next write brings them back then.
func (t *table) look(ctx context.Context) (intact bool) {
	if !t.known || t.text == "" {
		return t.known
	}
	rules, err := t.nft.ListRules(ctx, prerouting)
	t.known = err == nil && len(rules) == t.rules
	return t.known
}
