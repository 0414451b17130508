// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/tests/netns"
)

func TestServiceRoutes(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, for a network namespace")
	}
	services := config.Prefixes{netip.MustParsePrefix("10.43.0.0/16"), netip.MustParsePrefix("fd43::/112")}
	own := []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")}
	err := netns.New(t).Do(func() error {
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer"}
		other := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "peer"}}
		if err := errors.Join(netlink.LinkAdd(link), netlink.LinkSetUp(link), netlink.LinkSetUp(other)); err != nil {
			return err
		}
		if err := ensureServiceRoutes(services, own); err == nil {
			return errors.New("no error without the node's address")
		}
		for _, text := range []string{"192.0.2.7/24", "2001:db8::7/64"} {
			a, err := netlink.ParseAddr(text)
			if err == nil {
				a.Flags = unix.IFA_F_NODAD
				err = netlink.AddrAdd(link, a)
			}
			if err != nil {
				return err
			}
		}
		for range 2 {
			if err := ensureServiceRoutes(services, own); err != nil {
				return err
			}
		}
		for i, to := range []string{"10.43.0.1", "fd43::1"} {
			got, err := netlink.RouteGet(netip.MustParseAddr(to).AsSlice())
			if err != nil || len(got) != 1 || !got[0].Src.Equal(own[i].AsSlice()) {
				return fmt.Errorf("to %s: %+v, %w", to, got, err)
			}
		}
		if err := errors.Join(removeServiceRoutes(), removeServiceRoutes()); err != nil {
			return err
		}
		if _, err := netlink.RouteGet(netip.MustParseAddr("10.43.0.1").AsSlice()); err == nil {
			return errors.New("the route is left")
		}
		// With a default route none is made.
		gw := netip.MustParseAddr("192.0.2.1").AsSlice()
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Index, Gw: gw}); err != nil {
			return err
		}
		if err := ensureServiceRoutes(services[:1], own); err != nil {
			return err
		}
		got, err := netlink.RouteGet(netip.MustParseAddr("10.43.0.1").AsSlice())
		if err != nil || len(got) != 1 || !got[0].Gw.Equal(gw) {
			return fmt.Errorf("with a default route: %+v, %w", got, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
