// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
)

// How long a node's address must have been away, and the same other one been there, until the node takes that: links go down and come
// back, and DHCP clients take addresses away to set them anew. A node that has moved a moment ago is more patient, so that two addresses
// that come and go in turn do not keep it from working.
const (
	addressSettles     = 2 * time.Second
	addressSettlesSoon = 15 * time.Second // after a move
	movedRecently      = 2 * time.Minute
	// addressLook is how often the addresses are looked at if the kernel says nothing; addressLookGone while the node's is away.
	addressLook     = time.Minute
	addressLookGone = time.Second
)

// watchAddress ends the machine for a fresh start when the node's address is gone for good and was not chosen by the operator: with
// DHCP, or after a move, it is another one, and it stands in certificates and in everybody's configuration.
func (m *Machine) watchAddress(ctx context.Context) error {
	if _, given := m.cfg.Given["node-ip"]; given {
		return nil
	}
	settles := addressSettles
	moved := filepath.Join(m.cfg.RunDir, "moved")
	if info, err := os.Stat(moved); err == nil && time.Since(info.ModTime()) < movedRecently {
		settles = addressSettlesSoon
	}
	now, err := followAddress(ctx, addressChanges(ctx), m.addresses, settles)
	if now == nil || err != nil {
		return err
	}
	m.log.Warn("the node's address has changed, starting again with the new one", "was", m.cfg.NodeIP, "is", now)
	if err := os.WriteFile(moved, []byte(fmt.Sprintln(m.cfg.NodeIP, now)), 0o600); err != nil {
		m.log.Warn("the next change of the address will not be waited for longer", "error", err)
	}
	return ErrRestart
}

// addresses says whether the node has its addresses, and which ones it would have otherwise, nil if none.
func (m *Machine) addresses() (has bool, others []netip.Addr) {
	if has, err := hasAddresses(m.cfg.NodeIP); err != nil || has {
		return true, nil
	}
	now, err := m.cfg.ChooseAddresses()
	if err != nil || slices.Equal(now, m.cfg.NodeIP) {
		return false, nil // a link that is down: there is nothing to do
	}
	return false, now
}

// followAddress returns the addresses that the node has to take, nil when ctx ends.
func followAddress(ctx context.Context, changed <-chan struct{}, look func() (bool, []netip.Addr), settles time.Duration) ([]netip.Addr, error) {
	var others []netip.Addr
	var since time.Time
	for {
		again := addressLook
		switch has, now := look(); {
		case has:
			others = nil
		case now == nil || !slices.Equal(now, others):
			others, since, again = now, time.Now(), addressLookGone
		case time.Since(since) >= settles:
			return now, nil
		default:
			again = addressLookGone
		}
		if others != nil {
			again = min(again, settles-time.Since(since))
		}
		select {
		case <-ctx.Done():
			return nil, nil
		case <-changed:
		case <-time.After(again):
		}
	}
}

// addressChanges tells, in a channel of one slot, that the kernel has taken an address away from the machine.
func addressChanges(ctx context.Context) <-chan struct{} {
	changed := make(chan struct{}, 1)
	go func() {
		for ctx.Err() == nil {
			subscribed, stop := context.WithCancel(ctx)
			updates := make(chan netlink.AddrUpdate)
			// It ends, and closes the channel, when the kernel has lost messages.
			if err := netlink.AddrSubscribe(updates, subscribed.Done()); err == nil {
				for u := range updates {
					if !u.NewAddr { // what is new is seen while one is missing
						tell(changed)
					}
				}
			}
			stop()
			tell(changed)
			select {
			case <-ctx.Done():
			case <-time.After(addressLookGone):
			}
		}
	}()
	return changed
}

func tell(changed chan<- struct{}) {
	select {
	case changed <- struct{}{}:
	default:
	}
}

// hasAddresses says whether the machine has all of them.
func hasAddresses(wanted []netip.Addr) (bool, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return false, err
	}
	missing := slices.DeleteFunc(slices.Clone(wanted), func(a netip.Addr) bool {
		return slices.ContainsFunc(list, func(have net.Addr) bool {
			p, err := netip.ParsePrefix(have.String())
			return err == nil && p.Addr().Unmap() == a
		})
	})
	return len(missing) == 0, nil
}
