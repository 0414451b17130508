// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// cut ends established connections of pods for which something has changed, if the rules do not allow them any more. Rules only see the
// first packet of a connection.
func (k *kernel) cut(ctx context.Context, before, after *ruleset) error {
	var errs []error
	for _, f := range []family{v4, v6} {
		touched := touchedBy(before, after, f)
		if len(touched) == 0 {
			continue
		}
		local, err := localAddresses()
		if err != nil {
			return err
		}
		errs = append(errs, k.cutFamily(ctx, f, forbidden{after, touched, local}))
	}
	return errors.Join(errs...)
}

const (
	// cutPause is between looking for connections, and three times that before the last time.
	cutPause = 50 * time.Millisecond
	// cutRounds bounds how often it is looked, if there is always something.
	cutRounds = 10
	// cutMemory is for how long late answers of what was cut are dropped.
	cutMemory = 30 * time.Second
)

// cutFamily ends what is forbidden, until twice nothing was left.
//
// An answer that comes after its connection was deleted would make a connection of its own, of which what comes from the other side is an
// answer: it would go on, if the pod may send where it will. So answers are dropped before connections are deleted: TCP's, which go on in
// the middle of something, by a rule, and those over UDP by what they are sent from and to.
func (k *kernel) cutFamily(ctx context.Context, f family, x forbidden) error {
	inet := netlink.InetFamily(unix.AF_INET)
	if f == v6 {
		inet = unix.AF_INET6
	}
	calm := 0
	for round := range cutRounds {
		if round > 0 {
			time.Sleep(cutPause * time.Duration(1+2*calm))
		}
		list, err := netlink.ConntrackTableList(netlink.ConntrackTable, inet)
		interrupted := errors.Is(err, netlink.ErrDumpInterrupted) // some may have been left out
		if err != nil && !interrupted {
			return err
		}
		found, answers := x.among(list)
		if len(found) > 0 {
			silenced := k.silence(ctx, f, answers)
			_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, inet, found)
			if errors.Is(err, netlink.ErrDumpInterrupted) {
				interrupted, err = true, nil
			}
			if err := errors.Join(silenced, err); err != nil {
				return err
			}
		}
		switch {
		case len(found) > 0 || interrupted:
			calm = 0
		case round == 0 || calm == 1:
			return nil
		default:
			calm++
		}
	}
	return nil
}

// touchedBy gives the addresses of pods to which less may be allowed than before. A first load, of which nobody knows what was before it,
// touches all.
func touchedBy(before, after *ruleset, f family) map[netip.Addr]bool {
	touched := map[netip.Addr]bool{}
	touch := func(address string) {
		if a, err := netip.ParseAddr(address); err == nil {
			touched[a] = true
		}
	}
	var pods, shrunk map[string]string
	if before != nil {
		pods, shrunk = before.sets[f.name(setPods)].elems, shrunkSets(before, after)
	}
	for address := range pods {
		if !after.has(f.name(setPods), address) {
			touch(address) // it may be another pod's soon
		}
	}
	for _, name := range []string{mapIngress, mapEgress} {
		var chains map[string]string
		if before != nil {
			chains = before.sets[f.name(name)].elems
		}
		for address, chain := range after.sets[f.name(name)].elems {
			if chains[address] != chain || slices.ContainsFunc(after.chains[chain], func(r rule) bool { return has(shrunk, r.peers) || has(shrunk, r.named) }) {
				touch(address)
			}
		}
	}
	return touched
}

func has(m map[string]string, key string) bool { _, ok := m[key]; return ok }

// shrunkSets have lost an element.
func shrunkSets(before, after *ruleset) map[string]string {
	shrunk := map[string]string{}
	for name, b := range before.sets {
		a, ok := after.sets[name]
		if !ok {
			continue
		}
		for key := range b.elems {
			if !has(a.elems, key) {
				shrunk[name] = ""
				break
			}
		}
	}
	return shrunk
}

// forbidden selects the connections to cut.
type forbidden struct {
	rules   *ruleset
	touched map[netip.Addr]bool
	local   map[netip.Addr]bool // the node's own addresses
}

// ends of a connection, as its first packet has them.
type ends struct {
	protocol         uint8
	from, to         netip.Addr
	fromPort, toPort uint16
}

func endsOf(t netlink.IPTuple) ends {
	from, _ := netip.AddrFromSlice(t.SrcIP)
	to, _ := netip.AddrFromSlice(t.DstIP)
	return ends{t.Protocol, from.Unmap(), to.Unmap(), t.SrcPort, t.DstPort}
}

// connections to delete.
type connections map[ends]bool

// MatchConntrackFlow implements [netlink.CustomConntrackFilter].
func (c connections) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	return c[endsOf(flow.Forward)]
}

// among gives the connections to cut, and the answers that those over UDP would have.
func (x forbidden) among(list []*netlink.ConntrackFlow) (found connections, answers []ends) {
	found = connections{}
	for _, c := range list {
		f, ok := flowOf(c)
		if !ok || !x.touched[f.from] && !x.touched[f.to] || x.allowed(f) {
			continue
		}
		found[endsOf(c.Forward)] = true
		if c.Reverse.Protocol == unix.IPPROTO_UDP {
			answers = append(answers, endsOf(c.Reverse))
		}
	}
	return found, answers
}

func (x forbidden) allowed(f flow) bool {
	for _, d := range directions() {
		pod := f.side(d)
		if x.touched[pod] && !x.rules.knows(pod) {
			return false // no pod any more
		}
		if d == ingress && x.local[f.from] {
			continue // from the node
		}
		if !x.rules.decide(d, f).Allowed {
			return false
		}
	}
	return true
}

// flowOf gives a connection with the addresses that rules see: of the answers' tuple the source is what DNAT has made of the destination.
func flowOf(c *netlink.ConntrackFlow) (f flow, ok bool) {
	from, ok1 := netip.AddrFromSlice(c.Forward.SrcIP)
	to, ok2 := netip.AddrFromSlice(c.Reverse.SrcIP)
	f = flow{from: from.Unmap(), to: to.Unmap(), proto: protocolName(fmt.Sprint(c.Forward.Protocol)), port: c.Reverse.SrcPort}
	return f, ok1 && ok2
}

// localAddresses of this machine.
func localAddresses() (map[netip.Addr]bool, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("the machine's addresses: %w", err)
	}
	local := map[netip.Addr]bool{}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			local[ip.Unmap()] = true
		}
	}
	return local, nil
}
