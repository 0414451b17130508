// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/check"
	"github.com/kedge-io/kedge/pkg/config"
)

// serviceRouteInterval is how often they are looked at: an interface that was down has lost its routes.
const serviceRouteInterval = time.Minute

// keepServiceRoutes has the machine itself reach Services where no route leads to them, as there is no default route: the kernel looks for
// one before kube-proxy's rules say where the packet goes in truth, and asks for another one then. Packets of pods come in, and are routed
// after these rules.
func (n *node) keepServiceRoutes(ctx context.Context) {
	said := ""
	for {
		if err := ensureServiceRoutes(n.cfg.ServiceCIDR, n.cfg.Address); err != nil && err.Error() != said {
			said = err.Error()
			n.log.Warn("this machine itself does not reach Services, its pods do: there is no default route, and no other could be made", "component", ComponentProxy, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(serviceRouteInterval):
		}
	}
}

func ensureServiceRoutes(services config.Prefixes, own []netip.Addr) error {
	var errs []error
	for _, p := range services {
		if _, err := netlink.RouteGet(p.Addr().Next().AsSlice()); !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EHOSTUNREACH) {
			continue
		}
		i := slices.IndexFunc(own, func(a netip.Addr) bool { return a.Is4() == p.Addr().Is4() })
		if i < 0 {
			continue
		}
		if err := addServiceRoute(p, own[i]); err != nil {
			errs = append(errs, fmt.Errorf("route to %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

func addServiceRoute(p netip.Prefix, from netip.Addr) error {
	all, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(a netlink.Addr) bool { return a.IP.Equal(from.AsSlice()) })
	if i < 0 {
		return fmt.Errorf("no interface has the address %s", from)
	}
	return netlink.RouteReplace(&netlink.Route{
		Dst: &net.IPNet{IP: p.Masked().Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}, LinkIndex: all[i].LinkIndex,
		Src: from.AsSlice(), Scope: netlink.SCOPE_LINK, Protocol: check.ServiceRouteProtocol,
	})
}

func removeServiceRoutes() error {
	list, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: check.ServiceRouteProtocol}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return err
	}
	var errs []error
	for i := range list {
		errs = append(errs, netlink.RouteDel(&list[i]))
	}
	return errors.Join(errs...)
}
