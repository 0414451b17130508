// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

const remedyMTU = "Something between the machines has a smaller MTU (a VPN, PPPoE). Set it on the interface that the nodes use, on all nodes: pods follow when Kedge restarts."

// directed tells whether both nodes have said what they heard of the other.
func (f Facts) directed(a, b string) bool {
	ra, rb := f.Reports[a], f.Reports[b]
	return ra != nil && rb != nil && ra.Heard != nil && rb.Heard != nil
}

// passed is what gets through in one direction.
type passed int

const (
	nothing passed = iota
	onlySmall
	everything
)

func (r *NodeReport) heardOf(peer string, v6 bool) passed {
	got := nothing
	for _, h := range r.Heard {
		if h.Peer == peer && h.IPv6 == v6 {
			got = max(got, onlySmall)
			if h.Large {
				got = everything
			}
		}
	}
	return got
}

// judgeOverlay reports the directions of overlay networks that are closed: each once, whichever of its ends has noticed.
func judgeOverlay(f Facts) []Finding {
	var all []Finding
	for _, a := range slices.Sorted(maps.Keys(f.Reports)) {
		for _, b := range slices.Sorted(maps.Keys(f.Reports)) {
			for _, v6 := range []bool{false, true} {
				there, back := f.Reports[a].way(Overlay, b, v6), f.Reports[b].way(Overlay, a, v6)
				if a < b && there != nil && back != nil && there.Error+back.Error != "" && f.directed(a, b) {
					all = append(all, judgePair(f, *there, *back)...)
				}
			}
		}
	}
	return all
}

// judgePair is about two nodes; there is the way from the first to the second.
func judgePair(f Facts, there, back Way) []Finding {
	a, b, v6 := back.Peer, there.Peer, there.Address.Addr().Is6()
	ab, ba := f.Reports[b].heardOf(a, v6), f.Reports[a].heardOf(b, v6)
	port := overlayPort(f.Reports[a], there.Address.Addr())
	finding := func(level Level, from string, way Way, text, remedy string) Finding {
		return Finding{level, from, "ways", fmt.Sprintf("no way to %s of %s (%s): %s", way.Purpose, way.Peer, way.Address.Addr(), text), remedy}
	}
	switch {
	case ab == nothing && ba == nothing:
		remedy := fmt.Sprintf("Open UDP port %s between %s and %s in both directions. Pods of the two nodes do not reach each other.", port, a, b)
		if strings.HasPrefix(port, "5182") {
			remedy += " If one direction is closed, WireGuard sends nothing in the other one either."
		}
		return []Finding{finding(Problem, a, there, "what the nodes send each other arrives in neither direction", remedy)}
	case ab == everything && ba == everything:
		return []Finding{finding(Warning, a, there, "packets arrive in both directions, but a moment before there was no reply to echo requests",
			fmt.Sprintf("Ask again. If it stays so, a firewall on %s or %s drops ICMP that comes out of the overlay network, and perhaps more than that.", a, b))}
	}
	var all []Finding
	for _, d := range []struct {
		from    string
		way     Way
		passed  passed
		reverse passed
	}{{a, there, ab, ba}, {b, back, ba, ab}} {
		switch d.passed {
		case nothing:
			all = append(all, finding(Problem, d.from, d.way, fmt.Sprintf("nothing that %s sends arrives there; what %s sends arrives here", d.from, d.way.Peer),
				fmt.Sprintf("Open UDP port %s from %s to %s: going out on %s, coming in on %s, and in the network between them. The other direction is open. "+
					"Pods of the two nodes do not reach each other until both are.", port, d.from, d.way.Peer, d.from, d.way.Peer)))
		case onlySmall:
			text := fmt.Sprintf("%s: small packets from %s arrive there, those of %d bytes do not", mtuMark, d.from, overlayMTU(f.Reports[d.from].Links, d.way.Address.Addr()))
			if d.reverse == everything {
				text += "; in the other direction both arrive"
			}
			all = append(all, finding(Problem, d.from, d.way, text, remedyMTU))
		}
	}
	return all
}

// overlayPort is the UDP port of a node's overlay network.
func overlayPort(r *NodeReport, to netip.Addr) string {
	switch wireguard := slices.ContainsFunc(r.Links, func(l Link) bool { return strings.HasPrefix(l.Name, "flannel-wg") }); {
	case wireguard && to.Is6():
		return "51821 (WireGuard)"
	case wireguard:
		return "51820 (WireGuard)"
	}
	return "8472 (VXLAN)"
}
