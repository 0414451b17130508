// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"fmt"
	"net/netip"
	"slices"
)

// flow is a new connection with its real addresses: before SNAT, after DNAT.
type flow struct {
	from, to netip.Addr
	proto    string
	port     uint16
}

// Decision is what one direction's rules say to a connection.
type Decision struct {
	Allowed  bool     `json:"allowed"`
	Isolated bool     `json:"isolated"`           // policies apply to the pod in this direction
	Policies []string `json:"policies,omitempty"` // the one that allows; or all that isolate
	Reason   string   `json:"reason,omitempty"`   // where no policy decides
}

// side is the address of the pod whose policies a direction is about.
func (f flow) side(d direction) netip.Addr {
	if d == ingress {
		return f.to
	}
	return f.from
}

func (f flow) other(d direction) netip.Addr {
	if d == ingress {
		return f.from
	}
	return f.to
}

// decide walks the chain of the pod's policies the way the kernel does.
func (s *ruleset) decide(d direction, f flow) Decision {
	pod := f.side(d)
	name := mapIngress
	if d == egress {
		name = mapEgress
	}
	chain, isolated := s.sets[familyOf(pod).name(name)].elems[pod.String()]
	if !isolated {
		return Decision{Allowed: true}
	}
	if f.from == f.to {
		return Decision{Allowed: true, Isolated: true, Reason: "a pod may always reach itself"}
	}
	decision := Decision{Isolated: true}
	for _, r := range s.chains[chain] {
		if !s.matches(r, d, f) {
			continue
		}
		switch r.verdict {
		case d.allow():
			return Decision{Allowed: true, Isolated: true, Policies: []string{r.comment}}
		case verdictDrop:
			decision.Policies = s.isolating(chain)
			return decision
		}
	}
	return decision
}

// isolating lists the policies that a chain is made of.
func (s *ruleset) isolating(chain string) (policies []string) {
	for _, r := range s.chains[chain] {
		if r.comment != "" && !slices.Contains(policies, r.comment) {
			policies = append(policies, r.comment)
		}
	}
	return policies
}

func (s *ruleset) matches(r rule, d direction, f flow) bool {
	other := f.other(d)
	if r.family != 0 && r.family != familyOf(other) {
		return false
	}
	if r.peers != "" && !s.has(r.peers, other.String()) {
		return false
	}
	if len(r.ranges) > 0 && !slices.ContainsFunc(r.ranges, func(x addrRange) bool { return !other.Less(x.from) && !x.to.Less(other) }) {
		return false
	}
	if r.named != "" {
		return s.has(r.named, fmt.Sprintf("%s . %s . %d", f.to, f.proto, f.port))
	}
	if r.proto != "" && r.proto != f.proto {
		return false
	}
	return len(r.ports) == 0 || slices.ContainsFunc(r.ports, func(x portRange) bool { return x.from <= f.port && f.port <= x.to })
}

func (s *ruleset) has(set, key string) bool {
	_, ok := s.sets[set].elems[key]
	return ok
}

// knows tells whether an address is one of this node's pods.
func (s *ruleset) knows(a netip.Addr) bool { return s.has(familyOf(a).name(setPods), a.String()) }
