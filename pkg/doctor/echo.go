// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

const (
	echoTries   = 3
	echoTimeout = time.Second
	icmpHeader  = 8
)

// errNoOverlay is for a node whose flannel has not made its device.
var errNoOverlay = errors.New("this node has no overlay device (flannel.1): flannel is not ready")

// overlayMTU is that of the overlay's device to an address, 0 without one. Each family may have a device of its own, or both the same.
func overlayMTU(links []Link, to netip.Addr) int {
	mtu := 0
	for _, l := range links {
		if l.Overlay && (mtu == 0 || strings.Contains(l.Name, "v6") == to.Is6()) {
			mtu = l.MTU
		}
	}
	return mtu
}

// echoThroughOverlay sends an echo request to another node's address in the overlay network and waits for the reply: both go through the
// overlay. Then the same with the largest packet that the overlay's device takes.
func echoThroughOverlay(ctx context.Context, to netip.Addr, links []Link) error {
	mtu := overlayMTU(links, to)
	if mtu == 0 {
		return errNoOverlay
	}
	conn, err := openEcho(ctx, to)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.echo(ctx, icmpHeader); err != nil {
		return err
	}
	if err := conn.echo(ctx, conn.room(mtu)); err != nil {
		return &mtuError{mtu, err}
	}
	return nil
}

// mtuError says that small packets arrive and large ones do not.
type mtuError struct {
	mtu int
	err error
}

func (e *mtuError) Error() string {
	return fmt.Sprintf("%s: small packets arrive, those of %d bytes do not: %v", mtuMark, e.mtu, e.err)
}

func (e *mtuError) Unwrap() error { return e.err }

// mtuMark begins the text of an mtuError, which comes from another node as text.
const mtuMark = "path MTU"

// echoConn sends echo requests to an address, whole or not at all.
type echoConn struct {
	net.PacketConn
	to          netip.Addr
	id          int
	protocol    int
	header      int // of IP, bytes
	ask, answer icmp.Type
}

// Numbers of protocols above IP.
const protocolICMP, protocolICMPv6 = 1, 58

func openEcho(ctx context.Context, to netip.Addr) (*echoConn, error) {
	c := &echoConn{to: to, id: rand.IntN(1 << 16), protocol: protocolICMP, header: ipv4.HeaderLen, ask: ipv4.ICMPTypeEcho, answer: ipv4.ICMPTypeEchoReply}
	network, from := "ip4:icmp", "0.0.0.0"
	if to.Is6() {
		c.protocol, c.header, c.ask, c.answer = protocolICMPv6, ipv6.HeaderLen, ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
		network, from = "ip6:ipv6-icmp", "::"
	}
	config := net.ListenConfig{}
	packets, err := config.ListenPacket(ctx, network, from)
	if err != nil {
		return nil, err
	}
	c.PacketConn = packets
	if err := dontFragment(packets.(*net.IPConn), to.Is6()); err != nil {
		return nil, errors.Join(err, packets.Close())
	}
	return c, nil
}

// room is how many bytes of data a request may have.
func (c *echoConn) room(mtu int) int { return mtu - c.header - icmpHeader }

// request sends one.
func (c *echoConn) request(seq int, data []byte) error {
	message, err := (&icmp.Message{Type: c.ask, Body: &icmp.Echo{ID: c.id, Seq: seq, Data: data}}).Marshal(nil)
	if err != nil {
		return err
	}
	_, err = c.WriteTo(message, &net.IPAddr{IP: c.to.AsSlice()})
	return err
}

// echo sends requests with so many bytes, and waits for one reply.
func (c *echoConn) echo(ctx context.Context, bytes int) error {
	buffer := make([]byte, bytes+1500)
	for seq := range echoTries {
		if err := c.request(seq, make([]byte, bytes)); err != nil {
			return err
		}
		if err := c.SetReadDeadline(time.Now().Add(echoTimeout)); err != nil {
			return err
		}
		for {
			n, from, err := c.ReadFrom(buffer)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			} else if err != nil {
				return err
			}
			m, err := icmp.ParseMessage(c.protocol, buffer[:n])
			if err != nil || m.Type != c.answer || from.String() != c.to.String() {
				continue
			}
			if e, ok := m.Body.(*icmp.Echo); ok && e.ID == c.id && len(e.Data) == bytes {
				return nil
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return fmt.Errorf("no reply from %s to %d echo requests", c.to, echoTries)
}

func dontFragment(conn *net.IPConn, v6 bool) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		if v6 {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)
		} else {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
		}
	})
	return errors.Join(err, failed)
}
