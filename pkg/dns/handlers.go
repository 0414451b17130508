// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/request"
	miekg "github.com/miekg/dns"
)

var (
	_ plugin.Handler = sourceCheck{}
	_ plugin.Handler = clusterNames{}
	_ plugin.Handler = unresolved{}
)

// sourceCheck refuses queries that come neither from a pod nor from the node. The cluster DNS address is on the loopback device, but Linux
// takes packets for it on every device. CoreDNS's acl plugin wants a fixed list, and a node's addresses change.
type sourceCheck struct {
	next  plugin.Handler
	local *localAddrs
}

func (sourceCheck) Name() string { return dirKedge }

func (h sourceCheck) ServeDNS(ctx context.Context, w miekg.ResponseWriter, r *miekg.Msg) (int, error) {
	state := request.Request{W: w, Req: r}
	src, err := netip.ParseAddr(state.IP())
	if err != nil || !h.local.contains(src.Unmap().WithZone("")) {
		return miekg.RcodeRefused, nil // dnsserver writes it
	}
	return plugin.NextOrFailure(h.Name(), h.next, ctx, w, r)
}

// localAddrs are the addresses that may ask: the pods' networks and whatever the node itself has. The latter is read from the kernel when an
// unknown address asks, at most once a second, so an idle node does nothing.
type localAddrs struct {
	prefixes []netip.Prefix
	own      []netip.Addr

	mu   sync.Mutex
	read time.Time
	node []netip.Addr
}

func (l *localAddrs) contains(a netip.Addr) bool {
	if a.IsLoopback() || slices.Contains(l.own, a) || slices.ContainsFunc(l.prefixes, func(p netip.Prefix) bool { return p.Contains(a) }) {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if slices.Contains(l.node, a) {
		return true
	}
	if time.Since(l.read) < time.Second {
		return false
	}
	l.read = time.Now()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	l.node = l.node[:0]
	for _, addr := range addrs {
		if p, err := netip.ParsePrefix(addr.String()); err == nil {
			l.node = append(l.node, p.Addr().Unmap().WithZone(""))
		}
	}
	return slices.Contains(l.node, a)
}

// clusterNames answers from the Server's kubernetes plugin, and with SERVFAIL for the cluster's domain as long as the API has not been reached.
type clusterNames struct {
	server *Server
	next   plugin.Handler
}

func (clusterNames) Name() string { return dirCluster }

func (h clusterNames) ServeDNS(ctx context.Context, w miekg.ResponseWriter, r *miekg.Msg) (int, error) {
	shared := h.server.cluster.Load()
	if shared == nil {
		state := request.Request{W: w, Req: r}
		if miekg.IsSubDomain(miekg.Fqdn(h.server.cfg.ClusterDomain), state.Name()) {
			return miekg.RcodeServerFailure, nil // not cached, unlike a written one
		}
		return plugin.NextOrFailure(h.Name(), h.next, ctx, w, r)
	}
	k := *shared // only Next differs between the server blocks
	k.Next = h.next
	return k.ServeDNS(ctx, w, r)
}

// unresolved answers SERVFAIL at once when there is no upstream to ask. It is not NXDOMAIN because nobody said that the name does not exist:
// programs take that as final and caches keep it, and the uplink may come back any moment.
type unresolved struct{}

func (unresolved) Name() string { return dirUnresolved }

func (unresolved) ServeDNS(context.Context, miekg.ResponseWriter, *miekg.Msg) (int, error) {
	return miekg.RcodeServerFailure, nil
}
