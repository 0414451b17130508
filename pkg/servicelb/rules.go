// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/knftables"
)

// nftTable is the table (family inet) with the rules.
const nftTable = "kedge-lb"

// The base chains are named like their hooks. Their rules come just before kube-proxy's and portmap's.
const (
	prerouting  = "prerouting"
	output      = "output"
	postrouting = "postrouting"
	// refuse is where ports go that nobody would answer on.
	refuse = "refuse"
)

// ruleset is the content of the table. Chains are replaced as a whole; sets keep their elements, which the kernel adds.
type ruleset struct {
	chains []chain
	sets   []*knftables.Set
}

type chain struct {
	name  string
	rules []string
}

// newRuleset translates what a node serves.
func newRuleset(s served, pods []netip.Prefix) ruleset {
	var r ruleset
	verdicts := map[corev1.IPFamily][]string{}
	var masquerade []string
	for _, f := range s.frontends {
		target := refuse
		if len(f.inside)+len(f.outside) > 0 {
			target = f.name()
			r.addFrontend(f, pods)
			masquerade = append(masquerade, f.masquerade(s.of(f.family))...)
		}
		verdicts[f.family] = append(verdicts[f.family], fmt.Sprintf("%s . %d : goto %s", f.protocol, f.port, target))
	}
	var entry []string
	for _, f := range []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol} {
		if len(verdicts[f]) > 0 {
			entry = append(entry, fmt.Sprintf("%s daddr %s meta l4proto . th dport vmap { %s }", ipKeyword(f), set(s.of(f)), strings.Join(verdicts[f], " , ")))
		}
	}
	r.chains = append(r.chains,
		// The match on the state is always true, and switches connection tracking on, without which nothing here runs.
		chain{refuse, []string{"ct state new reject"}},
		chain{prerouting, entry}, chain{output, entry}, chain{postrouting, masquerade})
	return r
}

// addFrontend makes the chains that choose an endpoint.
func (r *ruleset) addFrontend(f frontend, pods []netip.Prefix) {
	name, ip := f.name(), ipKeyword(f.family)
	var rules []string
	if len(f.sources) > 0 {
		rules = append(rules, fmt.Sprintf("fib saddr type != local %s saddr != %s drop", ip, set(f.sources)))
	}
	if f.keep && !slices.Equal(f.inside, f.outside) {
		// For pods and the node itself an address of the Service is the Service, wherever its endpoints are.
		to := "goto " + name + "/inside"
		if own := slices.DeleteFunc(slices.Clone(pods), func(p netip.Prefix) bool { return family(p.Addr()) != f.family }); len(own) > 0 {
			rules = append(rules, fmt.Sprintf("%s saddr %s %s", ip, set(own), to))
		}
		rules = append(rules, "fib saddr type local "+to)
		r.chains = append(r.chains, chain{name + "/inside", r.balance(f, f.inside)})
	}
	r.chains = append(r.chains, chain{name, append(rules, r.balance(f, f.outside)...)})
	if f.affinity > 0 {
		both := slices.Concat(f.inside, f.outside)
		slices.SortFunc(both, netip.AddrPort.Compare)
		for _, e := range slices.Compact(both) {
			r.addSticky(f, e)
		}
	}
}

// balance gives rules that take a new connection to one of the endpoints.
func (r *ruleset) balance(f frontend, endpoints []netip.AddrPort) []string {
	if len(endpoints) == 0 {
		return []string{"drop"} // there are some on other nodes: clients are to try again
	}
	ip, n := ipKeyword(f.family), len(endpoints)
	var rules, choices []string
	for i, e := range endpoints {
		if f.affinity > 0 {
			rules = append(rules, fmt.Sprintf("%s saddr @%s goto %s", ip, f.affinitySet(e), f.stickyChain(e)))
			choices = append(choices, fmt.Sprintf("%d : goto %s", i, f.stickyChain(e)))
		} else {
			choices = append(choices, fmt.Sprintf("%d : %s . %d", i, e.Addr(), e.Port()))
		}
	}
	if f.affinity > 0 {
		return append(rules, fmt.Sprintf("numgen random mod %d vmap { %s }", n, strings.Join(choices, " , ")))
	}
	return append(rules, fmt.Sprintf("meta l4proto %s dnat %s addr . port to numgen random mod %d map { %s }", f.protocol, ip, n, strings.Join(choices, " , ")))
}

// addSticky makes the chain that takes a client to an endpoint and remembers that, as kube-proxy's nftables mode does it.
func (r *ruleset) addSticky(f frontend, e netip.AddrPort) {
	typ := "ipv4_addr"
	if f.family == corev1.IPv6Protocol {
		typ = "ipv6_addr"
	}
	r.sets = append(r.sets, &knftables.Set{
		Name: f.affinitySet(e), Type: typ, Flags: []knftables.SetFlag{knftables.DynamicFlag, knftables.TimeoutFlag},
		Timeout: ptr.To(secondsOf(f.affinity)),
	})
	r.chains = append(r.chains, chain{f.stickyChain(e), []string{
		fmt.Sprintf("update @%s { %s saddr }", f.affinitySet(e), ipKeyword(f.family)),
		fmt.Sprintf("meta l4proto %s dnat %s to %s", f.protocol, ipKeyword(f.family), e),
	}})
}

func (f frontend) stickyChain(e netip.AddrPort) string {
	return fmt.Sprintf("%s/%s/%d", f.name(), strings.ReplaceAll(e.Addr().String(), ":", "."), e.Port())
}

// affinitySet has the time in its name: that of a set cannot be changed.
func (f frontend) affinitySet(e netip.AddrPort) string {
	return fmt.Sprintf("%s/%d", f.stickyChain(e), f.affinity)
}

// masquerade gives the rules for connections whose client has to be hidden behind the node's address, so that the answers come back
// through this node: all of them unless the client's address is to be kept, and then those of the node itself, and of pods that
// reach themselves.
func (f frontend) masquerade(own []netip.Addr) []string {
	ip := ipKeyword(f.family)
	match := fmt.Sprintf("ct status dnat meta l4proto %s ct original %s daddr %s ct original proto-dst %d ", f.protocol, ip, set(own), f.port)
	if !f.keep {
		return []string{match + "masquerade fully-random"}
	}
	rules := []string{match + "fib saddr type local masquerade fully-random"}
	var pairs []string
	for _, e := range f.inside {
		pairs = append(pairs, fmt.Sprintf("%s . %s", e.Addr(), e.Addr()))
	}
	for _, e := range f.outside {
		pairs = append(pairs, fmt.Sprintf("%s . %s", e.Addr(), e.Addr()))
	}
	slices.Sort(pairs)
	return append(rules, fmt.Sprintf("%s%s saddr . %s daddr { %s } masquerade fully-random", match, ip, ip, strings.Join(slices.Compact(pairs), ", ")))
}

// set is an anonymous set.
func set[T fmt.Stringer](elements []T) string {
	var texts []string
	for _, e := range elements {
		texts = append(texts, e.String())
	}
	return "{ " + strings.Join(texts, ", ") + " }"
}

// transaction brings the table from what it has to r, in one step. What the kernel has added to sets stays.
func (r ruleset) transaction(nft knftables.Interface, have existing) *knftables.Transaction {
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{Comment: ptr.To("ports of LoadBalancer services on this node's addresses")})
	keep := map[string]bool{}
	for _, s := range r.sets {
		keep[s.Name] = true
		tx.Add(s)
	}
	for _, c := range r.chains {
		keep[c.name] = true
		tx.Add(baseChain(c.name))
		tx.Flush(&knftables.Chain{Name: c.name})
	}
	for _, c := range r.chains {
		for _, rule := range c.rules {
			tx.Add(&knftables.Rule{Chain: c.name, Rule: rule})
		}
	}
	gone := func(name string) bool { return keep[name] }
	stale := slices.DeleteFunc(have.chains, gone)
	for _, name := range stale {
		tx.Flush(&knftables.Chain{Name: name})
	}
	for _, name := range stale {
		tx.Delete(&knftables.Chain{Name: name})
	}
	for _, name := range slices.DeleteFunc(have.sets, gone) {
		tx.Delete(&knftables.Set{Name: name})
	}
	return tx
}

// baseChain is a chain, with a hook if it has the name of one.
func baseChain(name string) *knftables.Chain {
	priority := map[string]string{prerouting: "-101", output: "-101", postrouting: "99"}[name]
	if priority == "" {
		return &knftables.Chain{Name: name}
	}
	return &knftables.Chain{
		Name: name, Type: ptr.To(knftables.NATType), Hook: ptr.To(knftables.BaseChainHook(name)), Priority: ptr.To(knftables.BaseChainPriority(priority)),
	}
}

// existing is what is in the table now.
type existing struct{ chains, sets []string }

func list(ctx context.Context, nft knftables.Interface) (existing, error) {
	all, err := nft.ListAll(ctx)
	if knftables.IsNotFound(err) {
		return existing{}, nil
	}
	return existing{all["chain"], all["set"]}, err
}

// removeTable removes the table, if there is one.
func removeTable(ctx context.Context, nft knftables.Interface) error {
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{})
	tx.Delete(&knftables.Table{})
	if err := nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("remove nftables table inet %s: %w", nftTable, err)
	}
	return nil
}

func secondsOf(n int32) time.Duration { return time.Duration(n) * time.Second }
