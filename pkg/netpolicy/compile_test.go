// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/knftables"

	"github.com/kedge-io/kedge/tests/golden"
	"github.com/kedge-io/kedge/tests/netns"
)

// sample is a node with two pods, a pod elsewhere, and the cluster's DNS.
func sample(families ...family) world {
	web := []namedPort{{"web", "tcp", 8080}, {"metrics", "tcp", 9090}}
	w := world{
		families:   families,
		namespaces: map[string]labels.Set{"a": {"team": "a"}, "b": {"team": "b"}, "kube-system": {"kubernetes.io/metadata.name": "kube-system"}},
		podCIDRs:   []netip.Prefix{netip.MustParsePrefix("10.42.0.0/24"), netip.MustParsePrefix("fd00:42::/64")},
		known:      addrsOf([]string{"10.42.0.2", "fd00:42::2", "10.42.0.3", "fd00:42::3"}),
		pods: []pod{
			{namespace: "a", name: "one", labels: labels.Set{"app": "one"}, addrs: addrsOf([]string{"10.42.0.2", "fd00:42::2"}), ports: web, local: true},
			{namespace: "a", name: "two", labels: labels.Set{"app": "two"}, addrs: addrsOf([]string{"10.42.0.3", "fd00:42::3"}), local: true},
			{namespace: "b", name: "far", labels: labels.Set{"app": "one"}, addrs: addrsOf([]string{"10.42.1.2", "fd00:42:0:1::2"}), ports: web},
		},
	}
	c := Controller{cfg: Config{ClusterDNS: addrsOf([]string{"10.43.0.10"})}}
	w.pods = append(w.pods, c.dnsPod())
	return w
}

func samples() map[string][]string {
	return map[string][]string{
		"none":         nil,
		"deny-ingress": {denyIngress},
		"deny-both":    {`{podSelector: {}, policyTypes: [Ingress, Egress]}`},
		"allow-all":    {`{podSelector: {}, ingress: [{}], egress: [{}]}`},
		"peers": {`
podSelector: {matchLabels: {app: one}}
ingress:
- from: [{podSelector: {}}, {namespaceSelector: {matchLabels: {team: b}}, podSelector: {matchExpressions: [{key: app, operator: In, values: [one, six]}]}}]
- from: [{namespaceSelector: {}}]
- from: [{ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.0/30, 192.0.2.255/32]}}, {ipBlock: {cidr: 192.0.2.2/32}}, {ipBlock: {cidr: "2001:db8::/32"}}]`},
		"ports": {`
podSelector: {}
policyTypes: [Egress]
egress:
- ports: [{port: 80}, {port: 81}, {port: 8000, endPort: 8010}, {protocol: UDP, port: 53}, {protocol: SCTP}, {port: web}]
- to: [{podSelector: {matchLabels: {app: one}}}]
  ports: [{port: metrics}]
- to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}, podSelector: {matchLabels: {k8s-app: kube-dns}}}]
  ports: [{port: dns, protocol: UDP}, {port: dns-tcp}]`},
		"several": {denyIngress, `{podSelector: {matchLabels: {app: two}}, ingress: [{ports: [{port: 80}]}]}`, `{podSelector: {matchLabels: {app: none}}, policyTypes: [Egress]}`},
	}
}

func sampleRules(t testing.TB, specs []string, families ...family) *ruleset {
	w := sample(families...)
	for i, spec := range specs {
		w.policies = append(w.policies, policyOf(t, "a", fmt.Sprint("policy-", i), spec))
	}
	return compile(w)
}

func TestRules(t *testing.T) {
	for name, specs := range samples() {
		families := []family{v4, v6}
		if name == "ports" || name == "none" {
			families = families[:1]
		}
		t.Run(name, func(t *testing.T) {
			fake := knftables.NewFake(knftables.InetFamily, table)
			want := sampleRules(t, specs, families...)
			for range 2 { // loading again gives the same
				must(t, fake.Run(context.Background(), replace(fake, want)))
			}
			golden.Compare(t, "testdata/"+name+".nft", fake.Dump())
		})
	}
}

// TestKernelKeeps: what the kernel lists is what was loaded, and every sample leads to every other one by differences.
func TestKernelKeeps(t *testing.T) {
	netns.NeedNode(t)
	t.Cleanup(func() { must(t, Cleanup(context.Background())) })
	k, err := newKernel()
	must(t, err)
	names := []string{"none", "peers", "ports", "deny-both", "several", "allow-all", "deny-ingress", "peers", "several", "none"}
	for i, name := range names {
		want := sampleRules(t, samples()[name], v4, v6)
		before, err := k.load(t.Context(), want)
		must(t, err)
		if (before == nil) != (i == 0) {
			t.Errorf("%s: before: %v", name, before)
		}
		must(t, k.silence(t.Context(), v4, []ends{{from: addr("10.42.0.2"), to: addr("10.42.0.3"), fromPort: 53, toPort: 40000}}))
		must(t, k.silence(t.Context(), v6, []ends{{from: addr("fd00:42::2"), to: addr("fd00:42::3"), fromPort: 53, toPort: 40000}}))
		have, err := k.takeOver(t.Context(), want)
		must(t, err)
		if !equal(have, want) {
			t.Errorf("%s: the kernel has something else: %s", name, change(k.nft, have, want))
		}
		if ok, err := k.intact(); !ok || err != nil {
			t.Errorf("%s: intact: %v, %v", name, ok, err)
		}
	}
	// Without names of protocols, as on a machine without /etc/protocols.
	out, err := exec.Command(k.path, "-j", "-nn", "list", "table", "inet", table).Output()
	must(t, err)
	_, _, err = parseTable(out)
	must(t, err)

	// One who meddles is found out at the next full comparison.
	want := sampleRules(t, samples()["peers"], v4, v6)
	_, err = k.load(t.Context(), want)
	must(t, err)
	for chain := range want.chains {
		must(t, exec.Command(k.path, "insert", "rule", "inet", table, chain, "accept").Run())
	}
	if _, err := k.takeOver(t.Context(), want); err == nil {
		t.Error("a rule that another program added is taken over")
	}
	k.loaded = nil
	before, err := k.load(t.Context(), want)
	must(t, err)
	if before != nil {
		t.Error("not replaced")
	}
	have, err := k.takeOver(t.Context(), want)
	must(t, err)
	if !equal(have, want) {
		t.Error("not replaced")
	}
}

func TestComment(t *testing.T) {
	long := strings.Repeat("n", 63) + "/" + strings.Repeat("p", 253)
	if c := comment(long); len(c) > knftables.CommentLengthMax || c == comment(long+"p") {
		t.Error(c)
	}
	if c := comment("a/b"); c != "a/b" {
		t.Error(c)
	}
}

func TestApplies(t *testing.T) {
	for spec, want := range map[string]string{
		`{podSelector: {}}`:                                     "ingress",
		`{podSelector: {}, egress: [{}]}`:                       "ingress egress",
		`{podSelector: {}, policyTypes: [Egress]}`:              "egress",
		`{podSelector: {}, policyTypes: [Ingress], egress: []}`: "ingress",
	} {
		p := policyOf(t, "a", "p", spec)
		var got []string
		for _, d := range directions() {
			if applies(p, d) {
				got = append(got, string(d))
			}
		}
		if s := strings.Join(got, " "); s != want {
			t.Errorf("%s: %s, want %s", spec, s, want)
		}
	}
}
