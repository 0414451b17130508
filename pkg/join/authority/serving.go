// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kedge-io/kedge/pkg/join"
)

// checkServing decides on a kubelet's serving certificate. It is signed by the CA of the API server's: a kubelet that got the name
// or the address of a server could pass for its API.
func (a *Approver) checkServing(ctx context.Context, r *request) error {
	wanted, d := a.servingAddresses(r)
	if d != nil {
		return d
	}
	nodes, err := a.cfg.Client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	servers, err := ListServers(ctx, a.cfg.Client)
	if err != nil {
		return err
	}
	own := slices.IndexFunc(nodes.Items, func(n corev1.Node) bool { return n.Name == r.name })
	if own < 0 {
		return &notYet{deny(join.ReasonBadRequest, "there is no node %s", r.name)}
	}
	has := nodeAddresses(&nodes.Items[own])
	for _, addr := range wanted {
		if !slices.Contains(has, addr) {
			return &notYet{deny(join.ReasonBadRequest, "%s is not among the addresses of node %s, which are %v", addr, r.name, has)}
		}
	}
	// Addresses move from machine to machine by DHCP, and the one that lost it tells so a little later.
	for i := range nodes.Items {
		if n := &nodes.Items[i]; i != own {
			if addr, ok := shared(wanted, nodeAddresses(n)); ok {
				return &notYet{deny(join.ReasonBadRequest, "%s is an address of node %s, too; if that node is gone: kedge node remove %s", addr, n.Name, n.Name)}
			}
		}
	}
	for name, s := range servers {
		if name == r.name {
			continue
		}
		if addr, ok := shared(wanted, addresses(s.hosts())); ok {
			return &notYet{deny(join.ReasonBadRequest, "%s is the address of server %s; if that server is gone: kedge node remove %s", addr, name, name)}
		}
		if slices.Contains(s.hosts(), r.name) {
			return deny(join.ReasonBadRequest, "%s is the name at which server %s is reached", r.name, name)
		}
	}
	return nil
}

// servingAddresses are the addresses in a request, after the checks that need nothing but it and the configuration.
func (a *Approver) servingAddresses(r *request) ([]netip.Addr, *denial) {
	var wanted []netip.Addr
	for _, name := range r.cert.DNSNames {
		if name != r.name || a.reserved[name] {
			return nil, deny(join.ReasonBadRequest, "%q is not a name of node %s", name, r.name)
		}
		// A node may be named like an address. Then it has to have it: not every client tells one from the other.
		if addr, err := netip.ParseAddr(name); err == nil {
			wanted = append(wanted, addr.Unmap())
		}
	}
	for _, ip := range r.cert.IPAddresses {
		addr, ok := netip.AddrFromSlice(ip)
		if !ok {
			return nil, deny(join.ReasonBadRequest, "%v is no address", ip)
		}
		wanted = append(wanted, addr.Unmap())
	}
	for _, addr := range wanted {
		if addr.IsLoopback() || addr.IsUnspecified() || addr.IsMulticast() {
			return nil, deny(join.ReasonBadRequest, "%s is no address of one machine", addr)
		}
		for _, p := range a.cfg.Networks {
			if p.Contains(addr) {
				return nil, deny(join.ReasonBadRequest, "%s is an address of a pod or a service (%s)", addr, p)
			}
		}
	}
	return wanted, nil
}

func nodeAddresses(n *corev1.Node) []netip.Addr {
	var list []string
	for _, a := range n.Status.Addresses {
		list = append(list, a.Address)
	}
	return addresses(list)
}

// addresses are those of hosts that are no names.
func addresses(hosts []string) []netip.Addr {
	var list []netip.Addr
	for _, h := range hosts {
		if addr, err := netip.ParseAddr(h); err == nil {
			list = append(list, addr.Unmap())
		}
	}
	return list
}

func shared(a, b []netip.Addr) (netip.Addr, bool) {
	for _, addr := range a {
		if slices.Contains(b, addr) {
			return addr, true
		}
	}
	return netip.Addr{}, false
}
