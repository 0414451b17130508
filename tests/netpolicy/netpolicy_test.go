// SPDX-License-Identifier: Apache-2.0

// Package netpolicy tests that nodes enforce NetworkPolicies: with generated policies, whether every packet goes where the oracle of
// pkg/netpolicy says, and nowhere else, whichever way Services are made; and what an oracle cannot know: connections that are open,
// first moments, restarts.
package netpolicy

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/tests/cluster"
)

// network is a kind of cluster to test.
type network struct {
	name, mode string   // of kube-proxy
	flags      []string // of the server
	seeds      int      // how many of keptSeeds
	v4, v6     bool     // families of addresses
	brief      bool     // leave out what takes long and depends on neither the mode nor the family; KEDGE_NETPOLICY_ALL=1 does all
}

func networks() []network {
	dual := []string{"--cluster-cidr", "10.42.0.0/16,fd00:42::/56", "--service-cidr", "10.43.0.0/16,fd00:43::/112"}
	six := []string{"--cluster-cidr", "fd00:42::/56", "--service-cidr", "fd00:43::/112"}
	return []network{
		{name: "nftables", mode: "nftables", seeds: len(keptSeeds), v4: true},
		{name: "iptables", mode: "iptables", seeds: 3, v4: true, brief: true},
		{name: "dual", mode: "nftables", flags: dual, seeds: 3, v4: true, v6: true, brief: true},
		{name: "ipv6", mode: "nftables", flags: six, seeds: 2, v6: true, brief: true},
	}
}

// keptSeeds once found something, or are the first ones.
var keptSeeds = [...]uint64{1, 2, 3, 4, 5, 6}

// freshSeeds is how many seeds of a run nobody has seen before, one unless $KEDGE_NETPOLICY_SEEDS says more.
func freshSeeds(t *testing.T) int {
	t.Helper()
	text := os.Getenv("KEDGE_NETPOLICY_SEEDS")
	if text == "" {
		return 1
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("KEDGE_NETPOLICY_SEEDS: %v", err)
	}
	return n
}

func TestNetworkPolicy(t *testing.T) {
	for _, n := range networks() {
		t.Run(n.name, func(t *testing.T) {
			s := start(t, n)
			t.Run("generated", func(t *testing.T) { testGenerated(t, s, n.seeds) })
			t.Run("established", func(t *testing.T) { testEstablished(t, s) })
			t.Run("first moments", func(t *testing.T) { testFirstMoments(t, s) })
			t.Run("node restarts", func(t *testing.T) { testNodeRestarts(t, s) })
			if n.brief && os.Getenv("KEDGE_NETPOLICY_ALL") == "" {
				return
			}
			t.Run("address again", func(t *testing.T) { testAddressAgain(t, s) })
			t.Run("power", func(t *testing.T) { testPower(t, s) })
		})
	}
}

// start makes a cluster of a server and an agent, with pods and whatever else sends or gets packets.
func start(t *testing.T, n network) *site {
	t.Helper()
	flags := []string{"--proxy-mode", n.mode}
	c := cluster.ForTest(t, cluster.Spec{
		Servers: 1, Agents: 1, Options: cluster.Options{Flags: append(flags, n.flags...)}, AgentFlags: flags,
	})
	cluster.Do(t, c.Start)
	for _, node := range c.Nodes() {
		text, err := node.Exec(cluster.Within(t, minute), cluster.Program, "status")
		if err != nil || !strings.Contains(text, "mode "+n.mode) {
			t.Fatalf("%s is not in mode %s: %s, %v", node.Name(), n.mode, text, err)
		}
	}
	s, err := newSite(t, c, n)
	if err != nil {
		t.Fatal(fmt.Errorf("make the pods: %w", err))
	}
	return s
}
