// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/knftables"

	"github.com/kedge-io/kedge/tests/netns"
)

// site is a node with two pods, one network to another machine, and the rules in the kernel.
type site struct {
	table                *table
	outside, pod1, pod2  *space
	node4, node6         string
	pod1Addrs, pod2Addrs []netip.Addr
}

func newSite(t *testing.T) *site {
	t.Helper()
	netns.NeedNode(t)
	nft, err := knftables.New(knftables.InetFamily, nftTable)
	must(t, err)
	s := &site{
		table: &table{nft: nft, pods: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd00:42::/56")}},
		node4: "192.0.2.1", node6: "fd00:9::1",
		pod1Addrs: []netip.Addr{addr("10.42.1.2"), addr("fd00:42:0:1::2")}, pod2Addrs: []netip.Addr{addr("10.42.2.2"), addr("fd00:42:0:2::2")},
		outside: connect(t, "up", []string{"192.0.2.1/24", "fd00:9::1/64"}, []string{"192.0.2.9/24", "fd00:9::9/64", "192.0.2.10/24"}),
		pod1:    connect(t, "pod1", []string{"10.42.1.1/24", "fd00:42:0:1::1/64"}, []string{"10.42.1.2/24", "fd00:42:0:1::2/64"}),
		pod2:    connect(t, "pod2", []string{"10.42.2.1/24", "fd00:42:0:2::1/64"}, []string{"10.42.2.2/24", "fd00:42:0:2::2/64"}),
	}
	t.Cleanup(func() { must(t, Cleanup(context.Background())) })
	s.outside.route(t, "192.0.2.1")
	s.outside.route(t, "fd00:9::1")
	for i, pod := range []*space{s.pod1, s.pod2} {
		pod.route(t, fmt.Sprintf("10.42.%d.1", i+1))
		pod.route(t, fmt.Sprintf("fd00:42:0:%d::1", i+1))
		pod.serve(t, fmt.Sprintf("pod%d", i+1), 8080)
	}
	return s
}

func (s *site) write(t *testing.T, frontends ...frontend) {
	t.Helper()
	_, err := s.table.write(t.Context(), served{addresses: []netip.Addr{addr(s.node4), addr(s.node6)}, frontends: frontends})
	must(t, err)
}

// front is a frontend on port 80 with endpoints on port 8080.
func front(protocol string, endpoints ...netip.Addr) frontend {
	f := frontend{service: types.NamespacedName{Namespace: "ns", Name: "web"}, family: family(endpoints[0]), protocol: protocol, port: 80}
	for _, a := range endpoints {
		f.inside = append(f.inside, netip.AddrPortFrom(a, 8080))
	}
	f.outside = f.inside
	return f
}

// answers asks some times.
func answers(t *testing.T, name string, from *space, network, to string, times int) (names map[string]int, seen string) {
	t.Helper()
	names = map[string]int{}
	for range times {
		who, client, err := from.ask(network, to, 80)
		for tries := 0; err != nil && tries < 3; tries++ { // neighbours have to be found, on a machine that may be busy
			who, client, err = from.ask(network, to, 80)
		}
		if err != nil {
			t.Fatalf("%s, %s to %s: %v", name, network, to, err)
		}
		names[who]++
		seen = client
	}
	return names, seen
}

func TestClusterPolicy(t *testing.T) {
	s := newSite(t)
	var all []frontend
	for _, protocol := range []string{"tcp", "udp"} {
		all = append(all, front(protocol, s.pod1Addrs[0], s.pod2Addrs[0]), front(protocol, s.pod1Addrs[1], s.pod2Addrs[1]))
	}
	s.write(t, all...)
	for _, network := range []string{"tcp", "udp"} {
		for _, to := range []string{s.node4, s.node6} {
			for name, from := range map[string]*space{"another machine": s.outside, "the node": nil, "a pod": s.pod1} {
				names, seen := answers(t, name, from, network, to, 30)
				if names["pod1"] == 0 || names["pod2"] == 0 {
					t.Errorf("%s, %s to %s: answers of %v, want both pods", name, network, to, names)
				}
				if from == s.outside && strings.HasSuffix(seen, "9") {
					t.Errorf("%s to %s: the pod sees the client %s, want the node", network, to, seen)
				}
			}
		}
	}
	if _, _, err := s.outside.ask("tcp", "10.42.1.1", 80); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("another address of the node: %v, want a refusal", err)
	}
}

func TestLocalPolicy(t *testing.T) {
	s := newSite(t)
	for i, to := range []string{s.node4, s.node6} {
		f := front("tcp", s.pod1Addrs[i], s.pod2Addrs[i])
		f.keep, f.outside = true, f.outside[:1] // as if the second were on another node
		s.write(t, f)
		names, seen := answers(t, "another machine", s.outside, "tcp", to, 20)
		if names["pod1"] != 20 || seen != []string{"192.0.2.9", "fd00:9::9"}[i] {
			t.Errorf("%s from outside: %v, the pod sees %s; want pod1 alone and the client's address", to, names, seen)
		}
		for name, from := range map[string]*space{"the node": nil, "the pod itself": s.pod1, "another pod": s.pod2} {
			if names, _ := answers(t, name, from, "tcp", to, 30); len(names) != 2 {
				t.Errorf("%s from %s: %v, want both pods", to, name, names)
			}
		}
		f.outside = nil
		s.write(t, f)
		if _, _, err := s.outside.ask("tcp", to, 80); err == nil || errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s from outside without a pod here: %v, want silence", to, err)
		}
	}
}

func TestAffinity(t *testing.T) {
	s := newSite(t)
	f := front("tcp", s.pod1Addrs[0], s.pod2Addrs[0])
	f.affinity = 60
	s.write(t, f)
	first, _ := answers(t, "another machine", s.outside, "tcp", s.node4, 15)
	if len(first) != 1 {
		t.Fatalf("one client is answered by %v", first)
	}
	// Another change must not forget it.
	other := front("tcp", s.pod1Addrs[0])
	other.service.Name, other.port = "another", 81
	s.write(t, f, other)
	again, _ := answers(t, "another machine", s.outside, "tcp", s.node4, 15)
	if len(again) != 1 || !slices.Equal(keys(first), keys(again)) {
		t.Errorf("after a change of the rules %v, before %v", again, first)
	}
	s.write(t, front("tcp", s.pod1Addrs[0], s.pod2Addrs[0]))
	if names, _ := answers(t, "another machine", s.outside, "tcp", s.node4, 30); len(names) != 2 {
		t.Errorf("without affinity: %v", names)
	}
}

func keys(m map[string]int) []string {
	var list []string
	for k := range m {
		list = append(list, k)
	}
	return list
}

func TestNoEndpointsAndSources(t *testing.T) {
	s := newSite(t)
	var here *space
	here.serve(t, "host", 80) // the node's own server loses its clients
	f := front("tcp", s.pod1Addrs[0])
	f.inside, f.outside = nil, nil
	s.write(t, f)
	if who, _, err := s.outside.ask("tcp", s.node4, 80); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("without endpoints: %q, %v; want a refusal", who, err)
	}
	f = front("tcp", s.pod1Addrs[0])
	all, err := listeners()
	must(t, err)
	if _, ok := f.eclipsed(all, []netip.Addr{addr(s.node4)}); !ok {
		t.Errorf("nothing is known of the node's own server: %v", all)
	}
	f.sources = []netip.Prefix{netip.MustParsePrefix("192.0.2.10/32"), netip.MustParsePrefix("198.51.100.0/24")}
	s.write(t, f)
	if who, _, err := s.outside.ask("tcp", s.node4, 80); err == nil {
		t.Errorf("a client that is not in loadBalancerSourceRanges is answered by %s", who)
	}
	if who, _, err := here.ask("tcp", s.node4, 80); who != "pod1" {
		t.Errorf("the node itself: %q, %v", who, err)
	}
	f.sources = append(f.sources, netip.MustParsePrefix("192.0.2.9/32"))
	s.write(t, f)
	if who, _, err := s.outside.ask("tcp", s.node4, 80); who != "pod1" {
		t.Errorf("a client in loadBalancerSourceRanges: %q, %v", who, err)
	}
	s.write(t)
	if who, _, err := s.outside.ask("tcp", s.node4, 80); who != "host" {
		t.Errorf("without a Service: %q, %v; want the node's own server", who, err)
	}
}

// A UDP client that never stops gets another endpoint when its own is gone, and one that came before the Service gets an endpoint.
func TestUDPMoves(t *testing.T) {
	s := newSite(t)
	var c net.Conn
	must(t, s.outside.do(func() (err error) { c, err = net.Dial("udp", s.node4+":80"); return err }))
	defer c.Close()
	_, _ = say(c) // refused
	for _, pod := range []struct {
		name string
		addr netip.Addr
	}{{"pod1", s.pod1Addrs[0]}, {"pod2", s.pod2Addrs[0]}} {
		s.write(t, front("udp", pod.addr))
		eventually(t, "an answer of "+pod.name, func() error {
			line, err := say(c)
			if err == nil && !strings.HasPrefix(line, pod.name) {
				err = fmt.Errorf("answer: %s", line)
			}
			return err
		})
	}
}

func TestTableComesBack(t *testing.T) {
	s := newSite(t)
	f := front("tcp", s.pod1Addrs[0])
	s.write(t, f)
	if !s.table.look(t.Context()) {
		t.Fatal("the rules are missing right after they were written")
	}
	must(t, removeTable(t.Context(), s.table.nft))
	if s.table.look(t.Context()) {
		t.Fatal("nobody notices that the table is gone")
	}
	s.write(t, f)
	if who, _, err := s.outside.ask("tcp", s.node4, 80); who != "pod1" {
		t.Errorf("%q, %v", who, err)
	}
	// Another process finds the rules and changes nothing that serves.
	next := &table{nft: s.table.nft, pods: s.table.pods}
	if _, err := next.write(t.Context(), s.table.last); err != nil {
		t.Error(err)
	}
	must(t, Cleanup(t.Context()))
	must(t, Cleanup(t.Context()))
	if have, err := list(t.Context(), s.table.nft); err != nil || len(have.chains) > 0 {
		t.Errorf("after Cleanup: %v, %v", have, err)
	}
}

// A neighbour hears the announcements, asks for the addresses and gets an answer; released ones are gone, and others go by themselves.
func TestAnnouncer(t *testing.T) {
	s := newSite(t)
	a := announcer{log: testLog(t)}
	vip4, vip6 := addr("192.0.2.200"), addr("fd00:9::200")
	heard := hear(t, s.outside)
	must(t, a.apply(map[netip.Addr]time.Duration{vip4: 5 * time.Second, vip6: 5 * time.Second}))
	var here *space
	here.serve(t, "host", 80)
	announced := map[netip.Addr]bool{} // in either order
	for _, vip := range []netip.Addr{vip4, vip6} {
		if who, seen, err := s.outside.ask("tcp", vip.String(), 80); who != "host" {
			t.Errorf("%s: %q, %s, %v", vip, who, seen, err)
		}
		eventually(t, "the announcement of "+vip.String(), func() error {
			select {
			case got := <-heard:
				announced[got] = true
			default:
			}
			if !announced[vip] {
				return fmt.Errorf("heard of %v", announced)
			}
			return nil
		})
	}
	if from := sourceTo(t, "fd00:9::9"); from != "fd00:9::1" {
		t.Errorf("the node speaks to others from %s", from)
	}
	must(t, a.apply(map[netip.Addr]time.Duration{vip6: time.Second}))
	if bound(t, vip4) {
		t.Error("a released address is still bound")
	}
	eventually(t, "the address that is not prolonged to go", func() error {
		if bound(t, vip6) {
			return errors.New("it is there")
		}
		return nil
	})
	if err := a.apply(map[netip.Addr]time.Duration{addr("192.0.2.1"): time.Second}); err == nil || !bound(t, addr("192.0.2.1")) {
		t.Errorf("the node's own address: %v", err)
	}
	if err := a.apply(map[netip.Addr]time.Duration{addr("203.0.113.1"): time.Second}); err == nil {
		t.Error("an address of no network here was bound")
	}
	a.beside = addr("192.0.2.1")
	must(t, a.apply(map[netip.Addr]time.Duration{addr("203.0.113.1"): time.Second}))
	must(t, a.apply(nil))
}

// A neighbour that knows an address with the last holder's MAC goes to the new holder at once, whatever state its entry is in, and one that
// has given up asking does so, too. Without announcements that takes the time until it doubts what it knows: up to a minute.
func TestAnnouncementMovesNeighbours(t *testing.T) {
	for name, state := range map[string]int{
		"reachable": netlink.NUD_REACHABLE, "stale": netlink.NUD_STALE, "delay": netlink.NUD_DELAY, "incomplete": netlink.NUD_INCOMPLETE, "failed": netlink.NUD_FAILED,
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			a := announcer{log: testLog(t)}
			var here *space
			here.serve(t, "host", 80)
			node, err := netlink.LinkByName("up")
			must(t, err)
			for _, vip := range []netip.Addr{addr("192.0.2.200"), addr("fd00:9::200")} {
				entry := &netlink.Neigh{IP: vip.AsSlice(), State: state}
				known := state&(netlink.NUD_INCOMPLETE|netlink.NUD_FAILED) == 0
				if known {
					entry.HardwareAddr = net.HardwareAddr{2, 0, 0, 0, 0, 99}
				}
				neighbour := func() (found netlink.Neigh) {
					must(t, s.outside.do(func() error {
						list, err := netlink.NeighList(entry.LinkIndex, 0)
						for _, n := range list {
							if n.IP.Equal(entry.IP) {
								found = n
							}
						}
						return err
					}))
					return found
				}
				must(t, s.outside.do(func() error {
					link, err := netlink.LinkByName("eth0")
					if err != nil {
						return err
					}
					entry.LinkIndex = link.Attrs().Index
					return netlink.NeighSet(entry)
				}))
				if n := neighbour(); n.State != state {
					t.Fatalf("the neighbour's entry is %+v", n)
				}
				begin := time.Now()
				must(t, a.apply(map[netip.Addr]time.Duration{vip: 5 * time.Second}))
				if known {
					eventually(t, "the neighbour to know the new holder", func() error {
						if n := neighbour(); !slices.Equal(n.HardwareAddr, node.Attrs().HardwareAddr) {
							return fmt.Errorf("%+v", n)
						}
						return nil
					})
				}
				if who, _, err := s.outside.ask("tcp", vip.String(), 80); who != "host" {
					t.Errorf("%s: %q, %v", vip, who, err)
				}
				if took := time.Since(begin); took > 4*time.Second {
					t.Errorf("%s: an answer after %s", vip, took)
				}
			}
		})
	}
}

func bound(t *testing.T, a netip.Addr) bool {
	t.Helper()
	all, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	must(t, err)
	return slices.ContainsFunc(all, func(have netlink.Addr) bool { return have.IP.Equal(a.AsSlice()) })
}

func sourceTo(t *testing.T, to string) string {
	t.Helper()
	c, err := net.Dial("udp", net.JoinHostPort(to, "9"))
	must(t, err)
	defer c.Close()
	host, _, _ := net.SplitHostPort(c.LocalAddr().String())
	return host
}

// hear listens for gratuitous ARP and unsolicited neighbour advertisements.
func hear(t *testing.T, s *space) <-chan netip.Addr {
	t.Helper()
	heard := make(chan netip.Addr, 100)
	must(t, s.do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, int(bigEndian(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(fd) })
		go func() {
			b := make([]byte, 1500)
			for {
				n, _, err := unix.Recvfrom(fd, b, 0)
				if err != nil {
					return
				}
				if n >= 28 && b[0] == 0 && b[1] == 1 && slices.Equal(b[14:18], b[24:28]) {
					a, _ := netip.AddrFromSlice(b[14:18])
					heard <- a
				}
				if n >= 64 && b[0]>>4 == 6 && b[6] == unix.IPPROTO_ICMPV6 && b[40] == 136 && b[44] == 0xa0 {
					a, _ := netip.AddrFromSlice(b[48:64])
					heard <- a
				}
			}
		}()
		return nil
	}))
	return heard
}
