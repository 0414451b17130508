// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// claims calls claimed for every address that another machine says to have, in ARP packets or neighbour advertisements, until ctx ends.
func claims(ctx context.Context, claimed func(addr netip.Addr, machine string)) error {
	arp, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(bigEndian(unix.ETH_P_ARP)))
	if err != nil {
		return fmt.Errorf("listen for ARP: %w", err)
	}
	listeners := []claimListener{{os.NewFile(uintptr(arp), "ARP"), arpClaim}}
	na, err := naSocket()
	if err == nil {
		listeners = append(listeners, claimListener{os.NewFile(uintptr(na), "neighbour advertisements"), naClaim})
	} else if !errors.Is(err, unix.EAFNOSUPPORT) { // a kernel without IPv6
		return errors.Join(fmt.Errorf("listen for neighbour advertisements: %w", err), listeners[0].file.Close())
	}
	var wg sync.WaitGroup
	errs := make([]error, len(listeners))
	for i, l := range listeners {
		stop := context.AfterFunc(ctx, func() { l.file.Close() })
		wg.Go(func() {
			defer stop()
			defer l.file.Close()
			errs[i] = l.run(claimed)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

type claimListener struct {
	file  *os.File
	parse func([]byte) (netip.Addr, net.HardwareAddr)
}

func (l claimListener) run(claimed func(netip.Addr, string)) error {
	packet := make([]byte, 1500)
	for {
		n, err := l.file.Read(packet)
		if err != nil {
			return err
		}
		if addr, mac := l.parse(packet[:n]); addr.IsValid() && !isOwn(mac) {
			claimed(addr, mac.String())
		}
	}
}

// naSocket gets neighbour advertisements and nothing else.
func naSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_ICMPV6)
	if err != nil {
		return 0, err
	}
	var filter unix.ICMPv6Filter // a bit that is set blocks its type
	for i := range filter.Data {
		filter.Data[i] = ^uint32(0)
	}
	const advertisement = 136
	filter.Data[advertisement/32] &^= 1 << (advertisement % 32)
	text := unsafe.String((*byte)(unsafe.Pointer(&filter)), unsafe.Sizeof(filter))
	if err := unix.SetsockoptString(fd, unix.IPPROTO_ICMPV6, unix.ICMPV6_FILTER, text); err != nil {
		return 0, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// arpClaim is the sender of an ARP packet, request or reply; the zero value if there is none.
func arpClaim(p []byte) (netip.Addr, net.HardwareAddr) {
	if len(p) < 28 || !slices.Equal(p[:6], []byte{0, 1, 8, 0, 6, 4}) {
		return netip.Addr{}, nil
	}
	addr := netip.AddrFrom4([4]byte(p[14:18]))
	if addr.IsUnspecified() { // asks whether the address is free
		return netip.Addr{}, nil
	}
	return addr, net.HardwareAddr(p[8:14])
}

// naClaim is the target of a neighbour advertisement that says where it is; the zero value if it does not.
func naClaim(p []byte) (netip.Addr, net.HardwareAddr) {
	if len(p) < 24 || p[0] != 136 {
		return netip.Addr{}, nil
	}
	for options := p[24:]; len(options) >= 8 && options[1] > 0; {
		if options[0] == 2 && options[1] == 1 {
			return netip.AddrFrom16([16]byte(p[8:24])), net.HardwareAddr(options[2:8])
		}
		size := int(options[1]) * 8
		if size > len(options) {
			break
		}
		options = options[size:]
	}
	return netip.Addr{}, nil
}

// isOwn says whether a machine is this one.
func isOwn(mac net.HardwareAddr) bool {
	list, err := net.Interfaces()
	return err != nil || slices.ContainsFunc(list, func(i net.Interface) bool { return slices.Equal(i.HardwareAddr, mac) })
}
