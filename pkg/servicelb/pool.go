// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/kedge-io/kedge/pkg/config"
)

// Pool is where Services get their addresses from. The zero value means that Services get the addresses of nodes.
type Pool []config.AddressRange

// Contains says whether an address lies in the pool.
func (p Pool) Contains(a netip.Addr) bool {
	return slices.ContainsFunc(p, func(r config.AddressRange) bool { return r.Contains(a) })
}

// String lists the ranges.
func (p Pool) String() string {
	var list []string
	for _, r := range p {
		list = append(list, r.String())
	}
	return strings.Join(list, ", ")
}

func (p Pool) has(f corev1.IPFamily) bool {
	return slices.ContainsFunc(p, func(r config.AddressRange) bool { return family(r.First) == f })
}

// free returns the first address of a family that nobody uses.
func (p Pool) free(f corev1.IPFamily, used func(netip.Addr) bool) (netip.Addr, bool) {
	for _, r := range p {
		for a := r.First; family(r.First) == f && r.Contains(a); a = a.Next() {
			if !used(a) {
				return a, true
			}
		}
	}
	return netip.Addr{}, false
}
