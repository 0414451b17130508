// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/kubernetes"
)

// groupsOn says for which leases a node competes, and which addresses it announces with each.
func groupsOn(own *corev1.Node, nodes []*corev1.Node, services []*corev1.Service, slicesOf func(*corev1.Service) []*discoveryv1.EndpointSlice, pool Pool) map[string][]netip.Addr {
	groups := map[string][]netip.Addr{}
	if len(pool) == 0 || !eligible(own, anyChosen(nodes)) {
		return groups
	}
	for _, svc := range services {
		if !ours(svc) || local(svc) && !servesOn(slicesOf(svc), own.Name) {
			continue
		}
		for _, a := range ingress(svc, corev1.LoadBalancerIPModeVIP) {
			if pool.Contains(a) {
				groups[leaseOf(svc)] = append(groups[leaseOf(svc)], a)
			}
		}
	}
	return groups
}

// floater announces groups of addresses while it holds their leases.
type floater struct {
	client    kubernetes.Interface
	identity  string
	create    bool // the leases, which the controller makes otherwise
	log       *slog.Logger
	announcer announcer

	wanted chan map[string][]netip.Addr // the latest, one slot

	mu     sync.Mutex // of what follows, and of the announcer
	groups map[string]*group
	failed error
}

// group of addresses that one lease decides about.
type group struct {
	addresses []netip.Addr
	election  *election
	stop      func() // ends the election and waits for its end
}

func newFloater(client kubernetes.Interface, identity string, beside netip.Addr, log *slog.Logger, onBound func(netip.Addr, string)) *floater {
	return &floater{
		client: client, identity: identity, log: log, announcer: announcer{log: log, beside: beside, onBound: onBound},
		wanted: make(chan map[string][]netip.Addr, 1), groups: map[string]*group{},
	}
}

// want sets what is competed for. It does not wait.
func (f *floater) want(groups map[string][]netip.Addr) {
	select {
	case <-f.wanted: // older
	default:
	}
	f.wanted <- groups
}

func (f *floater) problem() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.failed
}

// run competes and announces until ctx ends; then it takes the addresses away and gives the leases back.
func (f *floater) run(ctx context.Context) {
	for {
		var tick <-chan time.Time
		if len(f.groups) > 0 { // only compete changes them
			tick = time.After(prolong)
		}
		select {
		case <-ctx.Done():
			f.compete(ctx, nil)
			return
		case groups := <-f.wanted:
			f.compete(ctx, groups)
		case <-tick:
			f.apply()
		}
	}
}

// compete starts and ends elections.
func (f *floater) compete(ctx context.Context, groups map[string][]netip.Addr) {
	var ended []func()
	f.mu.Lock()
	for name, g := range f.groups {
		if _, still := groups[name]; !still {
			ended = append(ended, g.stop)
			delete(f.groups, name)
		}
	}
	for name, addresses := range groups {
		if f.groups[name] == nil {
			f.groups[name] = f.begin(context.WithoutCancel(ctx), name)
		}
		f.groups[name].addresses = addresses
	}
	f.mu.Unlock()
	f.apply() // before the leases are given back
	var wg sync.WaitGroup
	for _, stop := range ended {
		wg.Go(stop)
	}
	wg.Wait()
}

func (f *floater) begin(ctx context.Context, name string) *group {
	ctx, cancel := context.WithCancel(ctx)
	g := &group{election: &election{log: f.log, identity: f.identity, changed: f.apply, create: f.create}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.election.run(ctx, f.client, name)
	}()
	g.stop = func() { cancel(); <-done }
	return g
}

// apply binds what is held and nothing else.
func (f *floater) apply() {
	f.mu.Lock()
	defer f.mu.Unlock()
	want := map[netip.Addr]time.Duration{}
	for _, g := range f.groups {
		if left := g.election.remaining(); left > 0 {
			for _, a := range g.addresses {
				want[a] = left
			}
		}
	}
	err := f.announcer.apply(want)
	if err != nil && (f.failed == nil || err.Error() != f.failed.Error()) {
		f.log.Warn("floating addresses, will try again", "error", err)
	}
	f.failed = err
}
