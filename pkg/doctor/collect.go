// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/join/authority"
)

const (
	kubeletPort = 10250
	peerPort    = 2380
	etcdPort    = 2379
)

// Ask puts a question to the Kedge of a node.
type Ask func(ctx context.Context, node string, q Question) (*NodeReport, error)

// Collect asks the API and all nodes of a cluster, and self, this machine, even if it is none. What does not answer is in the facts; an error
// says that the API does not.
func Collect(ctx context.Context, client kubernetes.Interface, self string, ask Ask, log bool) (Facts, error) {
	f := Facts{Now: time.Now(), Reports: map[string]*NodeReport{}, Silent: map[string]string{}, Skew: map[string]time.Duration{}}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return f, err
	}
	pods, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return f, err
	}
	events, err := client.CoreV1().Events("").List(ctx, metav1.ListOptions{FieldSelector: "type=" + corev1.EventTypeWarning})
	if err != nil {
		return f, err
	}
	servers, err := authority.ListServers(ctx, client)
	if err != nil {
		return f, err
	}
	settings, err := clusterSettings(ctx, client)
	if err != nil {
		return f, err
	}
	f.Nodes, f.Pods, f.Events = nodes.Items, pods.Items, events.Items

	// A server without an agent is no node: it is reached on its own machine only.
	names := map[string]bool{}
	if self != "" {
		names[self] = true
	}
	for _, n := range f.Nodes {
		names[n.Name] = true
	}
	var mu sync.Mutex
	var group errgroup.Group
	for _, name := range slices.Sorted(maps.Keys(names)) {
		group.Go(func() error {
			q := question(name, f.Nodes, servers, settings)
			q.Log = log
			start := time.Now()
			report, err := ask(ctx, name, q)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				f.Silent[name] = err.Error()
				return nil
			}
			f.Reports[name] = report
			f.Skew[name] = skew(report.Time, start, time.Now())
			return nil
		})
	}
	group.Wait() //nolint:errcheck // what goes wrong is in the facts
	return f, f.listen(ctx, ask)
}

// listen has the nodes between which a way through the overlay network is closed do the second step.
func (f *Facts) listen(ctx context.Context, ask Ask) error {
	sends := map[string][]Path{} // by sender, both directions of what failed
	for name, r := range f.Reports {
		for _, w := range r.Ways {
			if w.Protocol != Overlay || w.Error == "" || f.Reports[w.Peer] == nil {
				continue
			}
			sends[name] = append(sends[name], w.Path)
			if back := f.Reports[w.Peer].way(Overlay, name, w.Address.Addr().Is6()); back != nil && back.Error == "" {
				sends[w.Peer] = append(sends[w.Peer], back.Path)
			}
		}
	}
	if len(sends) == 0 {
		return nil
	}
	nonce := make([]byte, nonceSize)
	rand.Read(nonce) //nolint:errcheck // it never fails
	var mu sync.Mutex
	var group errgroup.Group
	start := time.Now()
	for name, paths := range sends {
		group.Go(func() error {
			report, err := ask(ctx, name, Question{Listen: &Listen{Nonce: nonce, Send: paths}})
			// Who was late has not heard the others, or not been heard.
			if err == nil && time.Since(start) < listenTime+lateness {
				mu.Lock()
				defer mu.Unlock()
				f.Reports[name].Heard = report.Heard
			}
			return nil
		})
	}
	return group.Wait()
}

// way is the one to a peer that was tried so.
func (r *NodeReport) way(protocol Protocol, peer string, v6 bool) *Way {
	for i, w := range r.Ways {
		if w.Protocol == protocol && w.Peer == peer && w.Address.Addr().Is6() == v6 {
			return &r.Ways[i]
		}
	}
	return nil
}

// skew is how much a clock is certainly ahead (or, negative, behind) that showed its time at some moment between asked and answered.
func skew(shown, asked, answered time.Time) time.Duration {
	switch {
	case shown.After(answered):
		return shown.Sub(answered)
	case shown.Before(asked):
		return shown.Sub(asked)
	}
	return 0
}

// question is what a node is asked: the ways that it needs to the others, DNS and services.
func question(name string, nodes []corev1.Node, servers map[string]authority.Server, settings config.Cluster) Question {
	q := Question{Domain: settings.ClusterDomain, Services: firstServices(settings.ServiceCIDR)}
	self, isServer := servers[name]
	isNode := slices.ContainsFunc(nodes, func(n corev1.Node) bool { return n.Name == name })
	if isNode && !slices.Contains(settings.Disable, config.ComponentCoreDNS) {
		q.DNS = settings.ClusterDNS
	}
	if !isNode {
		q.Services = nil
	}
	add := func(peer string, protocol Protocol, address netip.Addr, port uint16, purpose string, optional bool) {
		if address.IsValid() {
			q.Paths = append(q.Paths, Path{peer, protocol, netip.AddrPortFrom(address, port), purpose, optional})
		}
	}
	dedicated := slices.ContainsFunc(slices.Collect(maps.Values(servers)), func(s authority.Server) bool { return s.ControlPlane && !s.Etcd })
	for _, peer := range slices.Sorted(maps.Keys(servers)) {
		s := servers[peer]
		if peer == name {
			continue
		}
		if api, err := netip.ParseAddrPort(s.Address); err == nil && s.ControlPlane {
			add(peer, TCP, api.Addr(), api.Port(), "the API server", false)
		}
		member := peerAddress(s.PeerURL)
		if s.Etcd && isServer && self.Etcd {
			add(peer, TCP, member, peerPort, "the datastore", false)
		}
		if s.Etcd && isServer && !self.Etcd && dedicated {
			add(peer, TCP, member, etcdPort, "the datastore, for servers without a member,", false)
		}
	}
	overlay := settings.FlannelBackend == config.FlannelVXLAN || settings.FlannelBackend == config.FlannelWireGuard
	for _, n := range nodes {
		if n.Name == name {
			continue
		}
		if isServer && self.ControlPlane {
			add(n.Name, TCP, internalIP(n), kubeletPort, "the kubelet", true)
		}
		if isNode && overlay {
			for _, cidr := range n.Spec.PodCIDRs {
				if prefix, err := netip.ParsePrefix(cidr); err == nil {
					add(n.Name, Overlay, prefix.Addr(), 0, "the pods", false)
				}
			}
		}
	}
	return q
}

func clusterSettings(ctx context.Context, client kubernetes.Interface) (c config.Cluster, err error) {
	m, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, join.ConfigMapCluster, metav1.GetOptions{})
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal([]byte(m.Data[join.KeyCluster]), &c)
}

// firstServices are the addresses of the kubernetes Service: the first of each range.
func firstServices(ranges config.Prefixes) []netip.Addr {
	var list []netip.Addr
	for _, r := range ranges {
		list = append(list, r.Addr().Next())
	}
	return list[:min(len(list), 1)] // it has one family
}

func peerAddress(peerURL string) netip.Addr {
	u, err := url.Parse(peerURL)
	if err != nil {
		return netip.Addr{}
	}
	address, _ := netip.ParseAddr(u.Hostname())
	return address
}

func internalIP(n corev1.Node) netip.Addr {
	for _, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			address, _ := netip.ParseAddr(a.Address)
			return address
		}
	}
	return netip.Addr{}
}
