// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"runtime"
	"strings"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// route is a destination that this machine already knows.
type route struct {
	to     netip.Prefix
	device string
}

func probeAddressRanges(_ context.Context, o Options) Result {
	routes, err := mainRoutes()
	if err != nil {
		return unprobed(err)
	}
	return judgeRanges(o, routes)
}

// ServiceRouteProtocol is in the routes that Kedge itself makes to the network of the Services (ip route show proto 107).
const ServiceRouteProtocol = 107

func mainRoutes() ([]route, error) {
	list, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	var routes []route
	for _, r := range list {
		if r.Dst == nil || r.Protocol == ServiceRouteProtocol {
			continue
		}
		addr, ok := netip.AddrFromSlice(r.Dst.IP)
		ones, _ := r.Dst.Mask.Size()
		if !ok || ones == 0 { // the default route
			continue
		}
		device := "?"
		if link, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
			device = link.Attrs().Name
		}
		routes = append(routes, route{to: netip.PrefixFrom(addr.Unmap(), ones), device: device})
	}
	return routes, nil
}

// judgeRanges looks for networks of this machine that lie within the ranges of pods and services. Routes by devices
// that Kedge itself makes are right.
func judgeRanges(o Options, routes []route) Result {
	own := func(device string) bool {
		for _, prefix := range []string{"flannel", "veth", "cni", "kube-", "kedge"} {
			if strings.HasPrefix(device, prefix) {
				return true
			}
		}
		return false
	}
	var items []Item
	type cidr struct {
		name, flag string
		cidr       netip.Prefix
	}
	var ranges []cidr
	for _, p := range o.ClusterCIDR {
		ranges = append(ranges, cidr{"pods", "--cluster-cidr", p})
	}
	for _, p := range o.ServiceCIDR {
		ranges = append(ranges, cidr{"services", "--service-cidr", p})
	}
	for _, r := range ranges {
		item := Item{Name: r.name, Result: Result{Status: Pass, Finding: r.cidr.String() + " is used by nothing else here"}}
		for _, known := range routes {
			// With host-gw the pods of other nodes are routed by the ordinary device, via their node.
			if !r.cidr.Overlaps(known.to) || own(known.device) || r.name == "pods" && o.FlannelBackend == "host-gw" && o.ExpectRunning {
				continue
			}
			item.Result = Result{Status: Warning,
				Finding: fmt.Sprintf("%s overlaps with the route to %s by %s: pods cannot reach hosts there", r.cidr, known.to, known.device),
				Remedy:  fmt.Sprintf("Choose another range before the first start, it cannot be changed later:\n$ kedge server %s 172.20.0.0/16", r.flag)}
			break
		}
		items = append(items, item)
	}
	return combine(items, fmt.Sprintf("pods %s, services %s", join(o.ClusterCIDR, " and "), join(o.ServiceCIDR, " and ")))
}

func join(list []netip.Prefix, separator string) string {
	texts := make([]string, len(list))
	for i, p := range list {
		texts[i] = p.String()
	}
	return strings.Join(texts, separator)
}

// resolvers is what a resolv.conf(5) names.
type resolvers struct {
	path   string
	usable []netip.Addr
	local  []netip.Addr // loopback addresses and the cluster DNS itself: not to be asked by the cluster DNS
}

// stubResolvConfs are where local resolvers say whom they ask themselves: systemd-resolved and NetworkManager with
// dnsmasq. The cluster DNS looks there, too, when /etc/resolv.conf names only a local resolver.
func stubResolvConfs() []string {
	return []string{"/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf"}
}

func probeResolvConf(_ context.Context, o Options) Result {
	path := o.ResolvConf
	if path == "" {
		path = "/etc/resolv.conf"
	}
	first, err := readResolvConf(path, o.DNSAddress)
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		return unprobed(err)
	}
	var instead resolvers
	if o.ResolvConf == "" && len(first.usable) == 0 && (missing || len(first.local) > 0) {
		for _, stub := range stubResolvConfs() {
			// What cannot be read is of no use.
			if r, err := readResolvConf(stub, o.DNSAddress); err == nil && len(r.usable) > 0 {
				instead = r
				break
			}
		}
	}
	return judgeResolvers(first, instead, missing)
}

func readResolvConf(path string, clusterDNS netip.Addr) (resolvers, error) {
	f, err := os.Open(path)
	if err != nil {
		return resolvers{path: path}, err
	}
	defer f.Close()
	r, err := parseResolvConf(f, clusterDNS)
	r.path = path
	if err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// parseResolvConf leaves out what is no address, as the C library does.
func parseResolvConf(r io.Reader, clusterDNS netip.Addr) (resolvers, error) {
	conf, err := dns.ClientConfigFromReader(r)
	if err != nil {
		return resolvers{}, err
	}
	var found resolvers
	for _, s := range conf.Servers {
		addr, err := netip.ParseAddr(s)
		switch addr = addr.Unmap(); {
		case err != nil:
		case addr.IsLoopback(), addr.IsUnspecified(), addr == clusterDNS:
			found.local = append(found.local, addr)
		default:
			found.usable = append(found.usable, addr)
		}
	}
	return found, nil
}

func judgeResolvers(first, instead resolvers, missing bool) Result {
	const remedy = "Name the resolver of your network in a file and give it to Kedge:\n" +
		"$ echo 'nameserver 192.168.1.1' >/etc/kedge/resolv.conf && kedge server --resolv-conf /etc/kedge/resolv.conf"
	const consequence = "pods resolve names of the cluster only, none outside"
	switch {
	case len(first.usable) > 0:
		r := Result{Status: Pass, Finding: addrList(first.usable)}
		if len(first.local) > 0 {
			r.Status = Info
			r.Finding += "; " + addrList(first.local) + " is this machine itself and is left out"
		}
		return r
	case len(instead.usable) > 0:
		return Result{Status: Info, Finding: fmt.Sprintf("%s names a resolver on this machine itself; the cluster DNS and pods use %s from %s instead",
			first.path, addrList(instead.usable), instead.path)}
	case missing:
		return Result{Status: Warning, Finding: first.path + " does not exist: " + consequence, Remedy: remedy}
	case len(first.local) > 0:
		return Result{Status: Warning, Finding: fmt.Sprintf("%s names only %s, this machine itself, which the cluster DNS does not ask because the question could come back: %s",
			first.path, addrList(first.local), consequence), Remedy: remedy}
	}
	return Result{Status: Warning, Finding: first.path + " names no server: " + consequence, Remedy: remedy}
}

func addrList(addrs []netip.Addr) string {
	list := make([]string, len(addrs))
	for i, a := range addrs {
		list[i] = a.String()
	}
	return strings.Join(list, ", ")
}

func probeConntrack(context.Context, Options) Result {
	limit, err := readNumber("/proc/sys/net/netfilter/nf_conntrack_max")
	if errors.Is(err, fs.ErrNotExist) {
		err := modprobe("nf_conntrack")
		if limit, _ = readNumber("/proc/sys/net/netfilter/nf_conntrack_max"); limit == 0 { // unreadable counts as absent
			return Result{Status: Warning, Finding: fmt.Sprintf("not loaded (%v): services need connection tracking", err), Remedy: moduleRemedy("nf_conntrack")}
		}
	} else if err != nil {
		return unprobed(err)
	}
	used, err := readNumber("/proc/sys/net/netfilter/nf_conntrack_count")
	if err != nil {
		return unprobed(err)
	}
	f, err := os.OpenFile("/proc/sys/net/netfilter/nf_conntrack_max", os.O_WRONLY, 0)
	if err == nil {
		f.Close()
	}
	return judgeConntrack(used, limit, err == nil)
}

// judgeConntrack: where the limit can be written, kube-proxy raises it (32768 for each CPU, at least 131072).
func judgeConntrack(used, limit int, writable bool) Result {
	r := Result{Status: Pass, Finding: fmt.Sprintf("%d of %d entries in use", used, limit)}
	switch {
	case used > limit/10*8:
		r.Status = Warning
		r.Finding += ": new connections will soon be dropped"
	case !writable && limit < 32768*runtime.NumCPU():
		r.Status = Info
		r.Finding += "; the limit is low and cannot be raised from here"
	default:
		return r
	}
	r.Remedy = "$ sysctl -w net.netfilter.nf_conntrack_max=262144"
	return r
}

func probeBrNetfilter(context.Context, Options) Result {
	value, err := os.ReadFile("/proc/sys/net/bridge/bridge-nf-call-iptables")
	if errors.Is(err, fs.ErrNotExist) {
		return Result{Status: Pass, Finding: "not loaded and not needed: pods are routed, not bridged"}
	}
	if err != nil {
		return unprobed(err)
	}
	return Result{Status: Info, Finding: fmt.Sprintf("loaded (bridge-nf-call-iptables=%s) and not needed: pods are routed, not bridged", strings.TrimSpace(string(value)))}
}

// linkRefused tells a missing kernel feature from other errors of making a device.
func linkRefused(kind string, err error, status Status, consequence string) Result {
	if os.Geteuid() != 0 && errors.Is(err, fs.ErrPermission) {
		return unprobed(err)
	}
	r := Result{Status: status, Finding: fmt.Sprintf("a %s device cannot be made (%v): %s", kind, err, consequence)}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		r.Remedy = moduleRemedy(kind)
	}
	return r
}

func probeVeth(context.Context, Options) Result {
	err := inNamespaces(unix.CLONE_NEWNET, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "kedgecheck0"}, PeerName: "kedgecheck1"})
	})
	if err != nil {
		return linkRefused("veth", err, Fail, "pods cannot be attached to the network")
	}
	return Result{Status: Pass, Finding: "works"}
}

func probeVXLAN(_ context.Context, o Options) Result {
	if o.FlannelBackend != "vxlan" {
		return Result{Status: Info, Finding: "not needed with --flannel-backend " + o.FlannelBackend}
	}
	err := inNamespaces(unix.CLONE_NEWNET, func() error {
		return netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "kedgecheck0"}, VxlanId: 1, Port: 8472, Learning: false})
	})
	if err != nil {
		r := linkRefused("vxlan", err, Fail, "pods of different nodes cannot reach each other")
		if r.Status == Fail {
			r.Remedy += "\nWith all nodes in one layer 2 network it also works without:\n$ kedge server --flannel-backend host-gw"
		}
		return r
	}
	return Result{Status: Pass, Finding: "works"}
}

// WireGuard tries whether the kernel has WireGuard, in a network namespace of its own. It loads the module where there is one.
func WireGuard() error {
	err := tryWireGuard()
	if errors.Is(err, unix.EOPNOTSUPP) {
		return errors.New("the kernel has no WireGuard")
	}
	return err
}

func tryWireGuard() error {
	return inNamespaces(unix.CLONE_NEWNET, func() error {
		return netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: "kedgecheck0"}})
	})
}

func probeWireGuard(_ context.Context, o Options) Result {
	if o.FlannelBackend != "wireguard-native" {
		return Result{Status: Info, Finding: "not needed with --flannel-backend " + o.FlannelBackend}
	}
	if err := tryWireGuard(); err != nil {
		return linkRefused("wireguard", err, Fail, "pods of different nodes cannot reach each other")
	}
	return Result{Status: Pass, Finding: "works"}
}
