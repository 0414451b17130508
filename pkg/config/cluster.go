// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
)

// Cluster is what all nodes of a cluster have to agree on. The first server decides; it is kept in the cluster, joining nodes take
// it from there, and each node keeps a copy.
type Cluster struct {
	ClusterCIDR          netip.Prefix `json:"cluster-cidr"`            // pods; masked; default 10.42.0.0/16
	ServiceCIDR          netip.Prefix `json:"service-cidr"`            // services; masked; default 10.43.0.0/16
	ClusterDNS           netip.Addr   `json:"cluster-dns"`             // default: the tenth address of ServiceCIDR
	ClusterDomain        string       `json:"cluster-domain"`          // no trailing dot; default cluster.local
	ServiceNodePortRange PortRange    `json:"service-node-port-range"` // default 30000-32767
	FlannelBackend       FlannelMode  `json:"flannel-backend"`         // default vxlan
	ProxyMode            ProxyMode    `json:"proxy-mode"`              // default auto; a node may choose another
	Disable              []string     `json:"disable"`                 // packaged components that are left out: see Component…
}

// Adopt takes over what the cluster agreed on. An option that was given for this node and says something else is an error that
// names both values; only the proxy mode may differ from node to node.
func (s *Config) Adopt(c Cluster) error {
	var errs []error
	own, cluster := reflect.ValueOf(s.Cluster), reflect.ValueOf(c)
	for i := range own.NumField() {
		name := own.Type().Field(i).Tag.Get("json")
		source, given := s.Given[name]
		if mine, theirs := text(own.Field(i).Interface()), text(cluster.Field(i).Interface()); given && mine != theirs && name != "proxy-mode" {
			errs = append(errs, fmt.Errorf("%s: %s contradicts the cluster, which was made with %s; leave it out, every node takes it from the cluster",
				source, mine, theirs))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	mode := s.ProxyMode
	s.Cluster = c
	if _, given := s.Given["proxy-mode"]; given {
		s.ProxyMode = mode
	}
	sources := map[string]string{}
	for i := range own.NumField() {
		name := own.Type().Field(i).Tag.Get("json")
		sources[name] = "the cluster's " + name
	}
	for _, a := range s.NodeIP {
		errs = append(errs, s.outsideCluster("node-ip "+a.String(), a, sources))
	}
	return errors.Join(errs...)
}

func text(v any) string {
	if list, ok := v.([]string); ok {
		list = slices.Sorted(slices.Values(list))
		if len(list) == 0 {
			return "nothing"
		}
		return strings.Join(list, ",")
	}
	return fmt.Sprint(v)
}
