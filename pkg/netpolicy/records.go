// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/renameio/v2"

	"github.com/kedge-io/kedge/pkg/netpolicy/announce"
)

// announceTimeout is how long a pod waits for its rules. The container runtime tries again after it.
const announceTimeout = 30 * time.Second

// record is an announcement, with what was known of its pod last: a pod that was removed from the API may still run.
type record struct {
	announce.Pod
	Identity *identity `json:"identity,omitempty"`
}

// loadRecords reads what an earlier process was told. Announcements that cannot be read are removed: what is known of their pods is then
// what the API knows.
func loadRecords(dir string, log *slog.Logger) (map[string]*record, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	files, err := filepath.Glob(announce.File(dir, "*"))
	if err != nil {
		return nil, err
	}
	records := map[string]*record{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		r := &record{}
		if err = json.Unmarshal(text, r); err == nil {
			err = r.Validate()
		}
		if err == nil && announce.File(dir, r.Container) == file {
			records[r.Container] = r
			continue
		}
		log.Warn("an announcement of a pod is damaged and is removed", "file", file, "error", err)
		if err := os.Remove(file); err != nil {
			return nil, err
		}
	}
	return records, nil
}

func (c *Controller) store(r record) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return renameio.WriteFile(announce.File(c.cfg.Dir, r.Container), text, 0o600)
}

// announce notes a pod's addresses and returns when its rules are loaded.
func (c *Controller) announce(ctx context.Context, p announce.Pod) error {
	ctx, cancel := context.WithTimeout(ctx, announceTimeout)
	defer cancel()
	r := &record{Pod: p}
	if err := c.store(*r); err != nil {
		return err
	}
	c.mu.Lock()
	for id, other := range c.records {
		// An address that is given out again is its last owner's no more, even if nobody has said so.
		if id != p.Container && slices.ContainsFunc(other.Addresses, func(a netip.Addr) bool { return slices.Contains(p.Addresses, a) }) {
			c.forget(id)
		}
	}
	c.records[p.Container] = r
	c.changes++
	mine := c.changes
	c.mu.Unlock()
	signal(c.urgent)

	for {
		c.mu.Lock()
		now, done := *r, c.applied >= mine && r.Identity != nil
		loaded, err := c.loaded, c.err
		c.mu.Unlock()
		if done {
			return c.store(now)
		}
		select {
		case <-loaded:
		case <-ctx.Done():
			if err == nil {
				err = errors.New("the API has not shown this pod to the node yet")
			}
			return fmt.Errorf("pod %s/%s is not attached to the network, since its network policies are not in place: %w", p.Namespace, p.Name, err)
		}
	}
}

// release forgets a container's announcement.
func (c *Controller) release(container string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changed()
	return c.forget(container)
}

// forget a container's announcement. c.mu is held.
func (c *Controller) forget(container string) error {
	delete(c.records, container)
	c.changes++
	if err := os.Remove(announce.File(c.cfg.Dir, container)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// check fails unless a pod is announced as given, and its addresses are open in the rules that were loaded last.
func (c *Controller) check(p announce.Pod) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.records[p.Container]
	if !ok || !slices.Equal(r.Addresses, p.Addresses) {
		return fmt.Errorf("pod %s/%s is not known to the network policies with these addresses", p.Namespace, p.Name)
	}
	for _, a := range p.Addresses {
		if c.rules == nil || !c.rules.knows(a) {
			return fmt.Errorf("pod %s/%s: %s is not in the rules", p.Namespace, p.Name, a)
		}
	}
	return c.err
}
