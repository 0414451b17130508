// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/kedge-io/kedge/pkg/netpolicy/oracle"
)

// worldOf makes what the controller of a node would gather of a world.
func worldOf(o *oracle.World, node string) world {
	w := world{families: []family{v4, v6}, namespaces: map[string]labels.Set{}}
	for _, n := range o.Namespaces {
		w.namespaces[n.Name] = n.Labels
	}
	for i := range o.Policies {
		w.policies = append(w.policies, &o.Policies[i])
	}
	for i := range o.Pods {
		p := &o.Pods[i]
		if !counts(p) {
			continue
		}
		stripped, _ := stripPod(p)
		local := podOf(identify(stripped.(*corev1.Pod)), addresses(p), p.Spec.NodeName == node)
		w.pods = append(w.pods, local)
		if local.local {
			w.known = append(w.known, local.addrs...)
		}
	}
	c := Controller{cfg: Config{ClusterDNS: o.ClusterDNS}}
	w.pods = append(w.pods, c.dnsPod())
	return w
}

// TestOracle compares the rules with what the API means, for random worlds.
func TestOracle(t *testing.T) {
	for seed := range uint64(100) {
		compareWithOracle(t, seed)
	}
}

func FuzzOracle(f *testing.F) {
	f.Add(uint64(1))
	f.Fuzz(compareWithOracle)
}

func compareWithOracle(t *testing.T, seed uint64) {
	o := oracle.Generate(rand.New(rand.NewPCG(seed, 0)))
	var ends []oracle.Endpoint
	for i := range o.Pods {
		if counts(&o.Pods[i]) {
			for _, a := range addresses(&o.Pods[i]) {
				ends = append(ends, oracle.Endpoint{Pod: &o.Pods[i], Node: o.Pods[i].Spec.NodeName, Addr: a})
			}
		}
	}
	pods := len(ends)
	for _, a := range append(o.Others, o.ClusterDNS...) {
		ends = append(ends, o.At(a))
	}
	rules := map[string]*ruleset{}
	for _, node := range []string{"n1", "n2"} {
		rules[node] = compile(worldOf(o, node))
	}
	for i, from := range ends {
		for j, to := range ends {
			if i >= pods && j >= pods || from.Addr.Is4() != to.Addr.Is4() {
				continue
			}
			for _, proto := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP} {
				for _, port := range []int32{7080, 7081, 53, 80} {
					want, why := o.Allowed(from, to, proto, port)
					if got := allowedBy(rules, from, to, proto, port); got != want {
						t.Fatalf("seed %d: %s → %s %s/%d: %v, want %v: %s", seed, from, to, proto, port, got, want, why)
					}
				}
			}
		}
	}
}

func allowedBy(rules map[string]*ruleset, from, to oracle.Endpoint, proto corev1.Protocol, port int32) bool {
	f := flow{from.Addr, to.Addr, protocolOf(&proto), uint16(port)}
	if s, ok := rules[from.Node]; ok && !s.decide(egress, f).Allowed {
		return false
	}
	s, ok := rules[to.Node]
	return !ok || s.decide(ingress, f).Allowed
}

func TestRanges(t *testing.T) {
	for _, test := range []struct {
		block, except, want string
	}{
		{"10.0.0.0/8", "", "[10.0.0.0-10.255.255.255]"},
		{"10.0.0.0/8", "10.0.0.0/8", "[]"},
		{"10.0.0.0/30", "10.0.0.1/32", "[10.0.0.0 10.0.0.2-10.0.0.3]"},
		{"10.0.0.7/30", "10.0.0.4/31", "[10.0.0.6-10.0.0.7]"},
		{"0.0.0.0/0", "255.255.255.255/32", "[0.0.0.0-255.255.255.254]"},
		{"fd00::/64", "fd00::/65", "[fd00::8000:0:0:0-fd00::ffff:ffff:ffff:ffff]"},
		{"10.0.0.0/31", "10.1.0.0/16", "[10.0.0.0-10.0.0.1]"},
	} {
		got := []addrRange{rangeOf(netip.MustParsePrefix(test.block))}
		if test.except != "" {
			got = got[0].without(rangeOf(netip.MustParsePrefix(test.except)))
		}
		if s := fmt.Sprint(got); s != test.want {
			t.Errorf("%s without %s: %s, want %s", test.block, test.except, s, test.want)
		}
	}
	ports := mergePorts([]portRange{{65000, 65535}, {80, 80}, {81, 90}, {85, 100}, {65535, 65535}})
	if s := fmt.Sprint(ports); s != "[80-100 65000-65535]" {
		t.Error(s)
	}
}
