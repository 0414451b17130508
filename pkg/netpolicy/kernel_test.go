// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kedge-io/kedge/pkg/netpolicy/announce"
)

const (
	denyIngress = `{podSelector: {}, policyTypes: [Ingress]}`
	denyEgress  = `{podSelector: {}, policyTypes: [Egress]}`
)

type tags = map[string]string

// node dials from the node itself.
var node *space

func (b *bed) nft(text string) {
	b.t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		b.t.Fatalf("nft: %v: %s", err, out)
	}
}

func TestIngress(t *testing.T) {
	b := newBed(t)
	server := b.pod("a", "server", tags{"app": "server"}, "10.42.0.2", "fd00:42::2")
	client := b.pod("a", "client", tags{"app": "client"}, "10.42.0.3", "fd00:42::3")
	stranger := b.pod("b", "client", tags{"app": "client"}, "10.42.0.4", "fd00:42::4")
	client.open(t, "10.42.0.2", 8080)
	client.open(t, "fd00:42::2", 8080)

	b.policy("a", "deny", denyIngress)
	for _, s := range []*space{client, stranger} {
		together(
			func() { s.closed(t, "10.42.0.2", 8080) },
			func() { s.closed(t, "fd00:42::2", 8080) },
		)
	}
	server.open(t, "10.42.0.4", 8080) // ingress only, and the answers pass
	server.open(t, "fd00:42::4", 8080)
	node.open(t, "10.42.0.2", 8080)
	node.open(t, "fd00:42::2", 8080)

	b.policy("a", "allow", `
podSelector: {matchLabels: {app: server}}
ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 8080}]}]`)
	client.open(t, "10.42.0.2", 8080, "tcp")
	client.open(t, "fd00:42::2", 8080, "tcp")
	together(
		func() { client.closed(t, "10.42.0.2", 8080, "udp") },
		func() { client.closed(t, "10.42.0.2", 8081) },
		func() { stranger.closed(t, "10.42.0.2", 8080) },
		func() { stranger.closed(t, "fd00:42::2", 8080) },
	)

	b.deletePolicy("a", "deny")
	b.deletePolicy("a", "allow")
	stranger.open(t, "10.42.0.2", 8080)
	stranger.open(t, "fd00:42::2", 8081)
}

func TestEgress(t *testing.T) {
	b := newBed(t)
	client := b.pod("a", "client", nil, "10.42.0.2", "fd00:42::2")
	b.pod("b", "server", tags{"app": "server"}, "10.42.0.3", "fd00:42::3")
	out := b.other("192.0.2.1", "192.0.2.64/26", "192.0.2.128/25")
	must(t, serveEcho(t, "", 8080)) // on the node
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.AddrReplace(lo, &netlink.Addr{IPNet: single(addr("10.43.0.10"))}))
	must(t, serveEcho(t, "10.43.0.10", 53))
	b.nft(`
add table inet dns
add chain inet dns prerouting { type filter hook prerouting priority -300 ; }
add chain inet dns output { type filter hook output priority -300 ; }
add rule inet dns prerouting ip daddr 10.43.0.10 meta l4proto { tcp, udp } th dport 53 notrack
add rule inet dns output ip saddr 10.43.0.10 meta l4proto { tcp, udp } th sport 53 notrack`)
	t.Cleanup(func() { b.nft("delete table inet dns") })
	client.open(t, "10.43.0.10", 53)
	client.open(t, "192.0.2.1", 8080)
	node.open(t, "10.42.0.1", 8080) // an address of the pods' range, but the node's

	b.policy("a", "deny", denyEgress)
	together(
		func() { client.closed(t, "10.42.0.3", 8080) },
		func() { client.closed(t, "fd00:42::3", 8080) },
		func() { client.closed(t, "192.0.2.1", 8080) },
	)
	client.closed(t, "10.42.0.1", 8080) // the node
	together(
		func() { client.closed(t, "fd00:42::1", 8080) },
		func() { client.closed(t, "10.43.0.10", 53) },
	)
	node.open(t, "10.42.0.2", 8080)
	out.open(t, "10.42.0.2", 8080) // egress only

	b.policy("a", "dns", `
podSelector: {}
policyTypes: [Egress]
egress:
- to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}, podSelector: {matchLabels: {k8s-app: kube-dns}}}]
  ports: [{port: dns, protocol: UDP}, {port: 53, protocol: TCP}]`)
	client.open(t, "10.43.0.10", 53)
	client.closed(t, "10.42.0.3", 8080)

	b.policy("a", "allow", `
podSelector: {}
policyTypes: [Egress]
egress:
- to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: b}}}]
  ports: [{port: 8080}, {port: 8080, protocol: UDP}]
- to: [{ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.64/26]}}]`)
	client.open(t, "10.42.0.3", 8080)
	client.open(t, "fd00:42::3", 8080)
	client.closed(t, "10.42.0.3", 8081)
	client.open(t, "192.0.2.1", 8080)
	client.open(t, "192.0.2.128", 8080, "tcp")
	together(
		func() { client.closed(t, "192.0.2.64", 8080) },
		func() { client.closed(t, "10.42.0.1", 8080) },
	)

	// What egress allows is still ingress of the other pod.
	b.policy("b", "deny", denyIngress)
	client.closed(t, "10.42.0.3", 8080)
}

func TestNamedPorts(t *testing.T) {
	b := newBed(t)
	b.pod("a", "one", nil, "10.42.0.2")
	client := b.pod("b", "client", nil, "10.42.0.3")
	// The same name is another number on another pod.
	two := newPod("a", "two", testNode, nil)
	two.Spec.Containers[0].Ports[0].ContainerPort = 8081
	b.create(two)
	s := newSpace(t)
	s.attach("veth9", addrsOf([]string{"10.42.0.4"}))
	s.listen(8080)
	s.listen(8081)
	must(t, b.announce("a", "two", "10.42.0.4"))

	for _, test := range []struct{ namespace, spec string }{
		{"a", `{podSelector: {}, ingress: [{ports: [{port: web}]}]}`},
		{"b", `{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: web}]}]}`},
		{"b", `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}}], ports: [{port: web}]}]}`},
	} {
		b.policy(test.namespace, "named", test.spec)
		client.open(t, "10.42.0.2", 8080, "tcp")
		together(
			func() { client.closed(t, "10.42.0.2", 8080, "udp") },
			func() { client.closed(t, "10.42.0.2", 8081) },
		)
		client.open(t, "10.42.0.4", 8081, "tcp")
		client.closed(t, "10.42.0.4", 8080)
		b.deletePolicy(test.namespace, "named")
	}
}

// TestNAT reaches pods through a service: as kube-proxy makes it, with SNAT where a pod reaches itself.
func TestNAT(t *testing.T) {
	b := newBed(t)
	server := b.pod("a", "server", nil, "10.42.0.2")
	client := b.pod("a", "client", tags{"app": "client"}, "10.42.0.3")
	stranger := b.pod("b", "stranger", nil, "10.42.0.4")
	b.nft(`
add table ip services
add chain ip services prerouting { type nat hook prerouting priority -100 ; }
add chain ip services output { type nat hook output priority -100 ; }
add chain ip services postrouting { type nat hook postrouting priority 100 ; }
add rule ip services prerouting ip daddr 10.43.0.20 dnat to 10.42.0.2
add rule ip services output ip daddr 10.43.0.20 dnat to 10.42.0.2
add rule ip services postrouting ip saddr 10.42.0.2 ip daddr 10.42.0.2 masquerade
add rule ip services postrouting ct original ip daddr 10.43.0.20 masquerade`)
	t.Cleanup(func() { b.nft("delete table ip services") })
	service := "10.43.0.20"
	stranger.open(t, service, 8080)
	held := b.hold(stranger, service)
	kept := b.hold(client, service)

	b.policy("a", "allow", `{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]}`)
	client.open(t, service, 8080)
	stranger.closed(t, service, 8080)
	server.open(t, service, 8080) // itself
	ended(t, held)
	must(t, ping(kept, testTimeout))

	b.policy("a", "out", denyEgress)
	server.open(t, service, 8080)
	client.closed(t, service, 8080)
	ended(t, kept)
}

// hold opens a connection and leaves it open.
func (b *bed) hold(from *space, to string) net.Conn {
	b.t.Helper()
	conn, err := from.dial("tcp", addr(to), 8080, testTimeout)
	must(b.t, err)
	b.t.Cleanup(func() { conn.Close() })
	return conn
}

// TestTakeOver: another process takes the rules over, and others are loaded over and over, while packets flow.
func TestTakeOver(t *testing.T) {
	b := newBed(t)
	b.pod("a", "server", tags{"app": "server"}, "10.42.0.2", "fd00:42::2")
	client := b.pod("a", "client", tags{"app": "client"}, "10.42.0.3", "fd00:42::3")
	stranger := b.pod("b", "stranger", nil, "10.42.0.4", "fd00:42::4")
	b.policy("a", "allow", `
podSelector: {matchLabels: {app: server}}
ingress:
- from: [{podSelector: {matchLabels: {app: client}}}, {ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.7/32]}}]
  ports: [{port: web}, {port: 8080, protocol: UDP}, {port: 9000, endPort: 9010, protocol: SCTP}, {protocol: SCTP}]`)
	open := traffic(client, "10.42.0.2", testTimeout)
	closed := traffic(stranger, "10.42.0.2", 50*time.Millisecond)

	b.stop()
	handles := handlesOf(t)
	b.start()
	b.settle()
	if after := handlesOf(t); after != handles {
		t.Errorf("taking over has changed the table:\n%s\n%s", handles, after)
	}
	b.stop()
	// An older version's table.
	b.nft("add rule inet kedge-netpol input accept")
	b.start()
	b.settle()
	for i := range 20 {
		b.policy("a", "more", fmt.Sprintf(`{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: %d}]}]}`, 9000+i))
	}
	if passed, failed := open(); failed > 0 || passed == 0 {
		t.Errorf("allowed connections: %d passed, %d did not", passed, failed)
	} else {
		t.Logf("%d connections passed", passed)
	}
	if passed, failed := closed(); passed > 0 || failed == 0 {
		t.Errorf("forbidden connections: %d passed, %d did not", passed, failed)
	} else {
		t.Logf("%d connections did not pass", failed)
	}
}

func handlesOf(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("nft", "-a", "list", "table", "inet", table).Output()
	must(t, err)
	var lines []string
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "# handle") && !strings.Contains(line, "counter") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

// TestFlush: others remove all rules.
func TestFlush(t *testing.T) {
	b := newBed(t)
	b.pod("a", "server", nil, "10.42.0.2")
	stranger := b.pod("b", "stranger", nil, "10.42.0.4")
	b.policy("a", "deny", denyIngress)
	for _, flush := range []string{"flush ruleset", "flush table inet kedge-netpol", "delete chain inet kedge-netpol postrouting"} {
		b.nft(flush)
		conn := b.hold(stranger, "10.42.0.2")
		start := time.Now()
		eventually(t, flush, func() error {
			if stranger.try("tcp", addr("10.42.0.2"), 8080, quick) == nil {
				return errors.New("still open")
			}
			return nil
		})
		t.Logf("%s: closed again after %s", flush, time.Since(start))
		ended(t, conn)
	}
}

// TestFirstPacket: a pod is closed until it is announced, and afterwards just as policies say, at once.
func TestFirstPacket(t *testing.T) {
	b := newBed(t)
	client := b.pod("a", "client", tags{"app": "client"}, "10.42.0.3", "fd00:42::3")
	stranger := b.pod("b", "stranger", nil, "10.42.0.4", "fd00:42::4")
	b.policy("a", "allow", `
podSelector: {matchLabels: {app: server}}
policyTypes: [Ingress, Egress]
ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
egress: [{to: [{podSelector: {matchLabels: {app: client}}}]}]`)
	for i := range 5 {
		four, six := fmt.Sprintf("10.42.0.%d", 20+i), fmt.Sprintf("fd00:42::%x", 20+i)
		server := b.createPod("a", fmt.Sprint("server-", i), tags{"app": "server"}, four, six)
		together(
			func() { server.closed(t, "10.42.0.3", 8080) },
			func() { server.closed(t, "10.42.0.1", 8080) },
			func() { client.closed(t, four, 8080) },
			func() { client.closed(t, six, 8080) },
		)
		start := time.Now()
		must(t, b.announce("a", fmt.Sprint("server-", i), four, six))
		t.Logf("announced in %s", time.Since(start))
		server.open(t, "10.42.0.3", 8080)
		server.open(t, "fd00:42::3", 8080)
		client.open(t, four, 8080)
		together(
			func() { server.closed(t, "10.42.0.4", 8080) },
			func() { stranger.closed(t, six, 8080) },
		)
	}
}

// TestAnnouncements: release, a pod that the API does not know, one that is gone from it, an address that is given out again, a restart.
func TestAnnouncements(t *testing.T) {
	b := newBed(t)
	client := b.pod("a", "client", nil, "10.42.0.3")
	b.pod("a", "server", tags{"app": "server"}, "10.42.0.2")
	b.policy("a", "deny", `{podSelector: {matchLabels: {app: server}}}`)
	client.closed(t, "10.42.0.2", 8080)

	// Removed by force, still running: what applied to it still does.
	must(t, b.api.CoreV1().Pods("a").Delete(context.Background(), "server", metav1.DeleteOptions{}))
	for range 2 {
		eventually(t, "API", func() error {
			if n := len(b.ctl.watch.local.GetStore().ListKeys()); n != 1 {
				return fmt.Errorf("%d pods", n)
			}
			return nil
		})
		client.closed(t, "10.42.0.2", 8080)
		if d := b.decide(ingress, "10.42.0.3", "10.42.0.2"); d.Allowed || !d.Isolated {
			t.Errorf("a pod that the API has lost: %+v", d)
		}
		b.stop()
		b.start()
	}

	// Its address becomes another's before anybody has released it.
	b.create(newPod("a", "next", testNode, nil))
	must(t, b.announce("a", "next", "10.42.0.2"))
	client.open(t, "10.42.0.2", 8080)
	if _, err := os.Stat(announce.File(b.cfg.Dir, b.ids["a/server"])); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the announcement of the last owner: %v", err)
	}
	pod := announce.Pod{Container: b.ids["a/next"], Namespace: "a", Name: "next", Addresses: addrsOf([]string{"10.42.0.2"})}
	must(t, announce.Check(b.cfg.Socket, pod))

	conn := b.hold(client, "10.42.0.2")
	must(t, announce.Release(b.cfg.Socket, b.cfg.Dir, b.ids["a/next"]))
	eventually(t, "released", func() error {
		if client.try("tcp", addr("10.42.0.2"), 8080, quick) == nil {
			return errors.New("still open")
		}
		return nil
	})
	ended(t, conn)
	if err := announce.Check(b.cfg.Socket, pod); err == nil {
		t.Error("a released pod passes the check")
	}

	// Without a node process; and with an announcement that is damaged.
	b.stop()
	must(t, os.WriteFile(announce.File(b.cfg.Dir, "damaged"), []byte("{"), 0o600))
	must(t, announce.Release(b.cfg.Socket, b.cfg.Dir, b.ids["a/client"]))
	b.start()
	if d := b.known("10.42.0.3"); d {
		t.Error("released while no process was there, and still known")
	}
}

// TestLearnt: pods from before there were announcements are known from the API, and may be on other nodes.
func TestLearnt(t *testing.T) {
	b := newBed(t)
	s := newSpace(t)
	s.attach("veth2", addrsOf([]string{"10.42.0.2"}))
	s.listen(8080)
	other := b.other("192.0.2.1", "10.42.1.2/32", "10.42.1.3/32")
	b.create(newPod("a", "old", testNode, nil, "10.42.0.2"))
	b.create(newPod("a", "far", "node-2", tags{"app": "client"}, "10.42.1.2"))
	done := newPod("a", "done", "node-2", tags{"app": "client"}, "10.42.1.3")
	done.Status.Phase = corev1.PodSucceeded
	b.create(done)
	b.policy("a", "allow", `{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]}`)
	from := func(source string) error {
		return other.Do(func() error {
			d := net.Dialer{Timeout: 2 * quick, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr(source), 0))}
			conn, err := d.Dial("tcp", "10.42.0.2:8080")
			if err == nil {
				conn.Close()
			}
			return err
		})
	}
	must(t, from("10.42.1.2"))
	for _, source := range []string{"10.42.1.3", "192.0.2.1"} {
		if from(source) == nil {
			t.Errorf("from %s: open, want it closed", source)
		}
	}
	node.open(t, "10.42.0.2", 8080)
}

func (b *bed) decide(d direction, from, to string) Decision {
	b.ctl.mu.Lock()
	defer b.ctl.mu.Unlock()
	return b.ctl.rules.decide(d, flow{addr(from), addr(to), "tcp", 8080})
}

func (b *bed) known(a string) bool {
	b.ctl.mu.Lock()
	defer b.ctl.mu.Unlock()
	return b.ctl.rules.knows(addr(a))
}
