// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"fmt"
	"slices"
)

// baseRules are those of the chains on hooks. They decide about new connections only, cheapest first.
func baseRules(w world) map[string][]baseRule {
	replies := baseRule{"ct state established,related accept", "replies"}
	postrouting, input := []baseRule{replies, {"fib saddr type local accept", "from the node"}}, []baseRule{replies, {`iifname "lo" accept`, "the node to itself"}}
	base := map[string][]baseRule{}
	if slices.Contains(w.families, v6) {
		// Linux itself drops IPv4 packets that come in from one of its own addresses, and lets those of IPv6 pass.
		spoofed := baseRule{"meta nfproto ipv6 fib saddr type local counter drop", "from an address of the node, but not from the node"}
		base["forward"] = []baseRule{replies, spoofed}
		spoofed.text = `iifname "veth*" ` + spoofed.text
		input = append(input, baseRule{"icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } accept", "without these there is no IPv6"}, spoofed)
	}
	for _, f := range w.families {
		postrouting = append(postrouting, unknown(w, f, "saddr")...)
		postrouting = append(postrouting, unknown(w, f, "daddr")...)
		input = append(input, unknown(w, f, "saddr")...)

		ip := f.ip()
		midstream := baseRule{
			fmt.Sprintf("%s saddr @%s ct state new tcp flags & (syn | ack) != syn counter drop", ip, f.name(setIngress)), "answer of a connection that was cut",
		}
		late := baseRule{fmt.Sprintf("%[1]s saddr . udp sport . %[1]s daddr . udp dport @%[2]s counter drop", ip, f.name(setCut)), midstream.comment}
		postrouting = append(postrouting,
			baseRule{fmt.Sprintf("%[1]s saddr . %[1]s daddr @%[2]s accept", ip, f.name(setSelf)), "a pod to itself"},
			midstream, late,
			baseRule{fmt.Sprintf("%s daddr @%s ct state new tcp flags & (syn | ack) != syn counter drop", ip, f.name(setEgress)), midstream.comment},
			baseRule{fmt.Sprintf("%s saddr vmap @%s", ip, f.name(mapEgress)), ""},
			baseRule{fmt.Sprintf("%s daddr vmap @%s", ip, f.name(mapIngress)), ""},
		)
		input = append(input, midstream, late, baseRule{fmt.Sprintf("%s saddr vmap @%s", ip, f.name(mapEgress)), ""})
	}
	base["postrouting"], base["input"] = postrouting, input
	return base
}

// unknown drops packets of addresses that are for this node's pods, but of no pod that was announced.
func unknown(w world, f family, field string) (rules []baseRule) {
	for _, cidr := range w.podCIDRs {
		if familyOf(cidr.Addr()) == f {
			rules = append(rules, baseRule{
				fmt.Sprintf("%[1]s %[2]s %[3]s %[1]s %[2]s != @%[4]s counter drop", f.ip(), field, cidr, f.name(setPods)), "of no pod that Kedge knows",
			})
		}
	}
	return rules
}
