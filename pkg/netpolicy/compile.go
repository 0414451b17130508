// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// pod is what policies can see of a pod. Pods with hostNetwork and finished ones are none.
type pod struct {
	namespace, name string
	labels          labels.Set
	addrs           []netip.Addr
	ports           []namedPort
	local           bool // on this node
}

type namedPort struct {
	Name     string `json:"name"`
	Protocol string `json:"protocol"` // as nft calls it
	Port     uint16 `json:"port"`
}

// world is what the rules are made from.
type world struct {
	policies   []*networkingv1.NetworkPolicy
	namespaces map[string]labels.Set
	pods       []pod
	known      []netip.Addr   // of this node's pods, with those to which no policy can apply
	podCIDRs   []netip.Prefix // of this node
	families   []family
}

// compile makes the rules for a world.
func compile(w world) *ruleset {
	c := &compiler{
		world:       w,
		out:         &ruleset{base: baseRules(w), chains: map[string][]rule{}, sets: map[string]set{}},
		byNamespace: map[string][]pod{},
		rules:       map[string][]rule{},
	}
	for _, p := range w.pods {
		c.byNamespace[p.namespace] = append(c.byNamespace[p.namespace], p)
	}
	c.fixedSets()
	c.isolate()
	return c.out
}

type compiler struct {
	world
	out         *ruleset
	byNamespace map[string][]pod
	rules       map[string][]rule // direction and policy → its rules
}

func (c *compiler) fixedSets() {
	for _, f := range c.families {
		addr := f.addrType()
		for _, name := range []string{setPods, setIngress, setEgress} {
			c.out.sets[f.name(name)] = set{typ: addr, elems: map[string]string{}}
		}
		c.out.sets[f.name(setCut)] = set{typ: strings.Join([]string{addr, "inet_service", addr, "inet_service"}, " . "), keep: cutMemory}
		c.out.sets[f.name(setSelf)] = set{typ: addr + " . " + addr, elems: map[string]string{}}
		for _, name := range []string{mapIngress, mapEgress} {
			c.out.sets[f.name(name)] = set{typ: addr, isMap: true, elems: map[string]string{}}
		}
	}
	for _, a := range c.known {
		c.add(setPods, a, a.String(), "")
	}
}

// add an element to one of the fixed sets. Addresses of a family that the cluster does not have are left out.
func (c *compiler) add(name string, a netip.Addr, key, value string) {
	if s, ok := c.out.sets[familyOf(a).name(name)]; ok {
		s.elems[key] = value
	}
}

// isolate finds the policies of each local pod and points its addresses to the chain of just these policies.
func (c *compiler) isolate() {
	type subject struct {
		*networkingv1.NetworkPolicy
		selector labels.Selector
	}
	byNamespace := map[string][]subject{}
	for _, p := range c.policies {
		byNamespace[p.Namespace] = append(byNamespace[p.Namespace], subject{p, selectorOf(&p.Spec.PodSelector)})
	}
	for _, subjects := range byNamespace {
		slices.SortFunc(subjects, func(a, b subject) int { return cmp.Compare(a.Name, b.Name) })
	}
	for _, p := range c.pods {
		if !p.local {
			continue
		}
		for _, d := range directions() {
			var rules []rule
			for _, s := range byNamespace[p.namespace] {
				if applies(s.NetworkPolicy, d) && s.selector.Matches(p.labels) {
					rules = append(rules, c.policy(s.NetworkPolicy, d)...)
				}
			}
			if len(rules) > 0 {
				c.point(p, d, append(rules, rule{verdict: verdictDrop}))
			}
		}
	}
}

func (c *compiler) point(p pod, d direction, rules []rule) {
	name := chainName(d, rules)
	c.out.chains[name] = rules
	addrs, chains := setIngress, mapIngress
	if d == egress {
		addrs, chains = setEgress, mapEgress
	}
	for _, a := range p.addrs {
		c.add(addrs, a, a.String(), "")
		c.add(chains, a, a.String(), name)
		c.add(setSelf, a, a.String()+" . "+a.String(), "")
	}
}

// applies tells whether a policy isolates the pods that it selects in a direction.
func applies(p *networkingv1.NetworkPolicy, d direction) bool {
	if len(p.Spec.PolicyTypes) == 0 {
		return d == ingress || len(p.Spec.Egress) > 0
	}
	want := networkingv1.PolicyTypeIngress
	if d == egress {
		want = networkingv1.PolicyTypeEgress
	}
	return slices.Contains(p.Spec.PolicyTypes, want)
}

// policy gives the rules of a policy in a direction; one that allows nothing has a rule that says that it is there.
func (c *compiler) policy(p *networkingv1.NetworkPolicy, d direction) []rule {
	key := string(d) + " " + p.Namespace + "/" + p.Name
	if rules, ok := c.rules[key]; ok {
		return rules
	}
	var rules []rule
	if d == ingress {
		for _, r := range p.Spec.Ingress {
			rules = append(rules, c.combine(c.peers(p.Namespace, r.From), r.Ports)...)
		}
	} else {
		for _, r := range p.Spec.Egress {
			rules = append(rules, c.combine(c.peers(p.Namespace, r.To), r.Ports)...)
		}
	}
	if len(rules) == 0 {
		rules = []rule{{verdict: verdictNone}}
	}
	for i := range rules {
		if rules[i].verdict == "" {
			rules[i].verdict = d.allow()
		}
		rules[i].comment = comment(p.Namespace + "/" + p.Name)
	}
	c.rules[key] = rules
	return rules
}

// combine makes a rule of each alternative of peers with each of ports.
func (c *compiler) combine(peers []rule, ports []networkingv1.NetworkPolicyPort) []rule {
	var all []rule
	for _, r := range peers {
		all = append(all, c.ports(r, ports)...)
	}
	return all
}

// peers gives one rule for each way in which the other side can be one of peers.
func (c *compiler) peers(namespace string, peers []networkingv1.NetworkPolicyPeer) []rule {
	if len(peers) == 0 {
		return []rule{{}}
	}
	var selectors []peerSelector
	blocks := map[family][]addrRange{}
	for _, p := range peers {
		if p.IPBlock != nil {
			addBlock(blocks, p.IPBlock)
			continue
		}
		s := peerSelector{namespace: namespace, pods: labels.Everything()}
		if p.NamespaceSelector != nil {
			s.namespace, s.namespaces = "", selectorOf(p.NamespaceSelector)
		}
		if p.PodSelector != nil {
			s.pods = selectorOf(p.PodSelector)
		}
		selectors = append(selectors, s)
	}
	var rules []rule
	for _, f := range c.families {
		if len(selectors) > 0 {
			rules = append(rules, rule{family: f, peers: c.peerSet(f, selectors)})
		}
		if len(blocks[f]) > 0 {
			rules = append(rules, rule{family: f, ranges: mergeAddrs(blocks[f])})
		}
	}
	return rules
}

// addBlock adds the addresses of an ipBlock. The API server has looked at the notation.
func addBlock(blocks map[family][]addrRange, b *networkingv1.IPBlock) {
	block, err := netip.ParsePrefix(b.CIDR)
	if err != nil {
		return
	}
	ranges := []addrRange{rangeOf(block)}
	for _, e := range b.Except {
		except, err := netip.ParsePrefix(e)
		if err != nil {
			return
		}
		var rest []addrRange
		for _, r := range ranges {
			rest = append(rest, r.without(rangeOf(except))...)
		}
		ranges = rest
	}
	f := familyOf(block.Addr())
	blocks[f] = append(blocks[f], ranges...)
}

// peerSelector selects pods, of one namespace or of those that a selector selects.
type peerSelector struct {
	namespace  string
	namespaces labels.Selector
	pods       labels.Selector
}

func (s peerSelector) String() string {
	if s.namespaces == nil {
		return fmt.Sprintf("in %s: %s", s.namespace, s.pods)
	}
	return fmt.Sprintf("in those with %s: %s", s.namespaces, s.pods)
}

// peerSet gives the set with the addresses of the pods that any of selectors selects.
func (c *compiler) peerSet(f family, selectors []peerSelector) string {
	keys := make([]string, len(selectors))
	for i, s := range selectors {
		keys[i] = s.String()
	}
	slices.Sort(keys)
	name := fmt.Sprintf("peers%d-%s", f, digest(strings.Join(slices.Compact(keys), "\n")))
	if _, ok := c.out.sets[name]; ok {
		return name
	}
	elems := map[string]string{}
	for _, s := range selectors {
		for namespace, pods := range c.byNamespace {
			if s.namespaces == nil && namespace != s.namespace || s.namespaces != nil && !c.selects(s.namespaces, namespace) {
				continue
			}
			for _, p := range pods {
				if s.pods.Matches(p.labels) {
					p.each(f, func(a netip.Addr) { elems[a.String()] = "" })
				}
			}
		}
	}
	c.out.sets[name] = set{typ: f.addrType(), elems: elems}
	return name
}

func (c *compiler) selects(s labels.Selector, namespace string) bool {
	set, ok := c.namespaces[namespace]
	return ok && s.Matches(set)
}

func (p pod) each(f family, do func(netip.Addr)) {
	for _, a := range p.addrs {
		if familyOf(a) == f {
			do(a)
		}
	}
}

// ports gives one rule for each way in which the destination can be one of ports.
func (c *compiler) ports(base rule, ports []networkingv1.NetworkPolicyPort) []rule {
	if len(ports) == 0 {
		return []rule{base}
	}
	numbers := map[string][]portRange{}
	var rules []rule
	for _, p := range ports {
		proto := protocolOf(p.Protocol)
		switch {
		case p.Port == nil:
			r := base
			r.proto = proto
			rules = append(rules, r)
		case p.Port.Type == intstr.Int:
			r := portRange{uint16(p.Port.IntVal), uint16(p.Port.IntVal)}
			if p.EndPort != nil {
				r.to = uint16(*p.EndPort)
			}
			numbers[proto] = append(numbers[proto], r)
		default:
			rules = append(rules, c.named(base, namedPort{Name: p.Port.StrVal, Protocol: proto})...)
		}
	}
	for _, proto := range protocols() {
		if len(numbers[proto]) > 0 {
			r := base
			r.proto, r.ports = proto, mergePorts(numbers[proto])
			rules = append(rules, r)
		}
	}
	return rules
}

// named makes rules for a port by name: each pod that can be a destination may have another number for it.
func (c *compiler) named(base rule, port namedPort) []rule {
	var rules []rule
	for _, f := range c.families {
		if base.family == 0 || base.family == f {
			r := base
			r.family, r.named = f, c.namedSet(f, port)
			rules = append(rules, r)
		}
	}
	return rules
}

func (c *compiler) namedSet(f family, port namedPort) string {
	name := fmt.Sprintf("ports%d-%s", f, digest(port.Name+" "+port.Protocol))
	if _, ok := c.out.sets[name]; ok {
		return name
	}
	elems := map[string]string{}
	for _, p := range c.pods {
		for _, have := range p.ports {
			if have.Name == port.Name && have.Protocol == port.Protocol {
				p.each(f, func(a netip.Addr) { elems[fmt.Sprintf("%s . %s . %d", a, have.Protocol, have.Port)] = "" })
			}
		}
	}
	c.out.sets[name] = set{typ: f.addrType() + " . inet_proto . inet_service", elems: elems}
	return name
}

// protocols are those that policies know, as nft calls them.
func protocols() []string { return []string{"tcp", "udp", "sctp"} }

func protocolOf(p *corev1.Protocol) string {
	if p == nil || *p == "" {
		return "tcp"
	}
	return strings.ToLower(string(*p))
}

// selectorOf a selector that the API server has validated: one that is not valid all the same selects nothing.
func selectorOf(s *metav1.LabelSelector) labels.Selector {
	selector, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return labels.Nothing()
	}
	return selector
}

// comment names a policy within what nft has room for.
func comment(policy string) string {
	const most = 128
	if len(policy) <= most {
		return policy
	}
	return policy[:most-17] + "~" + digest(policy)
}
