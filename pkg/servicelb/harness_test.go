// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/tests/netns"
)

// TestMain runs the tests once more in a namespace: everything that they do to "the node" happens there.
func TestMain(m *testing.M) { os.Exit(netns.Main(m)) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func testLog(t testing.TB) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

// eventually waits for f to succeed.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// space is a network namespace: a pod's or another machine's. A nil one is the node.
type space struct{ *netns.Space }

// do runs f inside. Sockets that it makes stay there.
func (s *space) do(f func() error) error {
	if s == nil {
		return f()
	}
	return s.Do(f)
}

// connect makes a namespace behind a cable to the node's interface name. The node has the addresses near, the namespace far.
func connect(t testing.TB, name string, near, far []string) *space {
	t.Helper()
	s := &space{netns.New(t)}
	s.Cable(t, name)
	must(t, setUp(name, near))
	must(t, s.do(func() error { return errors.Join(setUp("lo", nil), setUp("eth0", far)) }))
	return s
}

func setUp(name string, addresses []string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	errs := []error{netlink.LinkSetUp(link)}
	for _, text := range addresses {
		a, err := netlink.ParseAddr(text)
		if err != nil {
			return err
		}
		if a.IP.To4() == nil {
			a.Flags = unix.IFA_F_NODAD
		}
		errs = append(errs, netlink.AddrAdd(link, a))
	}
	return errors.Join(errs...)
}

// route sends everything of an address family through a gateway.
func (s *space) route(t testing.TB, via string) {
	t.Helper()
	must(t, s.do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		gw := addr(via)
		dst := &net.IPNet{IP: make(net.IP, gw.BitLen()/8), Mask: net.CIDRMask(0, gw.BitLen())}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: gw.AsSlice()})
	}))
}

// serve answers on a port, with TCP and UDP: a line with its name and the client's address.
func (s *space) serve(t testing.TB, name string, port int) {
	t.Helper()
	must(t, s.do(func() error {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		pc, err := net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close(); pc.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintln(c, name, c.RemoteAddr().(*net.TCPAddr).IP)
				c.Close()
			}
		}()
		go func() {
			b := make([]byte, 100)
			for {
				_, from, err := pc.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = pc.WriteTo([]byte(fmt.Sprintln(name, from.(*net.UDPAddr).IP)), from)
			}
		}()
		return nil
	}))
}

// ask returns who answers, and the client's address that it sees.
func (s *space) ask(network, to string, port int) (who, seen string, err error) {
	var line string
	err = s.do(func() error {
		c, err := net.DialTimeout(network, net.JoinHostPort(to, fmt.Sprint(port)), 4*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		line, err = say(c)
		return err
	})
	who, seen, _ = strings.Cut(strings.TrimSpace(line), " ")
	return who, seen, err
}

func say(c net.Conn) (string, error) {
	if err := c.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return "", err
	}
	if c.RemoteAddr().Network() == "udp" {
		if _, err := c.Write([]byte("?")); err != nil {
			return "", err
		}
	}
	return bufio.NewReader(c).ReadString('\n')
}
