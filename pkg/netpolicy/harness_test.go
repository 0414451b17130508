// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/tests/netns"
)

// TestMain runs the tests once more in a namespace: everything that they do to "the node" happens there.
func TestMain(m *testing.M) { os.Exit(netns.Main(m)) }

const (
	testTimeout = 20 * time.Second
	// quick is how long a packet gets that should not arrive.
	quick = 300 * time.Millisecond
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func addrsOf(texts []string) (addrs []netip.Addr) {
	for _, text := range texts {
		addrs = append(addrs, addr(text))
	}
	return addrs
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits for f to succeed.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(testTimeout)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// space is a network namespace: a pod's or another machine's.
type space struct {
	*netns.Space
	t testing.TB
}

func newSpace(t testing.TB) *space {
	t.Helper()
	return &space{netns.New(t), t}
}

// attach gives s the addresses and connects it to the node the way that the plugin ptp does; more are ranges that are behind s.
func (s *space) attach(name string, addrs []netip.Addr, more ...string) {
	s.t.Helper()
	host := s.Cable(s.t, name)
	must(s.t, s.Do(func() error { return setUp(addrs) }))
	must(s.t, netlink.LinkSetUp(host))
	for _, a := range addrs {
		gw := gatewayOf(a)
		must(s.t, netlink.AddrReplace(host, &netlink.Addr{IPNet: single(gw), Flags: unix.IFA_F_NODAD}))
		must(s.t, netlink.RouteReplace(&netlink.Route{LinkIndex: host.Index, Dst: single(a), Scope: scopeOf(a)}))
		for _, m := range more {
			if _, dst, _ := net.ParseCIDR(m); (dst.IP.To4() != nil) == a.Is4() {
				must(s.t, netlink.RouteReplace(&netlink.Route{LinkIndex: host.Index, Dst: dst, Gw: a.AsSlice()}))
			}
		}
	}
}

func scopeOf(a netip.Addr) netlink.Scope {
	if a.Is6() {
		return netlink.SCOPE_UNIVERSE
	}
	return netlink.SCOPE_LINK
}

func single(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func gatewayOf(a netip.Addr) netip.Addr {
	if a.Is4() {
		return addr("10.42.0.1")
	}
	return addr("fd00:42::1")
}

func setUp(addrs []netip.Addr) error {
	for _, name := range []string{"lo", "eth0"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		if name == "lo" {
			continue
		}
		for _, a := range addrs {
			gw := gatewayOf(a)
			def := &net.IPNet{IP: make(net.IP, a.BitLen()/8), Mask: net.CIDRMask(0, a.BitLen())}
			if err := errors.Join(
				netlink.AddrAdd(link, &netlink.Addr{IPNet: single(a), Flags: unix.IFA_F_NODAD}),
				netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: single(gw), Scope: scopeOf(a)}),
				netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: def, Gw: gw.AsSlice()}),
			); err != nil {
				return err
			}
		}
	}
	return nil
}

// listen answers on a port with TCP and UDP: whoever connects gets back what it sends.
func (s *space) listen(port uint16) {
	s.t.Helper()
	must(s.t, s.Do(func() error { return serveEcho(s.t, "", port) }))
}

func serveEcho(t testing.TB, host string, port uint16) error {
	l, err := net.Listen("tcp", fmt.Sprintf("%s:%d", host, port))
	if err != nil {
		return err
	}
	pc, err := net.ListenPacket("udp", fmt.Sprintf("%s:%d", host, port))
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); pc.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer conn.Close(); _, _ = io.Copy(conn, conn) }()
		}
	})
	wg.Go(func() {
		b := make([]byte, 1500)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo(b[:n], from)
		}
	})
	return nil
}

// dial opens a connection and sees an answer on it. A nil s is the node.
func (s *space) dial(network string, to netip.Addr, port uint16, timeout time.Duration) (conn net.Conn, err error) {
	open := func() error {
		conn, err = net.DialTimeout(network, netip.AddrPortFrom(to, port).String(), timeout)
		return err
	}
	if s == nil {
		err = open()
	} else {
		err = s.Do(open)
	}
	if err != nil {
		return nil, err
	}
	if err := ping(conn, timeout); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func ping(conn net.Conn, timeout time.Duration) error {
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("hello")); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 5))
	return err
}

func (s *space) try(network string, to netip.Addr, port uint16, timeout time.Duration) error {
	conn, err := s.dial(network, to, port, timeout)
	if err == nil {
		conn.Close()
	}
	return err
}

// open fails unless all kinds of connections pass, closed unless none does. A nil s is the node.
func (s *space) open(t testing.TB, to string, port uint16, networks ...string) {
	t.Helper()
	for _, network := range networksOr(networks) {
		if err := s.try(network, addr(to), port, 3*time.Second); err != nil {
			t.Errorf("%s to %s port %d: %v, want it open", network, to, port, err)
		}
	}
}

func (s *space) closed(t testing.TB, to string, port uint16, networks ...string) {
	t.Helper()
	var wg sync.WaitGroup
	for _, network := range networksOr(networks) {
		wg.Go(func() {
			if s.try(network, addr(to), port, quick) == nil {
				t.Errorf("%s to %s port %d: open, want it closed", network, to, port)
			}
		})
	}
	wg.Wait()
}

// together does all at the same time: what has to stay closed takes its time to tell.
func together(all ...func()) {
	var wg sync.WaitGroup
	for _, f := range all {
		wg.Go(f)
	}
	wg.Wait()
}

func networksOr(networks []string) []string {
	if len(networks) == 0 {
		return []string{"tcp", "udp"}
	}
	return networks
}
