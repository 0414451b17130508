// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"testing"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/tests/netns"
)

// TestSkipOnNode: the gateway on the pod's device is usable at once; devices of other plugins do not have it.
func TestSkipOnNode(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, for a network namespace")
	}
	err := netns.New(t).Do(func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth0"}, PeerName: "peer"}
		if err := errors.Join(netlink.LinkAdd(veth), netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "bwp0"}, PeerName: "bwp1"}), netlink.LinkSetUp(veth)); err != nil {
			return err
		}
		gw, gw4 := net.ParseIP("fd42::1"), net.ParseIP("10.42.0.1")
		if err := netlink.AddrAdd(veth, &netlink.Addr{IPNet: &net.IPNet{IP: gw, Mask: net.CIDRMask(128, 128)}}); err != nil {
			return err
		}
		result := &current.Result{
			Interfaces: []*current.Interface{{Name: "veth0"}, {Name: "eth0", Sandbox: "/run/netns/x"}, {Name: "bwp0"}},
			IPs:        []*current.IPConfig{{Gateway: gw}, {Gateway: gw4}},
		}
		if err := errors.Join(skipOnNode(result), skipOnNode(result)); err != nil {
			return err
		}
		for _, name := range []string{"veth0", "bwp0"} {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			list, err := netlink.AddrList(link, netlink.FAMILY_V6)
			if err != nil {
				return err
			}
			found := false
			for _, a := range list {
				if a.IP.Equal(gw) {
					found = true
					if a.Flags&unix.IFA_F_TENTATIVE != 0 {
						return fmt.Errorf("%s is tentative", a.IP)
					}
				}
			}
			if found != (name == "veth0") {
				return fmt.Errorf("%s has the gateway: %v", name, found)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
