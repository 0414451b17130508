// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
)

const (
	wayTimeout = 3 * time.Second
	// parallelWays bounds what a node tries at the same time.
	parallelWays = 16
	logLines     = "5000"
)

// Examine tries the ways, names and services of a question from this machine. nodeIPs are its own addresses.
func Examine(ctx context.Context, q Question, nodeIPs []netip.Addr, report *NodeReport) {
	report.Links = links(nodeIPs)
	report.Ways = make([]Way, len(q.Paths))
	var group errgroup.Group
	group.SetLimit(parallelWays)
	for i, p := range q.Paths {
		group.Go(func() error {
			start := time.Now()
			report.Ways[i] = Way{Path: p}
			if err := try(ctx, p, report.Links); err != nil {
				report.Ways[i].Error = err.Error()
			}
			report.Ways[i].Took = time.Since(start)
			return nil
		})
	}
	if q.DNS.IsValid() {
		group.Go(func() error {
			if err := lookUp(ctx, q.DNS, "kubernetes.default.svc."+q.Domain+"."); err != nil {
				report.DNSError = err.Error()
			}
			return nil
		})
	}
	var mu sync.Mutex
	for _, address := range q.Services {
		group.Go(func() error {
			err := dial(ctx, netip.AddrPortFrom(address, 443))
			if err == nil {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			if report.Services == nil {
				report.Services = map[string]string{}
			}
			report.Services[address.String()] = err.Error()
			return nil
		})
	}
	if q.Log {
		group.Go(func() error {
			out, err := exec.CommandContext(ctx, "journalctl", "--unit", "kedge", "--lines", logLines, "--no-pager", "--output", "short-iso").CombinedOutput()
			report.Log = string(out)
			if err != nil {
				report.Log += fmt.Sprintf("\n(journalctl: %v)\n", err)
			}
			return nil
		})
	}
	group.Wait() //nolint:errcheck // what goes wrong is in the report
}

func try(ctx context.Context, p Path, links []Link) error {
	switch p.Protocol {
	case TCP:
		return dial(ctx, p.Address)
	case Overlay:
		return echoThroughOverlay(ctx, p.Address.Addr(), links)
	}
	return fmt.Errorf("this node's Kedge does not know how to try %q", p.Protocol)
}

func dial(ctx context.Context, address netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, wayTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address.String())
	if err != nil {
		return err
	}
	return conn.Close()
}

func lookUp(ctx context.Context, server netip.Addr, name string) error {
	ctx, cancel := context.WithTimeout(ctx, wayTimeout)
	defer cancel()
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, netip.AddrPortFrom(server, 53).String())
	}}
	_, err := resolver.LookupNetIP(ctx, "ip", name)
	return err
}

// overlayDevices are the devices that flannel makes.
func overlayDevices() []string {
	return []string{"flannel.1", "flannel-v6.1", "flannel-wg", "flannel-wg-v6"}
}

// links are the interfaces that have an address of the node, and those of the overlay network.
func links(nodeIPs []netip.Addr) []Link {
	list, err := netlink.LinkList()
	if err != nil {
		return nil
	}
	var found []Link
	for _, l := range list {
		link := Link{Name: l.Attrs().Name, MTU: l.Attrs().MTU, Overlay: slices.Contains(overlayDevices(), l.Attrs().Name)}
		if !link.Overlay {
			addresses, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			if err != nil || !slices.ContainsFunc(addresses, func(a netlink.Addr) bool {
				ip, ok := netip.AddrFromSlice(a.IP)
				return ok && slices.Contains(nodeIPs, ip.Unmap())
			}) {
				continue
			}
		}
		found = append(found, link)
	}
	slices.SortFunc(found, func(a, b Link) int { return strings.Compare(a.Name, b.Name) })
	return found
}
