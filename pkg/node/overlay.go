// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/flannel-io/flannel/pkg/backend"
	"github.com/flannel-io/flannel/pkg/ip"
	"github.com/flannel-io/flannel/pkg/lease"
	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/config"
)

// Devices that flannel makes, all of its backends together.
const (
	vxlanDevice       = "flannel.1"
	vxlanDeviceV6     = "flannel-v6.1"
	wireguardDevice   = "flannel-wg"
	wireguardDeviceV6 = "flannel-wg-v6"
)

// What the overlays add to a packet: an Ethernet and an IP header, UDP, and their own.
const (
	vxlanOverhead     = 50
	vxlanOverheadV6   = 70
	wireguardOverhead = 80 // flannel's figure for both families
)

// devices are those of a backend, with what each takes from the link's MTU.
func devices(mode config.FlannelMode, pods config.Prefixes) map[string]int {
	list := map[string]int{}
	for _, p := range pods {
		switch {
		case mode == config.FlannelVXLAN && p.Addr().Is6():
			list[vxlanDeviceV6] = vxlanOverheadV6
		case mode == config.FlannelVXLAN:
			list[vxlanDevice] = vxlanOverhead
		case mode == config.FlannelWireGuard && p.Addr().Is6():
			list[wireguardDeviceV6] = wireguardOverhead
		case mode == config.FlannelWireGuard:
			list[wireguardDevice] = wireguardOverhead
		}
	}
	return list
}

// removeDevices removes the devices of flannel but for those to keep.
func removeDevices(keep map[string]int) error {
	var errs []error
	for _, name := range []string{vxlanDevice, vxlanDeviceV6, wireguardDevice, wireguardDeviceV6} {
		if _, ok := keep[name]; !ok {
			errs = append(errs, removeLink(name))
		}
	}
	return errors.Join(errs...)
}

func removeLink(name string) error {
	link, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("remove the interface %s: %w", name, err)
	}
	return nil
}

// externalInterface is where packets to other nodes leave: --flannel-iface, or the interface that has the node's address. The node's
// addresses come before others of the interface.
func externalInterface(cfg Config) (*backend.ExternalInterface, error) {
	iface, err := findInterface(cfg)
	if err != nil {
		return nil, fmt.Errorf("no interface for the pod network (--flannel-iface, --node-ip): %w", err)
	}
	ext := &backend.ExternalInterface{Iface: iface, IfaceName: iface.Name}
	for _, p := range cfg.ClusterCIDR {
		find, set, setExt := ip.GetInterfaceIP4Addrs, &ext.IfaceAddr, &ext.ExtAddr
		if p.Addr().Is6() {
			find, set, setExt = ip.GetInterfaceIP6Addrs, &ext.IfaceV6Addr, &ext.ExtV6Addr
		}
		list, err := find(iface)
		if err != nil {
			return nil, fmt.Errorf("the interface %s (--flannel-iface, --node-ip) for the pods' network %s: %w", iface.Name, p, err)
		}
		own := slices.IndexFunc(list, func(a net.IP) bool {
			return slices.ContainsFunc(cfg.Address, func(own netip.Addr) bool { return a.Equal(own.AsSlice()) })
		})
		*set = list[max(own, 0)]
		*setExt = *set
	}
	return ext, nil
}

func findInterface(cfg Config) (*net.Interface, error) {
	if cfg.Iface != "" {
		iface, err := net.InterfaceByName(cfg.Iface)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", cfg.Iface, err)
		}
		return iface, nil
	}
	list, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for i := range list {
		addrs, err := list[i].Addrs()
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(addrs, func(a net.Addr) bool { return strings.HasPrefix(a.String(), cfg.Address[0].String()+"/") }) {
			return &list[i], nil
		}
	}
	return nil, fmt.Errorf("no interface has the address %s", cfg.Address[0])
}

// tuneDevices gives devices the MTU that the link leaves, also those from before the link's changed, and returns the smallest:
// the pods'.
func tuneDevices(devices map[string]int, linkMTU int) (mtu int, err error) {
	mtu = linkMTU
	for name, overhead := range devices {
		mtu = min(mtu, linkMTU-overhead)
		link, err := netlink.LinkByName(name)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		if link.Attrs().MTU != linkMTU-overhead {
			if err := netlink.LinkSetMTU(link, linkMTU-overhead); err != nil {
				return 0, fmt.Errorf("set the MTU %d of %s: %w", linkMTU-overhead, name, err)
			}
		}
	}
	return mtu, nil
}

// setTxChecksum turns transmit checksum offload of a VXLAN device on or off (ethtool -K DEV tx off). With it on, some kernels and
// network cards send packets whose inner checksum nobody has filled in; the receiver drops them. With it off there is no segmentation
// offload either: each packet of TCP goes through the stack for itself.
func setTxChecksum(device string, on bool) error {
	e, err := ethtool.NewEthtool()
	if err != nil {
		return err
	}
	defer e.Close()
	return e.Change(device, map[string]bool{"tx-checksum-ip-generic": on})
}

// linkState is what the overlay depends on.
type linkState struct{ index, mtu int }

// links gives the state of interfaces by name.
func links(names ...string) (map[string]linkState, error) {
	list := map[string]linkState{}
	for _, name := range names {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		list[name] = linkState{link.Attrs().Index, link.Attrs().MTU}
	}
	return list, nil
}

// watchLinks returns an error when an interface goes away, is made anew or gets another MTU. nil if ctx ends before.
func watchLinks(ctx context.Context, was map[string]linkState) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(5 * time.Second):
		}
		is, err := links(slices.Collect(maps.Keys(was))...)
		if err != nil {
			return err
		}
		if !maps.Equal(is, was) {
			return fmt.Errorf("interfaces have changed: index and MTU were %v, are %v", was, is)
		}
	}
}

// via is how packets for a pod network leave this node.
type via struct {
	link    int
	gateway string
}

// pruneRoutes removes the routes into the pods' networks that lead elsewhere than wanted. Routes to single pods of this node have
// no gateway and are none of them.
func pruneRoutes(pods config.Prefixes, wanted map[string]via) error {
	var errs []error
	for _, p := range pods {
		family := netlink.FAMILY_V4
		if p.Addr().Is6() {
			family = netlink.FAMILY_V6
		}
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Dst == nil || r.Gw == nil {
				continue
			}
			if a, ok := netip.AddrFromSlice(r.Dst.IP); !ok || !p.Contains(a.Unmap()) {
				continue
			}
			if wanted[r.Dst.String()] != (via{r.LinkIndex, r.Gw.String()}) {
				errs = append(errs, netlink.RouteDel(&r))
			}
		}
	}
	return errors.Join(errs...)
}

// pruneNeighbours removes what a VXLAN device knows of hardware addresses that are not wanted: by pod network, and by node.
func pruneNeighbours(device string, hops, nodes map[string]string) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("%s: %w", device, err)
	}
	var errs []error
	for family, wanted := range map[int]map[string]string{unix.AF_INET: hops, unix.AF_INET6: hops, unix.AF_BRIDGE: nodes} {
		list, err := netlink.NeighList(link.Attrs().Index, family)
		if err != nil {
			return err
		}
		for _, n := range list {
			if n.State&netlink.NUD_PERMANENT == 0 || n.IP == nil || n.IP.IsMulticast() || wanted[n.HardwareAddr.String()] == n.IP.String() {
				continue
			}
			errs = append(errs, netlink.NeighDel(&n))
		}
	}
	return errors.Join(errs...)
}

// prune removes from the kernel's tables what leads to nodes that are gone, or were elsewhere, when this process was not running.
// Flannel itself only takes away what it has put there since its start.
func prune(mode config.FlannelMode, pods config.Prefixes, ext *backend.ExternalInterface, others map[string]lease.Lease) error {
	list, err := links(slices.Collect(maps.Keys(devices(mode, pods)))...)
	if err != nil {
		return err
	}
	routes := map[string]via{}
	hops, nodes := map[string]map[string]string{}, map[string]map[string]string{} // by device and hardware address
	for name := range list {
		hops[name], nodes[name] = map[string]string{}, map[string]string{}
	}
	add := func(device string, network *net.IPNet, node net.IP, data []byte) {
		switch mode {
		case config.FlannelHostGW:
			routes[network.String()] = via{ext.Iface.Index, node.String()}
		case config.FlannelVXLAN:
			routes[network.String()] = via{list[device].index, network.IP.String()}
			mac := vtepMAC(data)
			hops[device][mac], nodes[device][mac] = network.IP.String(), node.String()
		}
	}
	for _, l := range others {
		if l.EnableIPv4 {
			add(vxlanDevice, l.Subnet.ToIPNet(), l.Attrs.PublicIP.ToIP(), l.Attrs.BackendData)
		}
		if l.EnableIPv6 {
			add(vxlanDeviceV6, l.IPv6Subnet.ToIPNet(), l.Attrs.PublicIPv6.ToIP(), l.Attrs.BackendV6Data)
		}
	}
	errs := []error{pruneRoutes(pods, routes)}
	if mode == config.FlannelVXLAN {
		for name := range list {
			errs = append(errs, pruneNeighbours(name, hops[name], nodes[name]))
		}
	}
	return errors.Join(errs...)
}
