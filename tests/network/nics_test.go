// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/tests/cluster"
)

// sent is how many bytes a machine has sent through a card.
func sent(t *testing.T, n *cluster.Node, card string) int {
	t.Helper()
	bytes, err := strconv.Atoi(strings.TrimSpace(shell(t, n, "cat /sys/class/net/"+card+"/statistics/tx_bytes")))
	if err != nil {
		t.Fatal(err)
	}
	return bytes
}

// TestSeveralNICs has machines with two cards and no default route, of which the second card carries what pods send to pods of other
// nodes, for three reasons: the operator named it, the operator named it and left the node's address to Kedge, the node's address is there.
func TestSeveralNICs(t *testing.T) {
	t.Parallel()
	c := cluster.ForTest(t, cluster.Spec{Servers: 1, Agents: 2})
	s1, a1, a2 := c.Servers[0], c.Agents[0], c.Agents[1]
	second := map[string]string{}
	for _, n := range c.Nodes() {
		ip, err := n.AddNIC(cluster.Within(t, minute))
		if err != nil {
			t.Fatal(err)
		}
		second[n.Name()] = ip
		shell(t, n, "ip route del default; ip -6 route del default")
	}
	s1.Flags = []string{"--node-ip", s1.IP(), "--flannel-iface", "eth1"}
	a1.Flags = []string{"--flannel-iface", "eth1"}
	a2.Flags = []string{"--node-ip", second["a2"]}
	cluster.Do(t, c.Start)
	s := s1.Session(t)
	for name, want := range map[string]string{"s1": s1.IP(), "a1": second["a1"], "a2": second["a2"]} {
		if got := internalIPs(s, name); len(got) != 1 || got[0] != want {
			t.Errorf("the address of %s is %v, want %s", name, got, want)
		}
		if got := field(s, "node/"+name, `.metadata.annotations.flannel\.alpha\.coreos\.com/public-ip`); len(got) != 1 || got[0] != second[name] {
			t.Errorf("others send the pods' packets for %s to %v, want %s", name, got, second[name])
		}
	}
	pods(s, "s1", "a1")
	s.Apply(strings.Replace(cluster.ClientPod, "spec:", "spec:\n  nodeName: a2", 1))
	s.Ready("client")
	checkPods(t, s, "s1", "a1")
	checkServices(t, s, []string{s1.IP()}, "s1", "a1")
	// The machines themselves reach Services, too, though no route leads there.
	web := "http://" + field(s, "service/web", ".spec.clusterIP")[0] + "/"
	for _, n := range c.Nodes() {
		answeredBy(t, s, web+" from "+n.Name(), []string{"s1", "a1"}, func() (string, error) { return curls(s.Within(minute), n, web) })
	}
	const count, size = 200, 1300
	for _, way := range []struct {
		from     *cluster.Node
		pod, box string
		to       string
	}{{s1.Node, "s1", "-c=box", "a1"}, {a1, "a1", "-c=box", "client"}, {a2, "client", "-c=client", "s1"}} {
		first, other := sent(t, way.from, "eth0"), sent(t, way.from, "eth1")
		ip := field(s, "pod/"+way.to, ".status.podIP")[0]
		out, err := s.Try("exec", way.pod, way.box, "--", "ping", "-q", "-A", "-c", strconv.Itoa(count), "-s", strconv.Itoa(size), ip)
		if err != nil {
			t.Fatalf("%s: %v", out, err)
		}
		first, other = sent(t, way.from, "eth0")-first, sent(t, way.from, "eth1")-other
		t.Logf("%s to %s: %d bytes through eth0, %d through eth1", way.pod, way.to, first, other)
		if other < count*size || first > count*size/2 {
			t.Errorf("%s to %s: %d bytes through eth0, %d through eth1; want the pods' %d through eth1", way.pod, way.to, first, other, count*size)
		}
	}
	if got := s.Kubectl("logs", "a1", "-c", "server"); !strings.Contains(got, "listening") {
		t.Errorf("logs: %q", got)
	}
	t.Run("a card that is not there", func(t *testing.T) {
		cluster.Do(t, a2.Stop)
		a2.Flags = []string{"--node-ip", second["a2"], "--flannel-iface", "eth7"}
		out, err := a2.Exec(cluster.Within(t, minute), append([]string{cluster.Program, "agent"}, append(a2.Flags, a2.JoinFlags...)...)...)
		if err == nil || !strings.Contains(fmt.Sprint(err), `no network interface "eth7"`) {
			t.Errorf("%q, %v; want an error that names it", out, err)
		}
		a2.Flags = a2.Flags[:2]
		cluster.Do(t, a2.Run)
		cluster.Eventually(t, "a2 to be back", func(ctx context.Context) error { return s1.NodesReady(ctx, "a2") })
	})
}
