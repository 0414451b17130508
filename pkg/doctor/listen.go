// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Times of the second step. A node listens for listenTime, begins to send after listenLead, and has sent all after sendTime. A node to which the
// question came at the most lateness after another one has thus listened while that one sent, and the other way round.
const (
	listenTime = 6 * time.Second
	listenLead = 2 * time.Second
	lateness   = 2 * time.Second
	sendPause  = 400 * time.Millisecond // sendTime is two of them
)

// nonceSize is that of Listen.Nonce, in bytes.
const nonceSize = 16

// Listen is the second step, for overlay networks in which an echo got no reply, as that does not say which of the two got lost: all nodes send
// each other packets with a nonce at the same time, and say whose they have heard.
type Listen struct {
	// Nonce of nonceSize bytes is the same for all nodes.
	Nonce []byte `json:"nonce"`
	// Send are the ways to send on.
	Send []Path `json:"send"`
}

// Heard is what came through the overlay network from another node.
type Heard struct {
	Peer string `json:"peer"`
	IPv6 bool   `json:"ipv6,omitempty"`
	// Large: also the largest packets that the other node's device takes, not only small ones.
	Large bool `json:"large"`
}

// ListenAndSend does the second step on this machine. What it has heard is in report.Heard, which is not nil if it could listen.
func ListenAndSend(ctx context.Context, l Listen, report *NodeReport) error {
	if len(l.Nonce) != nonceSize {
		return fmt.Errorf("a nonce has %d bytes, this one has %d", nonceSize, len(l.Nonce))
	}
	ctx, cancel := context.WithTimeout(ctx, listenTime)
	defer cancel()
	report.Links = links(nil)
	heard := hearing{nonce: l.Nonce, from: map[Heard]bool{}}
	var listeners []*os.File
	for _, link := range report.Links {
		f, err := listen(link.Name)
		if err != nil {
			return errors.Join(fmt.Errorf("listen on %s: %w", link.Name, err), closeAll(listeners))
		}
		listeners = append(listeners, f)
	}
	if len(listeners) == 0 {
		return errNoOverlay
	}
	context.AfterFunc(ctx, func() { closeAll(listeners) }) //nolint:errcheck // nothing was written to them
	var wg sync.WaitGroup
	for _, f := range listeners {
		wg.Go(func() { heard.listen(f) })
	}
	select {
	case <-ctx.Done():
	case <-time.After(listenLead):
	}
	for _, p := range l.Send {
		wg.Go(func() {
			// What cannot be sent is not heard, and the first step says why.
			_ = send(ctx, p.Address.Addr(), overlayMTU(report.Links, p.Address.Addr()), l.Nonce, report.Node)
		})
	}
	wg.Wait()
	var peers []string
	for _, p := range l.Send {
		peers = append(peers, p.Peer)
	}
	report.Heard = heard.of(peers)
	return nil
}

func closeAll(files []*os.File) error {
	var errs []error
	for _, f := range files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// listen gets the ICMP packets that come out of a device, before any firewall of this machine looks at them.
func listen(device string) (*os.File, error) {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return nil, err
	}
	filter, err := icmpOnly()
	if err != nil {
		return nil, err
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Attrs().Index})
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), device), nil
}

// icmpOnly is a filter for IP packets: pods may send gigabits.
func icmpOnly() ([]unix.SockFilter, error) {
	raw, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 0, Size: 1},
		bpf.ALUOpConstant{Op: bpf.ALUOpShiftRight, Val: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 6, SkipTrue: 2},
		bpf.LoadAbsolute{Off: 9, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: protocolICMP, SkipTrue: 2, SkipFalse: 3},
		bpf.LoadAbsolute{Off: 6, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: protocolICMPv6, SkipFalse: 1},
		bpf.RetConstant{Val: 1 << 16},
		bpf.RetConstant{Val: 0},
	})
	var filter []unix.SockFilter
	for _, i := range raw {
		filter = append(filter, unix.SockFilter{Code: i.Op, Jt: i.Jt, Jf: i.Jf, K: i.K})
	}
	return filter, err
}

// hearing keeps whose packets were heard.
type hearing struct {
	nonce []byte
	mu    sync.Mutex
	from  map[Heard]bool
}

func (h *hearing) listen(f *os.File) {
	packet := make([]byte, 1<<16)
	for {
		n, err := f.Read(packet)
		if errors.Is(err, unix.ENETDOWN) { // it may come up again
			continue
		} else if err != nil {
			return
		}
		if one, ok := parseProbe(packet[:n], h.nonce); ok {
			h.mu.Lock()
			h.from[one] = true
			h.mu.Unlock()
		}
	}
}

// of is what was heard of some nodes. Other names are not from the one who asked.
func (h *hearing) of(peers []string) []Heard {
	list := []Heard{}
	for _, peer := range slices.Compact(slices.Sorted(slices.Values(peers))) {
		for _, v6 := range []bool{false, true} {
			large := h.from[Heard{peer, v6, true}]
			if large || h.from[Heard{peer, v6, false}] {
				list = append(list, Heard{peer, v6, large})
			}
		}
	}
	return list
}

// A probe is an echo request whose data are the nonce, its size (small or large), the sender's name and zeros.
const small, large = 's', 'l'

func probe(nonce []byte, size byte, sender string, bytes int) []byte {
	data := append(append(slices.Clone(nonce), size), sender...)
	return append(data, make([]byte, max(1, bytes-len(data)))...)
}

// parseProbe finds a probe in an IP packet that somebody sent.
func parseProbe(packet, nonce []byte) (h Heard, ok bool) {
	_, data, ok := bytes.Cut(packet, nonce)
	if !ok || len(data) < 2 {
		return h, false
	}
	name, _, ok := bytes.Cut(data[1:], []byte{0})
	if !ok || len(name) == 0 || data[0] != small && data[0] != large {
		return h, false
	}
	return Heard{Peer: string(name), IPv6: packet[0]>>4 == 6, Large: data[0] == large}, true
}

// send sends small and large probes and waits for no reply.
func send(ctx context.Context, to netip.Addr, mtu int, nonce []byte, sender string) error {
	conn, err := openEcho(ctx, to)
	if err != nil {
		return err
	}
	defer conn.Close()
	for seq := range echoTries {
		if seq > 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(sendPause):
			}
		}
		err = errors.Join(conn.request(seq, probe(nonce, small, sender, 0)), conn.request(seq, probe(nonce, large, sender, conn.room(mtu))))
	}
	return err
}
