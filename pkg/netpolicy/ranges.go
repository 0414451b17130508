// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"cmp"
	"net/netip"
	"slices"
)

// rangeOf gives all addresses of a prefix.
func rangeOf(p netip.Prefix) addrRange {
	p = p.Masked()
	last := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(last)*8; bit++ {
		last[bit/8] |= 0x80 >> (bit % 8)
	}
	to, _ := netip.AddrFromSlice(last)
	return addrRange{p.Addr(), to}
}

// without takes the addresses of x out of r.
func (r addrRange) without(x addrRange) []addrRange {
	if x.to.Less(r.from) || r.to.Less(x.from) {
		return []addrRange{r}
	}
	var rest []addrRange
	if r.from.Less(x.from) {
		rest = append(rest, addrRange{r.from, x.from.Prev()})
	}
	if x.to.Less(r.to) {
		rest = append(rest, addrRange{x.to.Next(), r.to})
	}
	return rest
}

// mergeAddrs sorts ranges of one family and joins those that overlap or touch: nft refuses overlaps.
func mergeAddrs(ranges []addrRange) []addrRange {
	slices.SortFunc(ranges, func(a, b addrRange) int { return a.from.Compare(b.from) })
	var merged []addrRange
	for _, r := range ranges {
		if n := len(merged); n > 0 && !merged[n-1].to.Less(r.from) || n > 0 && merged[n-1].to.Next() == r.from {
			if merged[n-1].to.Less(r.to) {
				merged[n-1].to = r.to
			}
			continue
		}
		merged = append(merged, r)
	}
	return merged
}

// mergePorts does the same for ports.
func mergePorts(ranges []portRange) []portRange {
	slices.SortFunc(ranges, func(a, b portRange) int { return cmp.Compare(a.from, b.from) })
	var merged []portRange
	for _, r := range ranges {
		if n := len(merged); n > 0 && int(r.from) <= int(merged[n-1].to)+1 {
			merged[n-1].to = max(merged[n-1].to, r.to)
			continue
		}
		merged = append(merged, r)
	}
	return merged
}
