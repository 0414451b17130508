// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/tests/cluster"
)

const (
	clusterCIDR = "10.42.0.0/16,fd42::/56"
	serviceCIDR = "10.43.0.0/16,fd43::/112"
)

// listing is all that packet filters and the like contain, and the machine's interfaces, sorted and without counters.
func listing(t *testing.T, n *cluster.Node) string {
	t.Helper()
	out := shell(t, n, `
export PATH=$(echo /var/lib/kedge/bin/*/ | tr ' ' :):$PATH
if type nft >/dev/null 2>&1; then
  nft list ruleset
  iptables-save; ip6tables-save
  for v in "" 6; do if grep -q . /proc/net/ip${v}_tables_names 2>/dev/null; then ip${v}tables-legacy-save | sed 's/^/legacy /'; fi; done
  ipset list -n
fi
cat /proc/net/ip_vs 2>/dev/null
ip -o link | cut -d: -f2 | cut -d@ -f1
ip -o addr show | awk '{print $2, $4}'
ip -o route show; ip -o -6 route show`)
	out = regexp.MustCompile(`packets \d+ bytes \d+|\[\d+:\d+\]|(?m)^#.*$`).ReplaceAllString(out, "")
	lines := slices.Compact(slices.Sorted(strings.Lines(out)))
	// A neighbour's announcement may add this one at any time.
	return strings.Join(slices.DeleteFunc(lines, func(l string) bool { return strings.Contains(l, "proto ra") }), "")
}

// same compares two listings.
func same(t *testing.T, what, was, is string) {
	t.Helper()
	before, after := slices.Collect(strings.Lines(was)), slices.Collect(strings.Lines(is))
	for _, l := range before {
		if !slices.Contains(after, l) {
			t.Errorf("%s: missing: %s", what, l)
		}
	}
	for _, l := range after {
		if !slices.Contains(before, l) {
			t.Errorf("%s: left: %s", what, l)
		}
	}
}

// TestFamiliesAndModes has a cluster of two address families, in which the machines go through kube-proxy's modes.
func TestFamiliesAndModes(t *testing.T) {
	t.Parallel()
	networks := []string{"--cluster-cidr", clusterCIDR, "--service-cidr", serviceCIDR}
	c := cluster.ForTest(t, cluster.Spec{Servers: 1, Agents: 1, Options: cluster.Options{Flags: networks}, AgentFlags: []string{"--proxy-mode", "iptables"}})
	s1, a1 := c.Servers[0], c.Agents[0]
	untouched := listing(t, a1)
	cluster.Do(t, c.Start)
	s := s1.Session(t)
	pods(s, "s1", "a1")
	nodeIPs := internalIPs(s, "s1", "a1")
	if len(nodeIPs) != 4 {
		t.Fatalf("addresses of the nodes: %v; want one of each family", nodeIPs)
	}
	check := func() {
		t.Helper()
		checkPods(t, s, "s1", "a1")
		checkServices(t, s, nodeIPs, "s1", "a1")
		s.Eventually("the host port", func() error {
			out, err := get(s.Within(minute), "http://"+s1.IP()+":18080/")
			if err == nil && !strings.HasPrefix(out, "s1 ") {
				err = fmt.Errorf("answer: %q", out)
			}
			return err
		})
		// What a pod gets is shaped at its interface on the node, what it sends behind another device.
		if got := shell(t, s1.Node, "tc qdisc show"); !regexp.MustCompile(`dev veth\S+ .*rate 30Mbit`).MatchString(got) || !regexp.MustCompile(`dev bwp\S+ .*rate 20Mbit`).MatchString(got) {
			t.Errorf("the pod's bandwidth is not limited:\n%s", got)
		}
	}
	check()
	if got, err := box(s, "a1", "nslookup web."+s.NS+".svc.cluster.local"); err != nil || strings.Count(got, "Address") != 3 {
		t.Errorf("DNS gives %q, %v; want one address of each family", got, err)
	}
	if got := s.Kubectl("logs", "a1", "-c", "server"); !strings.Contains(got, "listening") {
		t.Errorf("logs: %q", got)
	}

	nftables, iptables := listing(t, s1.Node), listing(t, a1)
	restart(t, s1.Node, append(networks, "--proxy-mode", "iptables")...)
	restart(t, a1, "--proxy-mode", "nftables")
	check()
	for _, n := range c.Nodes() {
		if got := listing(t, n); strings.Contains(got, "table ip kube-proxy") == strings.Contains(got, "KUBE-SVC-") {
			t.Errorf("%s has rules of both modes or none:\n%s", n.Name(), got)
		}
	}
	restart(t, a1, "--disable-kube-proxy")
	if got := listing(t, a1); regexp.MustCompile(`table ip6? kube-proxy|KUBE-(SVC|SERVICES|POSTROUTING)|kube-ipvs0`).MatchString(got) {
		t.Errorf("without a proxy there are rules of one:\n%s", got)
	}
	checkPods(t, s, "s1", "a1")
	restart(t, s1.Node, networks...)
	restart(t, a1, "--proxy-mode", "iptables")
	check()
	same(t, "nftables after a round of modes", nftables, listing(t, s1.Node))
	same(t, "iptables after a round of modes", iptables, listing(t, a1))

	t.Run("cleanup", func(t *testing.T) { cleanup(t, s, a1, untouched) })
}

// cleanup removes everything from a machine whose pods are gone, and finds it as it was before Kedge came.
func cleanup(t *testing.T, s *cluster.Session, n *cluster.Node, untouched string) {
	s.Kubectl("delete", "pod", n.Name(), "--timeout=50s")
	cluster.Eventually(t, "the pod's interface to be gone", func(context.Context) error { // after the Pod
		if got := shell(t, n, "ip -o link"); strings.Contains(got, "veth") {
			return errors.New(got)
		}
		return nil
	})
	cluster.Do(t, n.Stop)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.WriteFile("/tmp/cleanup", program, 0o755); err != nil {
		t.Fatal(err)
	}
	shell(t, n, "export "+cleanupVariable+"=1 PATH=$(echo /var/lib/kedge/bin/*/ | tr ' ' :):$PATH; /tmp/cleanup && /tmp/cleanup") // twice: what is not there is no error
	same(t, "after the cleanup", untouched, listing(t, n))
}

// TestIPv6Only has a cluster without IPv4, once in each mode.
func TestIPv6Only(t *testing.T) {
	t.Parallel()
	c := cluster.ForTest(t, cluster.Spec{Servers: 1, Agents: 1, AgentFlags: []string{"--proxy-mode", "iptables"},
		Options: cluster.Options{Flags: []string{"--cluster-cidr", "fd42::/56", "--service-cidr", "fd43::/112"}}})
	s1, a1 := c.Servers[0], c.Agents[0]
	cluster.Do(t, c.Start)
	s := s1.Session(t)
	pods(s, "s1", "a1")
	checkPods(t, s, "s1", "a1")
	checkServices(t, s, internalIPs(s, "s1", "a1"), "s1", "a1")
	if got, err := box(s, "a1", "nslookup kubernetes.default.svc.cluster.local"); err != nil || !strings.HasSuffix(got, "Address: fd43::1") {
		t.Errorf("DNS: %q, %v", got, err)
	}
	if lo := shell(t, a1, "ip -6 addr show dev lo"); !strings.Contains(lo, "fd43::a/128") {
		t.Errorf("lo of an agent: %s", lo)
	}
	if got := s.Kubectl("logs", "a1", "-c", "server"); !strings.Contains(got, "listening") {
		t.Errorf("logs: %q", got)
	}
}
