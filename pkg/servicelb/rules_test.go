// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"fmt"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/knftables"

	"github.com/kedge-io/kedge/tests/golden"
)

// sliceOn is every Service's endpoints: ready ones, on a node, behind port 8080.
func sliceOn(node string, addresses ...string) func(*corev1.Service) []*discoveryv1.EndpointSlice {
	return func(*corev1.Service) []*discoveryv1.EndpointSlice {
		var list []*discoveryv1.EndpointSlice
		for _, a := range addresses {
			list = append(list, &discoveryv1.EndpointSlice{
				AddressType: discoveryv1.AddressType(family(addr(a))),
				Ports: []discoveryv1.EndpointPort{{Name: new(""), Protocol: new(corev1.ProtocolTCP), Port: new(int32(8080))},
					{Name: new("dns"), Protocol: new(corev1.ProtocolUDP), Port: new(int32(8053))}},
				Endpoints: []discoveryv1.Endpoint{{Addresses: []string{a}, NodeName: &node}},
			})
		}
		return list
	}
}

func TestRules(t *testing.T) {
	node := nodeWith("n", true, nil, "192.0.2.1", "fd00::1", "ext:198.51.100.1")
	mode := corev1.LoadBalancerIPModeProxy
	dual := families(corev1.IPv4Protocol, corev1.IPv6Protocol)
	sticky := func(s *corev1.Service) {
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: new(int32(600))}}
	}
	sources := func(s *corev1.Service) {
		s.Spec.LoadBalancerSourceRanges = []string{"10.1.0.0/16", "10.0.0.0/8", " 192.0.2.9/32", "fd00::/8"}
	}
	dns := func(s *corev1.Service) {
		s.Spec.Ports = []corev1.ServicePort{{Name: "dns", Protocol: corev1.ProtocolUDP, Port: 53, TargetPort: intstr.FromInt(8053)}}
	}
	missing := func(s *corev1.Service) { s.Spec.Ports[0].Name, s.Spec.Ports[0].Port = "none", 82 }
	endpoints := sliceOn("n", "10.42.1.2", "fd00:42::2")
	away := sliceOn("m", "10.42.2.2")
	slicesOf := func(svc *corev1.Service) []*discoveryv1.EndpointSlice {
		if svc.Name == "dns" {
			return endpoints(svc)
		}
		return append(endpoints(svc), away(svc)...)
	}
	services := []*corev1.Service{
		service("web", 1, dual, having(mode, "192.0.2.1", "fd00::1")),
		service("dns", 1, dns, having(mode, "198.51.100.1")),
		service("local", 1, ports(81), policyLocal, sources, having(mode, "192.0.2.1")),
		service("sticky", 1, ports(83), policyLocal, sticky, having(mode, "192.0.2.1")),
		service("empty", 1, missing, having(mode, "192.0.2.1")),
		service("elsewhere", 1, ports(84), having(mode, "192.0.2.2")),
		service("floating", 1, ports(85), having(corev1.LoadBalancerIPModeVIP, "192.0.2.1")),
	}
	nft := knftables.NewFake(knftables.InetFamily, nftTable)
	tab := &table{nft: nft, pods: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd00:42::/56")}}
	s := frontendsOn(node, services, slicesOf)
	if changed, err := tab.write(t.Context(), s); !changed || err != nil {
		t.Fatal(changed, err)
	}
	golden.Compare(t, "testdata/rules.nft", nft.Dump())
	if changed, err := tab.write(t.Context(), s); changed || err != nil {
		t.Errorf("the same again: %v, %v", changed, err)
	}
	if _, err := tab.write(t.Context(), frontendsOn(node, services[:2], slicesOf)); err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "testdata/rules-fewer.nft", nft.Dump())
	if _, err := tab.write(t.Context(), frontendsOn(node, nil, slicesOf)); err != nil || nft.Table != nil {
		t.Errorf("without a Service: %v, %s", err, nft.Dump())
	}
}

func TestUsable(t *testing.T) {
	at := func(a string, change ...func(*discoveryv1.Endpoint)) discoveryv1.Endpoint {
		e := discoveryv1.Endpoint{Addresses: []string{a}, NodeName: new("m")}
		for _, c := range change {
			c(&e)
		}
		return e
	}
	here := func(e *discoveryv1.Endpoint) { e.NodeName = new("n") }
	notReady := func(e *discoveryv1.Endpoint) { e.Conditions.Ready, e.Conditions.Serving = new(false), new(false) }
	leaving := func(e *discoveryv1.Endpoint) {
		e.Conditions = discoveryv1.EndpointConditions{Ready: new(false), Serving: new(true), Terminating: new(true)}
	}
	zone := func(z string) func(*discoveryv1.Endpoint) {
		return func(e *discoveryv1.Endpoint) {
			e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: z}}}
		}
	}
	forNode := func(n string) func(*discoveryv1.Endpoint) {
		return func(e *discoveryv1.Endpoint) {
			e.Hints = &discoveryv1.EndpointHints{ForNodes: []discoveryv1.ForNode{{Name: n}}}
		}
	}
	tests := map[string]struct {
		endpoints    []discoveryv1.Endpoint
		inside, here string
	}{
		"ready ones":                      {[]discoveryv1.Endpoint{at("10.0.0.2"), at("10.0.0.1", here), at("10.0.0.3", notReady)}, "[10.0.0.1:80 10.0.0.2:80]", "[10.0.0.1:80]"},
		"those that leave, at a pinch":    {[]discoveryv1.Endpoint{at("10.0.0.1", here, leaving), at("10.0.0.2", leaving), at("10.0.0.3", notReady)}, "[10.0.0.1:80 10.0.0.2:80]", "[10.0.0.1:80]"},
		"a local one that leaves":         {[]discoveryv1.Endpoint{at("10.0.0.1", here, leaving), at("10.0.0.2")}, "[10.0.0.2:80]", "[10.0.0.1:80]"},
		"none":                            {[]discoveryv1.Endpoint{at("10.0.0.1", notReady)}, "[]", "[]"},
		"in two slices while it moves":    {[]discoveryv1.Endpoint{at("10.0.0.1", notReady), at("10.0.0.1")}, "[10.0.0.1:80]", "[]"},
		"of this zone":                    {[]discoveryv1.Endpoint{at("10.0.0.1", zone("z")), at("10.0.0.2", zone("y"))}, "[10.0.0.1:80]", "[]"},
		"hints for other zones only":      {[]discoveryv1.Endpoint{at("10.0.0.1", zone("x")), at("10.0.0.2", zone("y"))}, "[10.0.0.1:80 10.0.0.2:80]", "[]"},
		"one without a hint":              {[]discoveryv1.Endpoint{at("10.0.0.1", zone("z")), at("10.0.0.2")}, "[10.0.0.1:80 10.0.0.2:80]", "[]"},
		"of this node":                    {[]discoveryv1.Endpoint{at("10.0.0.1", forNode("n")), at("10.0.0.2", forNode("m"))}, "[10.0.0.1:80]", "[]"},
		"a hint of one that is not ready": {[]discoveryv1.Endpoint{at("10.0.0.1", zone("z"), notReady), at("10.0.0.2", zone("y"))}, "[10.0.0.2:80]", "[]"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			list := []*discoveryv1.EndpointSlice{
				{AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: new(""), Port: new(int32(80))}}, Endpoints: test.endpoints},
				{AddressType: discoveryv1.AddressTypeIPv6, Ports: []discoveryv1.EndpointPort{{Name: new(""), Port: new(int32(80))}}, Endpoints: []discoveryv1.Endpoint{at("fd00::1")}},
			}
			inside, local := usable(endpointsOf(list, corev1.IPv4Protocol, corev1.ServicePort{Protocol: corev1.ProtocolTCP}, "n"), "n", "z")
			if got := fmt.Sprint(inside); got != test.inside {
				t.Errorf("inside %s, want %s", got, test.inside)
			}
			if got := fmt.Sprint(local); got != test.here {
				t.Errorf("here %s, want %s", got, test.here)
			}
		})
	}
}
