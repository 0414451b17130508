// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// announce tells all neighbours of an interface that an address is here now.
func announce(addr netip.Addr, link *netlink.LinkAttrs) error {
	if len(link.HardwareAddr) != 6 {
		return nil // a tunnel: nobody there asks for addresses
	}
	var err error
	if addr.Is4() {
		err = sendARP(addr, link)
	} else {
		err = sendNA(addr, link)
	}
	if err != nil {
		return fmt.Errorf("announcement on %s: %w", link.Name, err)
	}
	return nil
}

// sendARP sends a gratuitous request and a gratuitous reply: there are machines that heed only one of them.
func sendARP(addr netip.Addr, link *netlink.LinkAttrs) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // nothing is lost with it
	to := &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_ARP), Ifindex: link.Index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	return errors.Join(unix.Sendto(fd, arpPacket(1, addr, link.HardwareAddr), 0, to), unix.Sendto(fd, arpPacket(2, addr, link.HardwareAddr), 0, to))
}

func bigEndian(n uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, n))
}

// arpPacket is RFC 826's, with sender and target being the same.
func arpPacket(operation byte, addr netip.Addr, mac net.HardwareAddr) []byte {
	p := []byte{0, 1, 8, 0, 6, 4, 0, operation}
	p = append(append(p, mac...), addr.AsSlice()...)
	target := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	return append(append(p, target...), addr.AsSlice()...)
}

// sendNA sends an unsolicited neighbour advertisement (RFC 4861, 7.2.6).
func sendNA(addr netip.Addr, link *netlink.LinkAttrs) error {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // nothing is lost with it
	from, to := &unix.SockaddrInet6{Addr: addr.As16()}, &unix.SockaddrInet6{Addr: netip.MustParseAddr("ff02::1").As16(), ZoneId: uint32(link.Index)}
	return errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255),
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, link.Index),
		unix.Bind(fd, from),
		unix.Sendto(fd, naPacket(addr, link.HardwareAddr), 0, to),
	)
}

// naPacket has the flags router and override, and the option target link-layer address. The kernel fills in the checksum.
func naPacket(addr netip.Addr, mac net.HardwareAddr) []byte {
	p := append([]byte{136, 0, 0, 0, 0xa0, 0, 0, 0}, addr.AsSlice()...)
	return append(append(p, 2, 1), mac...)
}
