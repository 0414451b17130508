// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"
)

const (
	// nftTable is the table (family inet) with the notrack rules.
	nftTable = "kedge-dns"
	// networkCheck is how often address and rules are looked at; other programs flush them.
	networkCheck = time.Minute
)

// ensureAddress puts the cluster DNS address on the loopback device. A loopback address is there already.
func (s *Server) ensureAddress() {
	if s.cfg.Addr.IsLoopback() {
		return
	}
	if err := ensureAddress(s.cfg.Addr); err != nil {
		s.problem(problemAddress, "put the cluster DNS address on the loopback device", err)
		return
	}
	s.setProblem(problemAddress, "")
}

func ensureAddress(addr netip.Addr) error {
	lo, want, err := loopbackAddr(addr)
	if err != nil {
		return err
	}
	have, err := netlink.AddrList(lo, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", lo.Attrs().Name, err)
	}
	for _, a := range have {
		if a.IPNet.String() == want.IPNet.String() {
			return nil
		}
	}
	if err := netlink.AddrReplace(lo, want); err != nil {
		return fmt.Errorf("add %s to %s: %w", want.IPNet, lo.Attrs().Name, err)
	}
	return nil
}

func loopbackAddr(addr netip.Addr) (netlink.Link, *netlink.Addr, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, nil, fmt.Errorf("find the loopback device: %w", err)
	}
	a := &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}}
	if addr.Is4() {
		// Of scope host: the kernel takes a wider one as the source for packets out of devices that have no address.
		a.Scope = unix.RT_SCOPE_HOST
	}
	return lo, a, nil
}

// keepNetwork installs the notrack rules and looks after them and the address until ctx ends.
func (s *Server) keepNetwork(ctx context.Context) {
	for {
		err := s.ensureNotrack(ctx)
		if err != nil && ctx.Err() == nil && s.setProblem(problemNotrack, "no notrack rules for DNS: "+err.Error()) {
			s.log.Warn("no notrack rules for DNS; needed with kube-proxy's nftables mode only", "error", err)
		}
		if err == nil {
			s.setProblem(problemNotrack, "")
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(networkCheck):
		}
		s.ensureAddress()
	}
}

func (s *Server) ensureNotrack(ctx context.Context) error {
	if s.cfg.Addr.IsLoopback() {
		return nil
	}
	nft, err := knftables.New(knftables.InetFamily, nftTable)
	if err != nil {
		return err
	}
	want := notrackRules(s.cfg)
	installed := true
	for _, chain := range notrackChains() {
		rules, err := nft.ListRules(ctx, chain)
		if err != nil && !knftables.IsNotFound(err) {
			return err
		}
		installed = installed && len(rules) == len(want) && *orEmpty(rules[0].Comment) == s.cfg.listen()
	}
	if installed {
		return nil
	}
	return nft.Run(ctx, notrackTransaction(nft, want, s.cfg.listen()))
}

func orEmpty(s *string) *string {
	if s == nil {
		return new(string)
	}
	return s
}

// notrackChains are named like the hooks that they are on.
func notrackChains() []string { return []string{"prerouting", "output"} }

// notrackRules keeps conntrack out of DNS in both directions: for speed, and because kube-proxy's nftables mode drops new connections from
// the node itself to service addresses that it does not know.
func notrackRules(cfg Config) []string {
	ip := "ip"
	if cfg.Addr.Is6() {
		ip = "ip6"
	}
	tcp := []string{fmt.Sprint(cfg.Port)}
	if m, err := netip.ParseAddrPort(cfg.MetricsAddr); err == nil && m.Addr() == cfg.Addr {
		tcp = append(tcp, fmt.Sprint(m.Port()))
	}
	ports := "{ " + strings.Join(tcp, ", ") + " }"
	return []string{
		fmt.Sprintf("%s daddr %s udp dport %d notrack", ip, cfg.Addr, cfg.Port),
		fmt.Sprintf("%s daddr %s tcp dport %s notrack", ip, cfg.Addr, ports),
		fmt.Sprintf("%s saddr %s udp sport %d notrack", ip, cfg.Addr, cfg.Port),
		fmt.Sprintf("%s saddr %s tcp sport %s notrack", ip, cfg.Addr, ports),
	}
}

// notrackTransaction replaces the table in one step.
func notrackTransaction(nft knftables.Interface, rules []string, comment string) *knftables.Transaction {
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{})
	tx.Delete(&knftables.Table{})
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("cluster DNS without connection tracking")})
	for _, chain := range notrackChains() {
		tx.Add(&knftables.Chain{
			Name:     chain,
			Type:     knftables.PtrTo(knftables.FilterType),
			Hook:     knftables.PtrTo(knftables.BaseChainHook(chain)),
			Priority: knftables.PtrTo(knftables.BaseChainPriority("-300")),
		})
		for _, rule := range rules {
			tx.Add(&knftables.Rule{Chain: chain, Rule: rule, Comment: knftables.PtrTo(comment)})
		}
	}
	return tx
}

// Cleanup removes the cluster DNS address from the loopback device and the notrack rules: for uninstalling and for changing the address. What
// is not there is no error.
func Cleanup(ctx context.Context, addr netip.Addr) error {
	var errs []error
	lo, a, err := loopbackAddr(addr)
	if err != nil {
		errs = append(errs, err)
	} else if err := netlink.AddrDel(lo, a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		errs = append(errs, fmt.Errorf("remove %s from lo: %w", addr, err))
	}
	if nft, err := knftables.New(knftables.InetFamily, nftTable); err == nil { // without nft there are no rules
		tx := nft.NewTransaction()
		tx.Add(&knftables.Table{})
		tx.Delete(&knftables.Table{})
		if err := nft.Run(ctx, tx); err != nil {
			errs = append(errs, fmt.Errorf("remove nftables table inet %s: %w", nftTable, err))
		}
	}
	return errors.Join(errs...)
}
