// SPDX-License-Identifier: Apache-2.0

// Package netpolicy enforces the NetworkPolicies of the networking.k8s.io API for the pods of its node, with nftables.
//
// Policies are compiled into a [ruleset]: a chain for each distinct set of policies that applies to a pod, which pods share, sets with the
// addresses that selectors stand for, and maps from pods' addresses to their chains. The kernel's table is brought to it by differences.
//
// A pod is announced by the CNI plugin before it starts (package announce), and starts when its rules are loaded.
package netpolicy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"
)

// Names within a node's run directory, for those who make [Config] and for the commands that ask.
const (
	SocketName = "netpolicy.sock"
	DirName    = "netpolicy"
)

const (
	// gather is how long changes are collected that come together.
	gather = 20 * time.Millisecond
	// duty bounds what continuous change may cost: after a load comes a pause of this many times its duration, but not more than maxPause.
	// Only a pod that waits for its rules ends it.
	duty     = 4
	maxPause = time.Second
	// checkInterval is how often the table is looked at; other programs flush it.
	checkInterval = 2 * time.Second
	// compareInterval is how often all of the table is read and compared.
	compareInterval = 15 * time.Minute
	// retryInterval follows a failure, and doubles up to maxRetryInterval.
	retryInterval    = time.Second
	maxRetryInterval = 30 * time.Second
	// waitInterval follows when something is only not there yet.
	waitInterval = 200 * time.Millisecond
)

// Config of a node's controller.
type Config struct {
	NodeName     string
	Client       kubernetes.Interface
	ClusterCIDRs []netip.Prefix // their families are those that pods have
	ClusterDNS   []netip.Addr   // where the node itself answers as the cluster's DNS; policies take it for a pod, see dnsPod
	Socket       string         // of the CNI plugin and of trace
	Dir          string         // of the announcements; has to be gone after a reboot, like the pods
}

// Controller enforces policies on a node.
type Controller struct {
	cfg    Config
	log    *slog.Logger
	kick   chan struct{} // something has changed
	urgent chan struct{} // a pod waits
	pause  time.Duration // maxPause
	every  time.Duration // checkInterval
	kernel *kernel       // nil until nft has been found to work; the loop's
	watch  *watches      // the loop's

	mu       sync.Mutex
	records  map[string]*record // container → announcement
	changes  uint64             // counts announcements and releases
	applied  uint64             // changes that the kernel's rules include
	loaded   chan struct{}      // closed at the next load
	rules    *ruleset           // what was loaded last
	podCIDRs []netip.Prefix     // of this node
	err      error              // why policies are not enforced now
}

// New looks at the configuration.
func New(cfg Config, log *slog.Logger) (*Controller, error) {
	if cfg.NodeName == "" || cfg.Client == nil || len(cfg.ClusterCIDRs) == 0 || cfg.Socket == "" || cfg.Dir == "" {
		return nil, errors.New("network policies: the configuration is not complete")
	}
	return &Controller{
		cfg: cfg, log: log.With("component", "netpolicy"), kick: make(chan struct{}, 1), urgent: make(chan struct{}, 1),
		pause: maxPause, every: checkInterval, loaded: make(chan struct{}), err: errors.New("network policies: not started yet"),
	}, nil
}

// Ready says why policies are not enforced, nil if they are.
func (c *Controller) Ready() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// families of the cluster's pods.
func (c *Controller) families() (all []family) {
	for _, f := range []family{v4, v6} {
		if slices.ContainsFunc(c.cfg.ClusterCIDRs, func(p netip.Prefix) bool { return familyOf(p.Addr()) == f }) {
			all = append(all, f)
		}
	}
	return all
}

// Run enforces policies until ctx ends. The rules stay when it returns: the next Run, usually in another process, takes them over.
func (c *Controller) Run(ctx context.Context) error {
	records, err := loadRecords(c.cfg.Dir, c.log)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.records = records
	c.mu.Unlock()
	c.kernel = nil

	group, ctx := errgroup.WithContext(ctx)
	c.watch = startWatches(ctx, c.cfg, c.changed)
	group.Go(func() error { return c.serve(ctx) })
	group.Go(func() error { c.loop(ctx); return nil })
	err = group.Wait()
	c.watch.wg.Wait()
	c.mu.Lock()
	c.err = errors.New("network policies: stopped; the rules that were loaded last stay in place")
	c.mu.Unlock()
	return err
}

// changed makes the loop look at everything again.
func (c *Controller) changed() { signal(c.kick) }

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default: // it is going to be seen
	}
}

// drain takes what is done now.
func drain(ch chan struct{}) {
	select {
	case <-ch:
	default:
	}
}

func (c *Controller) loop(ctx context.Context) {
	check, compare := time.NewTicker(c.every), time.NewTicker(compareInterval)
	defer check.Stop()
	defer compare.Stop()
	retry := retryInterval
	var next time.Time // not before
	c.changed()
	for {
		select {
		case <-ctx.Done():
			return
		case <-compare.C:
			if c.kernel != nil {
				c.kernel.loaded = nil
			}
			c.watch.rest()
		case <-check.C:
			if c.intact() {
				continue
			}
		case <-c.kick:
		case <-c.urgent:
			next = time.Now()
		}
		select {
		case <-ctx.Done():
			return
		case <-c.urgent:
		case <-time.After(max(gather, time.Until(next))):
		}
		drain(c.kick)
		drain(c.urgent)
		start := time.Now()
		err := c.sync(ctx)
		if ctx.Err() != nil {
			return
		}
		c.fail(err)
		switch end := time.Now(); {
		case err == nil:
			next, retry = end.Add(min(duty*end.Sub(start), c.pause)), retryInterval
		case errors.Is(err, errWaiting):
			next = end.Add(waitInterval)
			c.changed()
		default:
			next, retry = end.Add(retry), min(2*retry, maxRetryInterval)
			c.changed()
		}
	}
}

// fail notes why policies are not enforced, nil if they are, and logs what is new.
func (c *Controller) fail(err error) {
	c.mu.Lock()
	before := c.err
	c.err = err
	c.mu.Unlock()
	switch {
	case err == nil && before != nil:
		c.log.Info("network policies are enforced")
	case err != nil && !errors.Is(err, errWaiting) && (before == nil || before.Error() != err.Error()):
		c.log.Error("network policies", "error", err)
	}
}

// intact notices a table that somebody else has removed or emptied.
func (c *Controller) intact() bool {
	if c.kernel == nil {
		return true
	}
	ok, err := c.kernel.intact()
	if err != nil {
		c.log.Warn("the table of network policies cannot be looked at", "error", err)
	} else if !ok {
		c.log.Warn("the table of network policies was changed by another program; it is loaded again")
	}
	if !ok {
		c.kernel.loaded = nil
	}
	return ok
}

// sync loads the rules for what is known now.
func (c *Controller) sync(ctx context.Context) error {
	if c.kernel == nil {
		k, err := newKernel()
		if err != nil {
			return err
		}
		c.kernel = k
	}
	if err := c.watch.ready(); err != nil {
		return err
	}
	if err := c.findPodCIDRs(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	changes := c.changes
	w := c.world()
	c.mu.Unlock()

	rules := compile(w)
	before, err := c.kernel.load(ctx, rules)
	if err != nil {
		return err
	}
	if err := c.kernel.cut(ctx, before, rules); err != nil {
		c.log.Warn("connections that policies forbid now could not be cut", "error", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rules, c.applied = rules, changes
	close(c.loaded)
	c.loaded = make(chan struct{})
	return nil
}

// errWaiting is behind reasons that end by themselves.
var errWaiting = errors.New("waiting")

func waiting(format string, args ...any) error {
	return fmt.Errorf("network policies: %w %s", errWaiting, fmt.Sprintf(format, args...))
}
