// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Remains is something of Kedge's in this machine's network.
type Remains struct{ Kind, Name string }

// Kinds of Remains.
const (
	KindLink    = "link"
	KindRules   = "rules"
	KindSet     = "set"
	KindRoute   = "route"
	KindAddress = "address"
	KindIPVS    = "ipvs"
)

// NetworkRemains lists what CleanupNetwork would remove. It only looks.
func NetworkRemains(cfg Config) ([]Remains, error) {
	var found []Remains
	var errs []error
	add := func(kind, name string) { found = append(found, Remains{kind, name}) }
	links, err := netlink.LinkList()
	errs = append(errs, err)
	for _, l := range links {
		name := l.Attrs().Name
		if slices.Contains([]string{vxlanDevice, vxlanDeviceV6, wireguardDevice, wireguardDeviceV6, ipvsDevice}, name) {
			add(KindLink, name)
		}
		if name == ipvsDevice {
			add(KindIPVS, "virtual servers of kube-proxy")
		}
		if name == "lo" && cfg.ClusterDNS.IsValid() {
			addresses, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			errs = append(errs, err)
			for _, a := range addresses {
				if a.IP.String() == cfg.ClusterDNS.String() {
					add(KindAddress, a.IP.String()+" on lo")
				}
			}
		}
	}
	errs = append(errs, ruleRemains(add), routeRemains(cfg, add))
	if sets, err := netlink.IpsetListAll(); err == nil { // otherwise the kernel has none
		for _, s := range sets {
			if strings.HasPrefix(s.SetName, "KUBE-") {
				add(KindSet, s.SetName)
			}
		}
	}
	return found, errors.Join(errs...)
}

// ruleRemains looks for tables of nftables, and for chains in those of iptables.
func ruleRemains(add func(kind, name string)) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	tables, err := c.ListTables()
	if err != nil {
		return fmt.Errorf("list the tables of nftables: %w", err)
	}
	for _, t := range tables {
		if strings.HasPrefix(t.Name, "kedge-") || slices.Contains(append(ruleTables(), "cni_hostport"), t.Name) {
			add(KindRules, "nftables table "+family(t.Family)+" "+t.Name)
		}
	}
	chains, err := c.ListChains()
	if err != nil {
		return fmt.Errorf("list the chains of nftables: %w", err)
	}
	for _, chain := range chains {
		iptables := chain.Table.Family == nftables.TableFamilyIPv4 || chain.Table.Family == nftables.TableFamilyIPv6
		ours := isRulesChain(chain.Name) || isKubeletChain(chain.Name) || strings.HasPrefix(chain.Name, "CNI-")
		if iptables && ours {
			add(KindRules, "iptables chain "+family(chain.Table.Family)+" "+chain.Table.Name+" "+chain.Name)
		}
	}
	return nil
}

func family(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyINet:
		return "inet"
	}
	return fmt.Sprintf("family %d", f)
}

// routeRemains looks for routes to pods of other nodes.
func routeRemains(cfg Config, add func(kind, name string)) error {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return err
	}
	for _, r := range routes {
		if r.Dst == nil || r.Gw == nil {
			continue
		}
		dst, ok := netip.AddrFromSlice(r.Dst.IP)
		if ok && slices.ContainsFunc(cfg.ClusterCIDR, func(p netip.Prefix) bool { return p.Contains(dst.Unmap()) }) {
			add(KindRoute, r.Dst.String()+" via "+r.Gw.String())
		}
	}
	return nil
}
