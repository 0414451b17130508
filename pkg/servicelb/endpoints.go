// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/utils/ptr"
)

// endpoint of one port of a Service.
type endpoint struct {
	address               netip.AddrPort
	local, ready, serving bool // serving: it answers, though it is terminating
	forNodes, forZones    []string
}

// endpointsOf collects a port's endpoints of a family from all slices of the Service.
func endpointsOf(list []*discoveryv1.EndpointSlice, f corev1.IPFamily, port corev1.ServicePort, node string) []endpoint {
	var all []endpoint
	for _, slice := range list {
		if string(slice.AddressType) != string(f) {
			continue
		}
		for _, p := range slice.Ports {
			if ptr.Deref(p.Name, "") != port.Name || ptr.Deref(p.Protocol, corev1.ProtocolTCP) != port.Protocol || p.Port == nil {
				continue
			}
			for i := range slice.Endpoints {
				all = append(all, endpointAt(&slice.Endpoints[i], uint16(*p.Port), node)...)
			}
		}
	}
	// Ready ones first, for the case that an address is in two slices while it moves from one to the other.
	slices.SortFunc(all, func(a, b endpoint) int {
		if c := a.address.Compare(b.address); c != 0 || a.ready == b.ready {
			return c
		}
		if a.ready {
			return -1
		}
		return 1
	})
	return slices.CompactFunc(all, func(a, b endpoint) bool { return a.address == b.address })
}

func endpointAt(e *discoveryv1.Endpoint, port uint16, node string) []endpoint {
	if len(e.Addresses) == 0 {
		return nil
	}
	addr, err := netip.ParseAddr(e.Addresses[0]) // upstream takes the first, too
	if err != nil {
		return nil
	}
	one := endpoint{
		address: netip.AddrPortFrom(addr, port), local: ptr.Deref(e.NodeName, "") == node,
		ready: ready(e), serving: serving(e) && ptr.Deref(e.Conditions.Terminating, false),
	}
	if e.Hints != nil {
		for _, n := range e.Hints.ForNodes {
			one.forNodes = append(one.forNodes, n.Name)
		}
		for _, z := range e.Hints.ForZones {
			one.forZones = append(one.forZones, z.Name)
		}
	}
	return []endpoint{one}
}

func ready(e *discoveryv1.Endpoint) bool   { return ptr.Deref(e.Conditions.Ready, true) }
func serving(e *discoveryv1.Endpoint) bool { return ptr.Deref(e.Conditions.Serving, ready(e)) }

// servesOn says whether a node has an endpoint that answers, by the same rules as usable.
func servesOn(list []*discoveryv1.EndpointSlice, node string) bool {
	return slices.ContainsFunc(list, func(slice *discoveryv1.EndpointSlice) bool {
		return slices.ContainsFunc(slice.Endpoints, func(e discoveryv1.Endpoint) bool {
			return ptr.Deref(e.NodeName, "") == node && (ready(&e) || serving(&e))
		})
	})
}

// usable chooses among the endpoints as k8s.io/kubernetes/pkg/proxy.CategorizeEndpoints does: the ready ones, and if there are none those
// that still answer while they terminate; inside is what all of the cluster may use, with the hints of topology, and here are those of this node.
func usable(all []endpoint, node, zone string) (inside, here []netip.AddrPort) {
	cluster := all
	if isReady := func(e endpoint) bool { return e.ready }; slices.ContainsFunc(all, isReady) {
		readyOnes := filter(all, isReady)
		cluster = byHints(readyOnes, node, zone)
	} else {
		cluster = filter(all, func(e endpoint) bool { return e.serving })
	}
	onNode := filter(all, func(e endpoint) bool { return e.local && e.ready })
	if len(onNode) == 0 {
		onNode = filter(all, func(e endpoint) bool { return e.local && e.serving })
	}
	return addressesFrom(cluster), addressesFrom(onNode)
}

// byHints follows the hints of a node, or else of its zone, if every endpoint has them and one is meant for here.
func byHints(list []endpoint, node, zone string) []endpoint {
	for _, hint := range []func(endpoint) ([]string, string){
		func(e endpoint) ([]string, string) { return e.forNodes, node },
		func(e endpoint) ([]string, string) { return e.forZones, zone },
	} {
		complete := !slices.ContainsFunc(list, func(e endpoint) bool { names, _ := hint(e); return len(names) == 0 })
		meant := filter(list, func(e endpoint) bool { names, here := hint(e); return slices.Contains(names, here) })
		if complete && len(meant) > 0 {
			return meant
		}
	}
	return list
}

func filter(list []endpoint, keep func(endpoint) bool) []endpoint {
	var kept []endpoint
	for _, e := range list {
		if keep(e) {
			kept = append(kept, e)
		}
	}
	return kept
}

func addressesFrom(list []endpoint) []netip.AddrPort {
	var addrs []netip.AddrPort
	for _, e := range list {
		addrs = append(addrs, e.address)
	}
	return addrs
}
