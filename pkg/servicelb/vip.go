// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"k8s.io/client-go/kubernetes"
)

const (
	vipLease = "kedge-api-vip"

	// Timing of the look at the server's own API.
	vipProbe    = time.Second
	vipTimeout  = 2 * time.Second
	vipFailures = 2 // in a row
)

// APIVIPConfig is the configuration of an [APIVIP].
type APIVIPConfig struct {
	NodeName string
	// Client asks this server's own API server, no other.
	Client kubernetes.Interface
	// Addresses to announce, of one or both families.
	Addresses []netip.Addr
	// NodeAddress is an address of the interface that takes those of Addresses which lie in no interface's network.
	NodeAddress netip.Addr
	// Healthy asks whether this server's API server does its work.
	Healthy func(context.Context) error
}

// APIVIP announces the virtual address of the API servers from one of the servers whose API is healthy.
type APIVIP struct {
	cfg   APIVIPConfig
	float *floater

	mu      sync.Mutex
	problem error
}

// NewAPIVIP makes one that has not started.
func NewAPIVIP(cfg APIVIPConfig, log *slog.Logger) *APIVIP {
	log = log.With("component", "api-vip")
	v := &APIVIP{cfg: cfg, float: newFloater(cfg.Client, cfg.NodeName, cfg.NodeAddress, log, nil), problem: errors.New("not started")}
	v.float.create = true
	return v
}

// Ready returns nil when this server could announce the address, or does, otherwise the reason why not.
func (v *APIVIP) Ready() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return errors.Join(v.problem, v.float.problem())
}

// Run works until ctx ends and returns nil then; the address goes to another server at once.
func (v *APIVIP) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { v.float.run(ctx) })
	defer wg.Wait()
	failures := vipFailures // not known yet
	for {
		err := v.probe(ctx)
		if failures++; err == nil {
			failures = 0
		}
		groups := map[string][]netip.Addr{}
		if failures < vipFailures {
			groups[vipLease] = v.cfg.Addresses
		}
		v.float.want(groups)
		v.mu.Lock()
		v.problem = err
		v.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(vipProbe):
		}
	}
}

func (v *APIVIP) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, vipTimeout)
	defer cancel()
	return v.cfg.Healthy(ctx)
}
