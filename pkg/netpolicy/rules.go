// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// direction of traffic as a pod sees it.
type direction string

const (
	ingress direction = "ingress"
	egress  direction = "egress"
)

func directions() []direction { return []direction{ingress, egress} }

// peer is the header field with the other side's address.
func (d direction) peer() string {
	if d == ingress {
		return "saddr"
	}
	return "daddr"
}

// allow is the verdict of a rule that matches. Egress is decided first, and what it allows has to be looked at as ingress, too, when both
// pods are on this node.
func (d direction) allow() string {
	if d == ingress {
		return "accept"
	}
	return "return"
}

// family of addresses.
type family int

const (
	v4 family = 4
	v6 family = 6
)

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return v4
	}
	return v6
}

// ip is how nft calls the header.
func (f family) ip() string {
	if f == v6 {
		return "ip6"
	}
	return "ip"
}

// addrType is how nft calls an address in the type of a set.
func (f family) addrType() string { return fmt.Sprintf("ipv%d_addr", f) }

// Sets and maps that are always there, one for each family.
const (
	setPods    = "pods"    // addresses of this node's pods; others of the node's range may not send or receive
	setSelf    = "self"    // pairs of the same address: what an isolated pod sends to itself by way of a service
	setIngress = "to"      // addresses with isolation of ingress
	setEgress  = "from"    // and of egress
	mapIngress = "ingress" // address → chain
	mapEgress  = "egress"
	setCut     = "cut" // answers that UDP connections would have had which were cut; for cutMemory, and no part of what is compared
)

func (f family) name(set string) string { return fmt.Sprintf("%s%d", set, f) }

// set is a set, or a map whose values are verdicts.
type set struct {
	typ   string
	elems map[string]string // key → chain to jump to; without a value in a set
	isMap bool
	keep  time.Duration // how long elements stay; they come and go beside elems
}

// addrRange is inclusive.
type addrRange struct{ from, to netip.Addr }

func (r addrRange) String() string {
	if r.from == r.to {
		return r.from.String()
	}
	return r.from.String() + "-" + r.to.String()
}

// portRange is inclusive.
type portRange struct{ from, to uint16 }

func (r portRange) String() string {
	if r.from == r.to {
		return fmt.Sprint(r.from)
	}
	return fmt.Sprintf("%d-%d", r.from, r.to)
}

// Verdicts besides those of direction.allow.
const (
	verdictDrop = "drop"     // with a counter
	verdictNone = "continue" // only says with its comment that a policy applies
)

// rule is one of a chain that policies make. Its conditions all have to hold; what is empty is not looked at.
type rule struct {
	family  family
	peers   string      // set of addresses of the other side
	ranges  []addrRange // or its addresses
	proto   string
	ports   []portRange
	named   string // set of address, protocol and port of destinations
	verdict string
	comment string // the policy
}

// text is the rule in nft's language.
func (r rule) text(d direction) string {
	var b []string
	ip := r.family.ip()
	if r.peers != "" {
		b = append(b, ip, d.peer(), "@"+r.peers)
	}
	if len(r.ranges) > 0 {
		b = append(b, ip, d.peer(), list(r.ranges))
	}
	switch {
	case r.named != "":
		b = append(b, ip, "daddr . meta l4proto . th dport @"+r.named)
	case len(r.ports) > 0:
		b = append(b, r.proto, "dport", list(r.ports))
	case r.proto != "":
		b = append(b, "meta l4proto", r.proto)
	}
	if r.verdict == verdictDrop {
		b = append(b, "counter")
	}
	return strings.Join(append(b, r.verdict), " ")
}

func list[T fmt.Stringer](items []T) string {
	texts := make([]string, len(items))
	for i, item := range items {
		texts[i] = item.String()
	}
	return "{ " + strings.Join(texts, ", ") + " }"
}

// baseRule is a rule of a chain on a hook.
type baseRule struct{ text, comment string }

// ruleset is all of the table. Chains and sets of policies are named after what they are made from, so that a name that is there already
// needs no comparison of what it stands for, and a changed policy is a new chain which pods move to in one step.
type ruleset struct {
	base   map[string][]baseRule // chain, named like its hook → rules
	chains map[string][]rule
	sets   map[string]set
}

// identity names the fixed part, whose rules are not compared one by one.
func (s *ruleset) identity() string {
	var b strings.Builder
	for _, chain := range slices.Sorted(maps.Keys(s.base)) {
		fmt.Fprintln(&b, chain, s.base[chain])
	}
	return "kedge " + digest(b.String())
}

func digest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:8])
}

// chainName gives the name of a chain with these rules.
func chainName(d direction, rules []rule) string {
	var b strings.Builder
	for _, r := range rules {
		fmt.Fprintln(&b, r.text(d), r.comment)
	}
	return string(d) + "-" + digest(b.String())
}

// directionOf a chain that policies made.
func directionOf(chain string) (direction, bool) {
	for _, d := range directions() {
		if strings.HasPrefix(chain, string(d)+"-") {
			return d, true
		}
	}
	return "", false
}

// priority of the chain on a hook. In postrouting destinations are real already, in any mode of kube-proxy, and sources still are: SNAT is
// at 100. In input IPVS has taken its packets out: it is at 99.
func priority(hook string) string {
	switch hook {
	case "postrouting":
		return "95"
	case "input":
		return "110"
	}
	return "0"
}
