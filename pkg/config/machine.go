// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoNodeAddress says that the machine does not have the address that the node needs. It may come later, for
// example by DHCP.
var ErrNoNodeAddress = errors.New("no usable address for the node")

// machine is what the configuration depends on outside of itself.
type machine struct {
	hostname string
	links    []link
	routes   []defaultRoute
	// sourceTo gives the address that packets to a host are sent from.
	sourceTo func(host string) (netip.Addr, error)
	later    *[]error // see LoadToCheck; nil: Kedge starts now
}

// link is a network interface.
type link struct {
	index     int
	name      string
	kind      string // the kernel's name for it; "device" is hardware
	up        bool
	addresses []netip.Addr // permanent ones first
}

type defaultRoute struct {
	link   int
	metric int
	v6     bool
	source netip.Addr // the preferred source address, if the route has one
}

// thisMachine looks at the host name, the interfaces and the default routes.
func thisMachine() (machine, error) {
	hostname, err := os.Hostname()
	if err != nil {
		return machine{}, fmt.Errorf("ask the kernel for the host name: %w", err)
	}
	m := machine{hostname: hostname, sourceTo: sourceTo}
	links, err := netlink.LinkList()
	if err != nil {
		return machine{}, fmt.Errorf("list the network interfaces: %w", err)
	}
	for _, l := range links {
		attrs := l.Attrs()
		found := link{index: attrs.Index, name: attrs.Name, kind: l.Type(),
			up: attrs.Flags&net.FlagUp != 0 && attrs.Flags&net.FlagLoopback == 0}
		addresses, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return machine{}, fmt.Errorf("list the addresses of %s: %w", attrs.Name, err)
		}
		const passing = unix.IFA_F_SECONDARY | unix.IFA_F_DEPRECATED // IFA_F_SECONDARY is IFA_F_TEMPORARY in IPv6
		slices.SortStableFunc(addresses, func(a, b netlink.Addr) int { return cmp.Compare(a.Flags&passing, b.Flags&passing) })
		for _, a := range addresses {
			if ip, ok := netip.AddrFromSlice(a.IP); ok {
				found.addresses = append(found.addresses, ip.Unmap())
			}
		}
		m.links = append(m.links, found)
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return machine{}, fmt.Errorf("list the routes: %w", err)
		}
		for _, r := range routes {
			if !isDefault(r) {
				continue
			}
			source, _ := netip.AddrFromSlice(r.Src)
			indexes := []int{r.LinkIndex}
			for _, hop := range r.MultiPath {
				indexes = append(indexes, hop.LinkIndex)
			}
			for _, index := range indexes {
				m.routes = append(m.routes, defaultRoute{link: index, metric: r.Priority, v6: family == netlink.FAMILY_V6, source: source.Unmap()})
			}
		}
	}
	return m, nil
}

// sourceTo asks the kernel; connecting a UDP socket sends nothing.
func sourceTo(host string) (netip.Addr, error) {
	d := net.Dialer{Timeout: 2 * time.Second} // for the look-up of a name
	c, err := d.Dial("udp", net.JoinHostPort(host, "9"))
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	a, err := netip.ParseAddrPort(c.LocalAddr().String())
	return a.Addr().Unmap().WithZone(""), err
}

func isDefault(r netlink.Route) bool {
	if r.Type != unix.RTN_UNICAST {
		return false
	}
	if r.Dst == nil {
		return true
	}
	ones, _ := r.Dst.Mask.Size()
	return ones == 0
}

// chooseNodeIP picks the node's address and says why: the address of the wanted interface; else of the interface with
// the best default route; else the only usable one; else, of several, the first by interface name, hardware first, so
// that the choice is the same after each boot. Without a default route, addresses inside of the cluster's own networks
// do not count: an earlier run left them.
func (m machine) chooseNodeIP(v6 bool, wanted string, clusterNetworks ...netip.Prefix) (netip.Addr, string, error) {
	if wanted != "" {
		if l := m.find(wanted); l != nil && l.address(v6).IsValid() {
			return l.address(v6), "address of " + wanted + ", which flannel-iface names", nil
		}
		return netip.Addr{}, "", fmt.Errorf("%w: flannel-iface %s has none (this machine has %s)", ErrNoNodeAddress, wanted, m.addressList())
	}
	if a, reason := m.defaultRouteAddress(v6); a.IsValid() {
		return a, reason, nil
	}
	ofCluster := func(a netip.Addr) bool {
		return slices.ContainsFunc(clusterNetworks, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	candidates := slices.DeleteFunc(slices.Clone(m.links), func(l link) bool {
		return !l.up || l.ofContainers() || !l.address(v6).IsValid() || ofCluster(l.address(v6))
	})
	slices.SortFunc(candidates, func(a, b link) int {
		return cmp.Or(cmp.Compare(a.rank(), b.rank()), strings.Compare(a.name, b.name))
	})
	switch len(candidates) {
	case 0:
		return netip.Addr{}, "", fmt.Errorf("%w: this machine has %s; give an interface an address or set node-ip", ErrNoNodeAddress, m.addressList())
	case 1:
		return candidates[0].address(v6), fmt.Sprintf("address of %s, the only usable one; there is no default route", candidates[0].name), nil
	}
	var names []string
	for i := range candidates {
		names = append(names, fmt.Sprintf("%s on %s", candidates[i].address(v6), candidates[i].name))
	}
	return candidates[0].address(v6), fmt.Sprintf("there is no default route and several addresses could serve (%s); the first was taken, set node-ip to choose",
		strings.Join(names, ", ")), nil
}

// defaultRouteAddress gives the address that the default route with the lowest metric is used with, if any.
func (m machine) defaultRouteAddress(v6 bool) (netip.Addr, string) {
	routes := slices.Clone(m.routes)
	slices.SortStableFunc(routes, func(a, b defaultRoute) int { return cmp.Compare(a.metric, b.metric) })
	for _, r := range routes {
		i := slices.IndexFunc(m.links, func(l link) bool { return l.index == r.link })
		if r.v6 != v6 || i < 0 || !m.links[i].up {
			continue
		}
		l := &m.links[i]
		if usable(r.source, v6) && m.has(r.source) {
			return r.source, "source address of the default route through " + l.name
		}
		if a := l.address(v6); a.IsValid() {
			return a, "address of " + l.name + ", which has the default route"
		}
	}
	return netip.Addr{}, ""
}

// ChooseAddresses gives the addresses that the node would get if it started now, by the rules of --node-ip's default.
func (s *Config) ChooseAddresses() ([]netip.Addr, error) {
	m, err := thisMachine()
	if err != nil {
		return nil, err
	}
	list, _, err := s.chooseNodeIPs(m, true)
	return list, err
}

// usable says whether other machines can reach an address of the wanted family.
func usable(a netip.Addr, v6 bool) bool { return a.Is6() == v6 && a.IsGlobalUnicast() }

// address gives the first usable address of an interface, the zero value if there is none.
func (l *link) address(v6 bool) netip.Addr {
	for _, a := range l.addresses {
		if usable(a, v6) {
			return a
		}
	}
	return netip.Addr{}
}

// rank puts what leads to other machines before dummies and tunnels.
func (l *link) rank() int {
	switch l.kind {
	case "device", "bond", "team", "vlan", "bridge", "macvlan", "ipvlan", "veth":
		return 0
	default:
		return 1
	}
}

// ofContainers says that an interface belongs to containers or virtual machines on this machine.
func (l *link) ofContainers() bool {
	prefixes := []string{"docker", "br-", "virbr", "lxcbr", "lxdbr", "podman", "cni", "flannel", "cali", "cilium", "kube-", "nodelocaldns"}
	return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(l.name, p) })
}

func (m machine) find(name string) *link {
	for i := range m.links {
		if m.links[i].name == name {
			return &m.links[i]
		}
	}
	return nil
}

func (m machine) has(a netip.Addr) bool { return m.withAddress(a) != nil }

func (m machine) withAddress(a netip.Addr) *link {
	for i := range m.links {
		if slices.Contains(m.links[i].addresses, a) {
			return &m.links[i]
		}
	}
	return nil
}

// addressList names the addresses of the machine for an error message.
func (m machine) addressList() string {
	var list []string
	for _, l := range m.links {
		for _, a := range l.addresses {
			if !a.IsLoopback() && !a.IsLinkLocalUnicast() {
				list = append(list, a.String()+" on "+l.name)
			}
		}
	}
	if len(list) == 0 {
		return "no address at all"
	}
	return strings.Join(list, ", ")
}

func (m machine) linkList() string {
	names := make([]string, len(m.links))
	for i, l := range m.links {
		names[i] = l.name
	}
	return strings.Join(names, ", ")
}
