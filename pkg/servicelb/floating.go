// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/kubernetes"
)

// groupsOn says for which leases a node competes, and which addresses it announces with each.
func groupsOn(own *corev1.Node, nodes []*corev1.Node, services []*corev1.Service, slicesOf func(*corev1.Service) []*discoveryv1.EndpointSlice) map[string][]netip.Addr {
	groups := map[string][]netip.Addr{}
	if !eligible(own, anyChosen(nodes)) {
		return groups
	}
	for _, svc := range services {
		if !ours(svc) || local(svc) && !servesOn(slicesOf(svc), own.Name) {
			continue
		}
		if floating := ingress(svc, corev1.LoadBalancerIPModeVIP); len(floating) > 0 {
			groups[leaseOf(svc)] = append(groups[leaseOf(svc)], floating...)
		}
	}
	return groups
}

// anyFloating says whether some Service has an address that a node has to announce. They come from the controller: nodes need not know
// the pool.
func anyFloating(services []*corev1.Service) bool {
	return slices.ContainsFunc(services, func(svc *corev1.Service) bool {
		return ours(svc) && len(ingress(svc, corev1.LoadBalancerIPModeVIP)) > 0
	})
}

// floater announces groups of addresses while it holds their leases.
type floater struct {
	client    kubernetes.Interface
	identity  string
	create    bool // the leases, which the controller makes otherwise
	keep      bool // addresses while no API server takes renewals, see election
	log       *slog.Logger
	announcer announcer

	wanted chan map[string][]netip.Addr // the latest, one slot

	mu     sync.Mutex // of what follows, and of the announcer
	groups map[string]*group
	failed error
	// listening ends the look-out for other nodes with addresses of leases that are only kept; nil: there are none.
	listening func()
	deaf      bool // it failed
}

// group of addresses that one lease decides about.
type group struct {
	addresses []netip.Addr
	election  *election
	overdue   bool   // the lease is only kept
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
	g := &group{election: &election{log: f.log, identity: f.identity, changed: f.apply, create: f.create, keep: f.keep}}
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
	kept := false
	for name, g := range f.groups {
		left, overdue := g.election.remaining()
		if overdue != g.overdue {
			g.overdue = overdue
			if overdue {
				f.log.Warn("no API server takes the renewal of a lease: keeps answering for its addresses until another node does", "lease", name, "addresses", g.addresses)
			}
		}
		if left <= 0 || overdue && f.deaf {
			continue
		}
		kept = kept || overdue
		for _, a := range g.addresses {
			want[a] = left
		}
	}
	f.listen(kept)
	err := f.announcer.apply(want)
	if err != nil && (f.failed == nil || err.Error() != f.failed.Error()) {
		f.log.Warn("floating addresses, will try again", "error", err)
	}
	f.failed = err
}

// listen starts or ends the look-out. The mutex is held.
func (f *floater) listen(on bool) {
	switch {
	case on && f.listening == nil:
		ctx, cancel := context.WithCancel(context.Background())
		f.listening = cancel
		go func() {
			if err := claims(ctx, f.claimed); err != nil && ctx.Err() == nil {
				f.log.Warn("cannot tell whether another node answers for floating addresses: does not keep any", "error", err)
				f.mu.Lock()
				f.deaf = true
				f.mu.Unlock()
			}
		}()
	case !on && f.listening != nil:
		f.listening()
		f.listening = nil
	}
}

// claimed takes note that another machine says to have an address. If that is one of a lease that is only kept, the other one has it.
func (f *floater) claimed(addr netip.Addr, who string) {
	var lost []*group
	f.mu.Lock()
	for _, g := range f.groups {
		if _, overdue := g.election.remaining(); overdue && slices.Contains(g.addresses, addr) {
			lost = append(lost, g)
		}
	}
	f.mu.Unlock()
	for _, g := range lost {
		f.log.Info("another machine answers for a floating address", "address", addr, "machine", who)
		g.election.yield()
	}
}
