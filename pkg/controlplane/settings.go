// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"encoding/json"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/servicelb"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// cluster is the cluster's settings as they are known now.
func (p *plane) cluster() config.Cluster {
	if c := p.settings.Load(); c != nil {
		return *c
	}
	return p.cfg.Cluster
}

// followSettings takes over what is changed in the cluster's settings while it runs.
func (p *plane) followSettings(ctx context.Context) {
	authority.WatchSettings(ctx, p.client, func(settings []byte) {
		// Not into a copy of what is known: the lists in that are shared, and would be written over.
		was, is := p.cluster(), config.Cluster{}
		if err := json.Unmarshal(settings, &is); err != nil {
			p.log.Warn("the cluster's settings are damaged, goes by those from before", "component", "join", "error", err)
			return
		}
		p.settings.Store(&is)
		changed := was.Changed(is)
		for name, news := range map[string]chan struct{}{"servicelb-pool": p.poolChanged, "api-vip": p.vipChanged} {
			if slices.Contains(changed, name) {
				select {
				case news <- struct{}{}:
				default:
				}
			}
		}
	})
}

// runAPIVIP has the floating addresses of the API on this machine while it is this server's turn.
func (p *plane) runAPIVIP(ctx context.Context) {
	for ctx.Err() == nil {
		addresses := p.cluster().APIVIP
		running, stop := context.WithCancel(ctx)
		var wg sync.WaitGroup
		if len(addresses) > 0 {
			wg.Go(func() { p.announceAPI(running, addresses) })
		}
		select {
		case <-p.vipChanged:
			if len(p.cluster().APIVIP) == 0 {
				defer p.child.Report(ComponentAPIVIP, supervise.Ready, "not configured any more")
			}
		case <-ctx.Done():
		}
		stop()
		wg.Wait()
	}
}

func (p *plane) announceAPI(ctx context.Context, addresses []netip.Addr) {
	vip := servicelb.NewAPIVIP(servicelb.APIVIPConfig{
		NodeName: p.cfg.NodeName, Client: p.client, Addresses: addresses, NodeAddress: p.cfg.AdvertiseAddress,
		Healthy: func(ctx context.Context) error { return healthy(ctx, p.client, "/readyz") },
	}, p.log)
	go func() {
		for ctx.Err() == nil {
			if err := vip.Ready(); err != nil {
				p.child.Report(ComponentAPIVIP, supervise.Running, err.Error())
			} else {
				p.child.Report(ComponentAPIVIP, supervise.Ready, "")
			}
			select {
			case <-ctx.Done():
			case <-time.After(5 * time.Second):
			}
		}
	}()
	if err := vip.Run(ctx); err != nil {
		p.log.Error("the API's floating address is not announced from here", "error", err)
	}
}
