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

// echoThroughOverlay sends an echo request to another node's address in the overlay network and waits for the reply: both go through the
// overlay. Then the same with the largest packet that the overlay's device takes.
func echoThroughOverlay(ctx context.Context, to netip.Addr, links []Link) error {
	mtu := 0
	for _, l := range links {
		if l.Overlay {
			mtu = l.MTU
		}
	}
	if mtu == 0 {
		return errors.New("this node has no overlay device (flannel.1): flannel is not ready")
	}
	if err := echo(ctx, to, 0); err != nil {
		return err
	}
	header := ipv4.HeaderLen
	if to.Is6() {
		header = ipv6.HeaderLen
	}
	if err := echo(ctx, to, mtu-header-icmpHeader); err != nil {
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

// echo sends echo requests with so many bytes that must not be fragmented, and waits for one reply.
func echo(ctx context.Context, to netip.Addr, bytes int) error {
	network, listen, protocol := "ip4:icmp", "0.0.0.0", 1
	var request, reply icmp.Type = ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply
	if to.Is6() {
		network, listen, protocol = "ip6:ipv6-icmp", "::", 58
		request, reply = ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
	}
	config := net.ListenConfig{}
	packets, err := config.ListenPacket(ctx, network, listen)
	if err != nil {
		return err
	}
	defer packets.Close()
	if err := dontFragment(packets.(*net.IPConn), to.Is6()); err != nil {
		return err
	}
	id := rand.IntN(1 << 16)
	buffer := make([]byte, bytes+1500)
	for seq := range echoTries {
		message, err := (&icmp.Message{Type: request, Body: &icmp.Echo{ID: id, Seq: seq, Data: make([]byte, max(bytes, icmpHeader))}}).Marshal(nil)
		if err != nil {
			return err
		}
		if _, err := packets.WriteTo(message, &net.IPAddr{IP: to.AsSlice()}); err != nil {
			return err
		}
		if err := packets.SetReadDeadline(time.Now().Add(echoTimeout)); err != nil {
			return err
		}
		for {
			n, from, err := packets.ReadFrom(buffer)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			} else if err != nil {
				return err
			}
			m, err := icmp.ParseMessage(protocol, buffer[:n])
			if err != nil || m.Type != reply || from.String() != to.String() {
				continue
			}
			if e, ok := m.Body.(*icmp.Echo); ok && e.ID == id {
				return nil
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return fmt.Errorf("no reply from %s to %d echo requests", to, echoTries)
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
