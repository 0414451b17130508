// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Prefixes are the networks of pods or services: one, or one of each address family. The first is the cluster's primary one. Its text
// is the networks with commas between them, as upstream's flags take them.
type Prefixes []netip.Prefix

// String gives the networks with commas between them.
func (p Prefixes) String() string {
	texts := make([]string, len(p))
	for i, one := range p {
		texts[i] = one.String()
	}
	return strings.Join(texts, ",")
}

// MarshalText gives the same.
func (p Prefixes) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads it. An empty text is no network.
func (p *Prefixes) UnmarshalText(text []byte) error {
	*p = nil
	if len(text) == 0 {
		return nil
	}
	for part := range strings.SplitSeq(string(text), ",") {
		one, err := parsePrefix(part)
		if err != nil {
			return err
		}
		*p = append(*p, one)
	}
	return nil
}

// Contains says whether an address lies in one of them.
func (p Prefixes) Contains(a netip.Addr) bool {
	return slices.ContainsFunc(p, func(one netip.Prefix) bool { return one.Contains(a) })
}

// Is6 says that the primary family is IPv6. False if there is none.
func (p Prefixes) Is6() bool { return len(p) > 0 && p[0].Addr().Is6() }

// families gives the address families in their order, each once: true is IPv6.
func (p Prefixes) families() []bool {
	var list []bool
	for _, one := range p {
		list = append(list, one.Addr().Is6())
	}
	return slices.Compact(list)
}

// families gives the address families of addresses in their order: true is IPv6.
func families(addresses []netip.Addr) []bool {
	var list []bool
	for _, a := range addresses {
		list = append(list, a.Is6())
	}
	return list
}

// AddressRange is a range of addresses of one family, both ends included.
type AddressRange struct{ First, Last netip.Addr }

// String gives FIRST-LAST, or the address if it is only one.
func (r AddressRange) String() string {
	if r.First == r.Last {
		return r.First.String()
	}
	return r.First.String() + "-" + r.Last.String()
}

// Contains says whether an address lies in the range.
func (r AddressRange) Contains(a netip.Addr) bool {
	return a.Is6() == r.First.Is6() && !a.Less(r.First) && !r.Last.Less(a)
}

// MarshalText gives the same.
func (r AddressRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads FIRST-LAST, a network, or one address.
func (r *AddressRange) UnmarshalText(text []byte) (err error) {
	*r, err = parseAddressRange(string(text))
	return err
}

func parseAddressRange(s string) (AddressRange, error) {
	wrong := fmt.Errorf("%q is not a range of addresses; accepted: 192.168.1.240-192.168.1.250, 192.168.1.240/28 or one address", s)
	if p, err := netip.ParsePrefix(s); err == nil {
		if p = p.Masked(); p.Addr().Is4In6() {
			return AddressRange{}, wrong
		}
		return AddressRange{First: p.Addr(), Last: lastOf(p)}, nil
	}
	first, last, ok := strings.Cut(s, "-")
	if !ok {
		last = first
	}
	a, errA := hostAddress(strings.TrimSpace(first))
	b, errB := hostAddress(strings.TrimSpace(last))
	switch {
	case errA != nil || errB != nil:
		return AddressRange{}, errors.Join(wrong, errA, errB)
	case a.Is6() != b.Is6() || b.Less(a):
		return AddressRange{}, fmt.Errorf("%w: the last address comes before the first", wrong)
	}
	return AddressRange{First: a, Last: b}, nil
}

// lastOf gives the last address of a network.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
