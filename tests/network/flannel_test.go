// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

// lossless fails the test if a single packet gets lost between two pods while something happens.
func lossless(t *testing.T, s *cluster.Session, from, to string, during func()) {
	t.Helper()
	if n := lost(t, s, from, to, during); n != 0 {
		t.Errorf("%d pings from %s to %s got lost", n, from, to)
	}
}

// lost counts packets that get lost between two pods while something happens: at least twenty go out each second. None is under way at the
// end: they are sent in batches, each of which ends with its last answer, or a second after its last packet when some are missing.
func lost(t *testing.T, s *cluster.Session, from, to string, during func()) int {
	t.Helper()
	ip := field(s, "pod/"+to, ".status.podIP")[0]
	if _, err := box(s, from, "rm -f /tmp/stop /tmp/done; (until [ -e /tmp/stop ]; do ping -q -c 20 -i 0.05 -W 5 "+ip+"; done; touch /tmp/done) >/tmp/pings 2>&1 </dev/null &"); err != nil {
		t.Fatal(err)
	}
	during()
	out, err := box(s, from, "touch /tmp/stop; until [ -e /tmp/done ]; do sleep 0.1; done; grep loss /tmp/pings; grep -c ^PING /tmp/pings")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(out, "\n")
	batches := lines[:len(lines)-1]
	allSent, allGot := 0, 0
	for _, batch := range batches {
		var sent, got int
		if _, err := fmt.Sscanf(batch, "%d packets transmitted, %d packets received", &sent, &got); err != nil || sent != 20 {
			t.Fatalf("pings from %s to %s: %s, %v", from, to, batch, err)
		}
		allSent, allGot = allSent+sent, allGot+got
	}
	if began := lines[len(lines)-1]; began != strconv.Itoa(len(batches)) || len(batches) == 0 {
		t.Fatalf("pings from %s to %s: %s batches began and %d ended", from, to, began, len(batches))
	}
	t.Logf("%s to %s: %d pings, %d answered", from, to, allSent, allGot)
	return allSent - allGot
}

// killNodeProcess ends the [node] process without a chance to tidy up, and waits until everything is ready again.
func killNodeProcess(t *testing.T, n *cluster.Node) {
	t.Helper()
	old := nodeProcess(t, n)
	shell(t, n, "kill -KILL "+strconv.Itoa(old))
	cluster.Eventually(t, "a new [node] process in "+n.Name(), func(ctx context.Context) error {
		st, err := n.Status(ctx)
		if err != nil {
			return err
		}
		if pid := st.PIDs()["node"]; pid == 0 || pid == old {
			return errors.New("it has not started again")
		}
		return st.Problems()
	})
}

func TestVXLAN(t *testing.T) {
	t.Parallel()
	c := cluster.ForTest(t, cluster.Spec{Servers: 1, Agents: 2, Options: cluster.Options{Flags: []string{"--cluster-cidr", clusterCIDR, "--service-cidr", serviceCIDR}}})
	s1, a1, a2 := c.Servers[0], c.Agents[0], c.Agents[1]
	external := strings.TrimSuffix(a2.IP(), strconv.Itoa(13)) + "99"
	shell(t, a2, "ip addr add "+external+"/32 dev eth0")
	a2.Flags = []string{"--node-external-ip", external, "--flannel-external-ip"}
	cluster.Do(t, c.Start)
	s := s1.Session(t)
	pods(s, "s1", "a1")
	checkPods(t, s, "s1", "a1")

	t.Run("devices", func(t *testing.T) {
		for device, mtu := range map[string]string{"flannel.1": "1450", "flannel-v6.1": "1430"} {
			if got := shell(t, a1, "ip -o link show "+device); !strings.Contains(got, " mtu "+mtu+" ") {
				t.Errorf("%s; want MTU %s", got, mtu)
			}
		}
		if got, err := box(s, "a1", "cat /sys/class/net/eth0/mtu"); err != nil || got != "1430" {
			t.Errorf("the MTU of a pod is %s, %v", got, err)
		}
		for _, ip := range field(s, "pod/s1", ".status.podIPs[*].ip") {
			if _, err := box(s, "a1", "ping -c1 -W2 -s 1380 "+ip); err != nil {
				t.Errorf("a large packet to %s: %v", ip, err)
			}
		}
	})
	t.Run("external address", func(t *testing.T) {
		s.Eventually("the node's external address", func() error {
			got := field(s, "node/a2", `.status.addresses[*].type} {.status.addresses[*].address} {.metadata.annotations.flannel\.alpha\.coreos\.com/public-ip} {.spec.taints[*].key`)
			if want := []string{"InternalIP", "InternalIP", "ExternalIP", "Hostname"}; len(got) < 9 || strings.Join(got[:4], " ") != strings.Join(want, " ") || got[6] != external || got[8] != external {
				return fmt.Errorf("%v", got)
			}
			if len(got) > 9 {
				return fmt.Errorf("taints: %v", got[9:])
			}
			return nil
		})
		if got := tables(t, a1); !strings.Contains(got, external) {
			t.Errorf("a1 does not send to %s:\n%s", external, got)
		}
		// Its certificate has the external address, too.
		s.Eventually("the kubelet to answer the API server", func() error { _, err := s.Try("get", "--raw", "/api/v1/nodes/a2/proxy/healthz"); return err })
	})
	t.Run("one lost packet is noticed", func(t *testing.T) {
		const nft = "$(echo /var/lib/kedge/bin/*/nft) "
		n := lost(t, s, "s1", "a1", func() {
			shell(t, a1, nft+"'table ip drop-one { chain c { type filter hook forward priority -200; icmp type echo-request limit rate 1/day burst 1 packets counter drop; }; }'")
			cluster.Eventually(t, "a packet to be dropped", func(context.Context) error {
				if got := shell(t, a1, nft+"list table ip drop-one"); !strings.Contains(got, "counter packets 1 ") {
					return errors.New(got)
				}
				return nil
			})
			shell(t, a1, nft+"delete table ip drop-one")
		})
		if n != 1 {
			t.Errorf("one packet was dropped, and %d were missed", n)
		}
	})
	t.Run("restart without a lost packet", func(t *testing.T) {
		lossless(t, s, "s1", "a1", func() { killNodeProcess(t, a1) })
		lossless(t, s, "a1", "s1", func() { killNodeProcess(t, s1.Node) })
	})
	t.Run("a changed link", func(t *testing.T) {
		shell(t, a1, "ip link set flannel.1 mtu 1400 && ip link del flannel-v6.1")
		cluster.Eventually(t, "the devices to be as they were", func(context.Context) error {
			got := shell(t, a1, "ip -o link")
			if !regexp.MustCompile(`flannel\.1: .* mtu 1450 `).MatchString(got) || !regexp.MustCompile(`flannel-v6\.1: .* mtu 1430 `).MatchString(got) {
				return errors.New(got)
			}
			return nil
		})
		checkPods(t, s, "s1", "a1")
	})
	t.Run("another address", func(t *testing.T) {
		was := a1.IP()
		cluster.Do(t, a1.Readdress)
		gone(t, s1.Node, 20*time.Second, was) // 3 to 5 s
		ready(t, a1)
		checkPods(t, s, "s1", "a1")
	})
	networks := field(s, "node/a2", ".spec.podCIDRs[*]")
	v4, v6 := strings.TrimSuffix(networks[0], "/24"), strings.TrimSuffix(networks[1], "/64")
	t.Run("a node goes while nobody looks", func(t *testing.T) {
		if got := tables(t, a1); !strings.Contains(got, v4) || !strings.Contains(got, v6) || !strings.Contains(got, external) {
			t.Fatalf("%s, %s and %s are not in\n%s", v4, v6, external, got)
		}
		old := nodeProcess(t, a1)
		shell(t, a1, "kill -STOP "+strconv.Itoa(old))
		cluster.Do(t, a2.PowerCut)
		s.Kubectl("delete", "node", "a2", "--timeout=50s")
		gone(t, s1.Node, 10*time.Second, v4, v6, external)
		if got := tables(t, a1); !strings.Contains(got, v4) {
			t.Fatalf("a1 was meant not to notice:\n%s", got)
		}
		killNodeProcess(t, a1)
		gone(t, a1, 10*time.Second, v4, v6, external)
		checkPods(t, s, "s1", "a1")
	})
}

func TestHostGateway(t *testing.T) {
	t.Parallel()
	c := cluster.ForTest(t, cluster.Spec{Servers: 1, Agents: 1, Options: cluster.Options{Flags: []string{
		"--cluster-cidr", clusterCIDR, "--service-cidr", serviceCIDR, "--flannel-backend", "host-gw"}}})
	cluster.Do(t, c.Start)
	s := c.Servers[0].Session(t)
	pods(s, "s1", "a1")
	checkPods(t, s, "s1", "a1")
	a1 := c.Agents[0]
	if got := shell(t, a1, "ip -o link"); strings.Contains(got, "flannel") {
		t.Errorf("devices of flannel: %s", got)
	}
	lossless(t, s, "s1", "a1", func() { killNodeProcess(t, a1) })
	shell(t, a1, "ip route add 10.42.77.0/24 via "+c.Servers[0].IP())
	killNodeProcess(t, a1)
	gone(t, a1, 10*time.Second, "10.42.77.0")
	checkPods(t, s, "s1", "a1")

	t.Run("the operator's configuration comes first", func(t *testing.T) {
		shell(t, c.Servers[0].Node, "mkdir -p /opt/cni/bin && cp /var/lib/kedge/bin/*/cni/ptp /opt/cni/bin/ptp-of-mine")
		if err := c.Servers[0].WriteFile("/run/kedge/cni/net.d/00-mine.conflist", []byte(fmt.Sprintf(ownConflist, "ptp-of-mine")), 0o644); err != nil {
			t.Fatal(err)
		}
		s.Eventually("a pod with that configuration", func() error {
			s.Apply(strings.Replace(cluster.ClientPod, "spec:", "spec:\n  nodeName: s1", 1))
			s.Ready("client")
			if got := field(s, "pod/client", ".status.podIP")[0]; !strings.HasPrefix(got, "10.99.0.") {
				s.Kubectl("delete", "pod", "client")
				return errors.New(got)
			}
			return nil
		})
	})
}

// ownConflist is an operator's, with the plugin as its argument.
const ownConflist = `{"cniVersion": "1.0.0", "name": "own", "plugins": [{"type": %q, "ipam": {"type": "host-local",
  "ranges": [[{"subnet": "10.99.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`

// TestNoBackend has the operator bring the network of pods.
func TestNoBackend(t *testing.T) {
	t.Parallel()
	c := cluster.ForTest(t, cluster.Spec{Servers: 1, Options: cluster.Options{Flags: []string{"--flannel-backend", "none"}}})
	s1 := c.Servers[0]
	shell(t, s1.Node, "ip link add flannel.1 type vxlan id 1 dstport 8472 dev eth0") // the operator's own flannel
	cluster.Do(t, s1.Run)
	cluster.Eventually(t, "the node to wait for its network", func(ctx context.Context) error {
		nodes, err := s1.Nodes(ctx)
		if err == nil && !strings.Contains(nodes["s1"].Message, "cni plugin not initialized") {
			err = fmt.Errorf("%+v", nodes)
		}
		return err
	})
	if got := shell(t, s1.Node, "ls /run/kedge/cni/net.d 2>/dev/null; $(echo /var/lib/kedge/bin/*/nft) list tables; ip -o link show flannel.1"); strings.Contains(got, "conflist") || strings.Contains(got, "flannel-") {
		t.Errorf("in the way: %s", got)
	}
	if err := s1.WriteFile("/run/kedge/cni/net.d/10-own.conflist", []byte(fmt.Sprintf(ownConflist, "ptp")), 0o644); err != nil {
		t.Fatal(err)
	}
	cluster.Do(t, s1.WaitReady)
	s := s1.Session(t)
	s.Apply(cluster.ClientPod)
	s.Ready("client")
	if got := field(s, "pod/client", ".status.podIP")[0]; !strings.HasPrefix(got, "10.99.0.") {
		t.Errorf("the pod has %s", got)
	}
}
