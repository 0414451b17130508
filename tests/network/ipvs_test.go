// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// guest is an agent in a virtual machine, whose kernel has what that of the machines may lack.
type guest struct {
	*testbed.VM
	flags string
}

// newGuest makes a virtual machine with Kedge and the images of the tests in it. It skips the test where there can be none.
func newGuest(t *testing.T, c *cluster.Cluster, name string) *guest {
	t.Helper()
	if testing.Short() {
		t.Skip("a virtual machine takes minutes")
	}
	ctx := cluster.Within(t, 5*minute)
	bin, err := cluster.Binary()
	if err != nil {
		t.Fatal(err)
	}
	files := t.TempDir()
	if _, err := cluster.Images(ctx, c.Bed, files); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(bin, filepath.Join(files, "kedge")); err != nil {
		program, err := os.ReadFile(bin) // on another file system
		if err == nil {
			err = os.WriteFile(filepath.Join(files, "kedge"), program, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	vm, err := c.Bed.VM(ctx, name, testbed.Share(files, "/opt/kedge"))
	if errors.Is(err, testbed.ErrNoVM) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{VM: vm}
	g.do(t, "mkdir -p /var/lib/kedge/images && ln -s /opt/kedge/kedge /usr/local/bin/kedge && cp /opt/kedge/*.tar /var/lib/kedge/images/")
	return g
}

// do runs a line and fails the test if that fails.
func (g *guest) do(t *testing.T, line string) string {
	t.Helper()
	out, err := g.Shell(cluster.Within(t, 3*minute), line)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// run starts the agent and waits until all of it is ready.
func (g *guest) run(t *testing.T, flags ...string) {
	t.Helper()
	g.do(t, "setsid kedge agent "+strings.Join(flags, " ")+" "+g.flags+" >>/var/log/kedge.log 2>&1 </dev/null & echo $! >/run/agent.pid")
	cluster.EventuallyWithin(t, 8*minute, g.Name()+" to be ready", func(ctx context.Context) error {
		if out, err := g.Shell(ctx, "kedge status"); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

func (g *guest) stop(t *testing.T) {
	t.Helper()
	g.do(t, "kill $(cat /run/agent.pid); while kill -0 $(cat /run/agent.pid) 2>/dev/null; do sleep 0.2; done")
}

// join makes g.flags those of an agent of the cluster.
func (g *guest) join(t *testing.T, s *cluster.Server) {
	t.Helper()
	token, err := s.Token(cluster.Within(t, minute), cluster.AgentRole)
	if err != nil {
		t.Fatal(err)
	}
	g.flags = "--server " + s.URL() + " --token " + token
}

const balanced = `
apiVersion: v1
kind: Service
metadata: {name: sticky}
spec:
  type: LoadBalancer
  loadBalancerClass: test.example/none
  externalIPs: [192.0.2.77]
  sessionAffinity: ClientIP
  selector: {app: web}
  ports: [{port: 81, targetPort: 8080}]
`

// virtualServers is /proc/net/ip_vs with addresses that people can read.
func (g *guest) virtualServers(t *testing.T) string {
	t.Helper()
	return regexp.MustCompile(`\b[0-9A-F]{8}:[0-9A-F]{4}\b`).ReplaceAllStringFunc(g.do(t, "cat /proc/net/ip_vs"), func(place string) string {
		b, err := hex.DecodeString(strings.Replace(place, ":", "", 1))
		if err != nil {
			t.Fatal(err)
		}
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b)), binary.BigEndian.Uint16(b[4:])).String()
	})
}

func TestIPVS(t *testing.T) {
	t.Parallel()
	c := cluster.ForTest(t, cluster.Spec{Servers: 1})
	g := newGuest(t, c, "v1")
	cluster.Do(t, c.Start)
	s1 := c.Servers[0]
	g.join(t, s1)
	g.run(t)
	if got := g.do(t, "kedge status"); !strings.Contains(got, "mode ipvs (chosen: the kernel has IPVS)") {
		t.Errorf("status: %s", got)
	}
	s := s1.Session(t)
	pods(s, "s1", "v1")
	s.Apply(balanced)
	s.Kubectl("patch", "service", "sticky", "--subresource=status", "--type=merge", "-p", `{"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.78", "ipMode": "VIP"}]}}}`)
	checkPods(t, s, "s1", "v1")
	checkServices(t, s, []string{s1.IP(), g.IP()}, "s1", "v1")

	web, sticky := field(s, "service/web", ".spec.clusterIP} {.spec.ports[0].nodePort"), field(s, "service/sticky", ".spec.clusterIP} {.spec.ports[0].nodePort")
	s.Eventually("virtual servers for all addresses", func() error {
		have := strings.Join(strings.Fields(g.virtualServers(t)), " ")
		for _, want := range []string{
			web[0] + ":80 rr", g.IP() + ":" + web[1] + " rr", sticky[0] + ":81 rr persistent", g.IP() + ":" + sticky[1] + " rr persistent",
			"192.0.2.77:81 rr persistent", "192.0.2.78:81 rr persistent",
		} {
			if !strings.Contains(have, "TCP "+want) {
				return fmt.Errorf("%s is missing in\n%s", want, have)
			}
		}
		return nil
	})
	for _, ip := range []string{sticky[0], "192.0.2.77", "192.0.2.78"} {
		url := "http://" + net.JoinHostPort(ip, "81") + "/"
		out, err := box(s, "v1", "for i in 1 2 3 4 5 6; do timeout 5 wget -q -O- "+url+" | cut -d' ' -f1; done | sort | uniq -c")
		if err != nil || strings.Count(out, "\n") != 0 || !strings.HasPrefix(out, "6 ") {
			t.Errorf("%s six times: %q, %v; want one pod", url, out, err)
		}
	}
	if got := g.do(t, "cat /proc/sys/net/ipv4/conf/all/arp_ignore /proc/sys/net/ipv4/conf/all/arp_announce /proc/sys/net/ipv4/vs/conntrack"); got != "1\n2\n1\n" {
		t.Errorf("arp_ignore, arp_announce and vs/conntrack are %q", got)
	}

	s.Apply(balancers, "v1", "s1")
	ips := map[string]string{"s1": s1.IP(), "v1": g.IP()}
	checkBalancers(t, s, c, ips, "v1", "s1")
	if have := g.virtualServers(t); strings.Contains(have, g.IP()+":82") || strings.Contains(have, s1.IP()+":82") {
		t.Errorf("kube-proxy serves the nodes' addresses, too:\n%s", have)
	}
	checkPolicies(t, s, c, g.IP(), "v1", "s1")
	checkPool(t, s, c, g, "s1")

	g.stop(t)
	g.run(t, "--proxy-mode", "nftables")
	checkServices(t, s, []string{s1.IP(), g.IP()}, "s1", "v1")
	left := g.do(t, `grep -hv 0 /proc/sys/net/ipv4/conf/all/arp_ignore /proc/sys/net/ipv4/conf/all/arp_announce; PATH=$(echo /var/lib/kedge/bin/*/):$PATH; tail -n +4 /proc/net/ip_vs; ip -o link show kube-ipvs0 2>/dev/null; ipset list -n; iptables-save | grep -E '^:(KUBE|FLANNEL)' | grep -vE 'KUBE-(FIREWALL|KUBELET-CANARY|IPTABLES-HINT)'; true`)
	if left != "" {
		t.Errorf("left of ipvs: %s", left)
	}

	g.stop(t)
	g.run(t)
	g.checkUninstall(t)
}

// TestWireGuard has two agents in virtual machines, whose pods reach each other through WireGuard. The server is no node.
func TestWireGuard(t *testing.T) {
	if os.Getenv("KEDGE_TEST_WIREGUARD") != "1" {
		t.Skip("two virtual machines at once take minutes: set KEDGE_TEST_WIREGUARD=1")
	}
	t.Parallel()
	c := cluster.ForTest(t, cluster.Spec{Servers: 1, Agents: 1, Options: cluster.Options{Flags: []string{"--disable-agent", "--flannel-backend", "wireguard-native"}}})
	g, h := newGuest(t, c, "v1"), newGuest(t, c, "v2")
	s1, a1 := c.Servers[0], c.Agents[0]
	cluster.Do(t, s1.Run)
	cluster.Eventually(t, "the API", func(ctx context.Context) error { _, err := s1.Kubectl(ctx, "get", "nodes"); return err })
	for _, one := range []*guest{g, h} {
		one.join(t, s1)
		one.run(t)
	}
	s := s1.Session(t)
	pods(s, "v1", "v2")
	checkPods(t, s, "v1", "v2")
	if got := g.do(t, "ip -d -o link show flannel-wg; ip route show 10.42.0.0/16"); !strings.Contains(got, " mtu 1420 ") || !strings.Contains(got, "dev flannel-wg") {
		t.Errorf("the device: %s", got)
	}
	// Flannel makes its device anew, so some get lost: how many is in the log.
	lost(t, s, "v2", "v1", func() {
		g.do(t, `old=$(pgrep -f '^kedge \[node\]') && kill -KILL $old && for i in $(seq 120); do sleep 1; [ "$(pgrep -f '^kedge \[node\]')" != "$old" ] && kedge status && exit; done; false`)
	})
	checkPods(t, s, "v1", "v2")
	t.Run("a kernel without it", func(t *testing.T) {
		if out, err := a1.Shell(cluster.Within(t, minute), "ip link add type wireguard"); err == nil {
			t.Skip("this kernel has WireGuard", out)
		}
		token, err := s1.Token(cluster.Within(t, minute), cluster.AgentRole)
		if err != nil {
			t.Fatal(err)
		}
		a1.JoinThrough(s1.URL(), token)
		cluster.Do(t, a1.Run)
		cluster.Eventually(t, "status to say what is missing", func(ctx context.Context) error {
			out, _ := a1.Exec(ctx, cluster.Program, "status") // it ends with 3: the node is not ready
			if !strings.Contains(out, "flannel-backend wireguard-native: the kernel has no WireGuard") {
				return errors.New(out)
			}
			return nil
		})
	})
}
