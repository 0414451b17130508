// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// prolong is how often it is seen to whether addresses get a new lifetime. They do when it is longer than theirs by worthwhile, which is
	// after each renewal of the lease: for IPv6, the kernel sends multicast reports (MLD) each time.
	prolong    = 500 * time.Millisecond
	worthwhile = renewInterval * 9 / 10
	// announcements are sent after an address was bound, one with each prolongation: a single one may get lost.
	announcements = 8
)

// announcer binds addresses to interfaces of this machine, for a few seconds each time, and tells the network about it. The kernel answers
// who asks for them.
type announcer struct {
	log *slog.Logger
	// beside is an address whose interface takes those that lie in no interface's network; invalid: these are an error.
	beside netip.Addr
	// onBound is called for every address that was not bound before.
	onBound func(a netip.Addr, link string)

	bound map[netip.Addr]*binding
}

type binding struct {
	link int
	sent int
	ends time.Time // when the kernel takes the address away
}

// apply makes exactly these addresses bound, each for a time.
func (a *announcer) apply(want map[netip.Addr]time.Duration) error {
	var errs []error
	for addr := range a.bound {
		if _, ok := want[addr]; !ok {
			errs = append(errs, a.release(addr))
		}
	}
	for addr, lifetime := range want {
		if err := a.hold(addr, lifetime); err != nil {
			errs = append(errs, fmt.Errorf("%s cannot be announced: %w", addr, err))
		}
	}
	return errors.Join(errs...)
}

// hold binds an address, or prolongs its life.
func (a *announcer) hold(addr netip.Addr, lifetime time.Duration) error {
	b := a.bound[addr]
	if b == nil {
		link, err := a.choose(addr)
		if err != nil {
			return err
		}
		b = &binding{link: link.Attrs().Index}
	}
	link, err := netlink.LinkByIndex(b.link)
	if ends := time.Now().Add(lifetime); err == nil && ends.Sub(b.ends) > worthwhile {
		err, b.ends = netlink.AddrReplace(link, mortal(addr, lifetime)), ends
	}
	if err != nil {
		delete(a.bound, addr) // the interface may be gone, and another one there
		return err
	}
	if a.bound[addr] == nil {
		if a.bound == nil {
			a.bound = map[netip.Addr]*binding{}
		}
		a.bound[addr] = b
		a.log.Info("answers for a floating address", "address", addr, "interface", link.Attrs().Name)
		if a.onBound != nil {
			a.onBound(addr, link.Attrs().Name)
		}
	}
	if b.sent < announcements {
		b.sent++
		return announce(addr, link.Attrs())
	}
	return nil
}

// mortal is an address as the kernel knows it: without a network of its own, never chosen as the source of anything, and gone by itself
// after a time.
func mortal(addr netip.Addr, lifetime time.Duration) *netlink.Addr {
	seconds := max(1, int(lifetime/time.Second))
	a := &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}, ValidLft: seconds, PreferedLft: seconds}
	if addr.Is6() {
		// No duplicate address detection: it takes a second, and the last holder may answer. Deprecated: not used as a source.
		a.Flags, a.PreferedLft = unix.IFA_F_NODAD, 0
	}
	return a
}

func (a *announcer) release(addr netip.Addr) error {
	b := a.bound[addr]
	delete(a.bound, addr)
	a.log.Info("does not answer for a floating address any more", "address", addr)
	link, err := netlink.LinkByIndex(b.link)
	if err != nil {
		return nil // with the interface the address is gone
	}
	if err := netlink.AddrDel(link, mortal(addr, 0)); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("take %s from %s (it goes by itself in %s): %w", addr, link.Attrs().Name, leaseDuration, err)
	}
	return nil
}

// choose finds the interface whose network an address lies in.
func (a *announcer) choose(addr netip.Addr) (netlink.Link, error) {
	all, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	best, bits, index := "", -1, 0
	for _, have := range all {
		ip, _ := netip.AddrFromSlice(have.IP)
		ip = ip.Unmap()
		ones, size := have.Mask.Size()
		if ip == addr && have.ValidLft > int(2*leaseDuration/time.Second) && !isDummy(have.LinkIndex) {
			return nil, fmt.Errorf("it is this machine's own (%s)", have.IPNet)
		}
		if p, err := ip.Prefix(ones); err == nil && ones < size && p.Contains(addr) && ones > bits {
			best, bits, index = have.IPNet.String(), ones, have.LinkIndex
		} else if bits < 0 && a.beside.IsValid() && ip == a.beside {
			index = have.LinkIndex
		}
	}
	if best == "" && index == 0 {
		return nil, errors.New("no interface of this machine is in its network")
	}
	return netlink.LinkByIndex(index)
}

// isDummy is true for kube-ipvs0, which in kube-proxy's mode ipvs has every address of every Service.
func isDummy(index int) bool {
	link, err := netlink.LinkByIndex(index)
	return err == nil && link.Type() == "dummy"
}
