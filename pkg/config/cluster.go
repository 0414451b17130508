// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
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
	ClusterCIDR          Prefixes       `json:"cluster-cidr"`            // pods; masked; default 10.42.0.0/16
	ServiceCIDR          Prefixes       `json:"service-cidr"`            // services; masked; of the same families as ClusterCIDR; default 10.43.0.0/16
	ClusterDNS           netip.Addr     `json:"cluster-dns"`             // default: the tenth address of the first ServiceCIDR
	ClusterDomain        string         `json:"cluster-domain"`          // no trailing dot; default cluster.local
	ServiceNodePortRange PortRange      `json:"service-node-port-range"` // default 30000-32767
	FlannelBackend       FlannelMode    `json:"flannel-backend"`         // default vxlan
	ProxyMode            ProxyMode      `json:"proxy-mode"`              // default auto; a node may choose another
	ServiceLBPool        []AddressRange `json:"servicelb-pool"`          // addresses for LoadBalancer services; default: those of the nodes
	APIVIP               []netip.Addr   `json:"api-vip"`                 // floating addresses of the API; default: none
	Disable              []string       `json:"disable"`                 // packaged components that are left out: see Component…
}

// ErrIncomplete says that what was given as a cluster's settings lacks some.
var ErrIncomplete = errors.New("the cluster's settings are incomplete")

// Adopt takes over what the cluster agreed on. An option that was given for this node and says something else is an error that
// names both values; only the proxy mode may differ from node to node. What was chosen by the address families of the cluster is
// chosen anew if they are others than it seemed.
func (s *Config) Adopt(c Cluster) error { return s.adopt(c, nil, thisMachine) }

// changeable are the settings that a cluster can change after its first start: a server that is started with another value than at its
// last start changes them for all. What a server's options have said all along does not: others may have changed it since.
func changeable() []string { return []string{"servicelb-pool", "api-vip"} }

// Asks are those settings of the cluster that can be changed, by the names of their options, which this node's own options give, as text.
func (s *Config) Asks() map[string]string {
	asks := map[string]string{}
	for _, name := range changeable() {
		if _, given := s.Given[name]; given {
			asks[name] = text(s.setting(name).Interface())
		}
	}
	return asks
}

// AdoptAgain is Adopt for a node that was part of the cluster before, whose options asked for something then, see [Config.Asks]. It
// returns the names of the settings that they ask to change, which the node goes by already, and of those in which the cluster is
// another than they say, because it was changed elsewhere: that is no error.
func (s *Config) AdoptAgain(c Cluster, asked map[string]string) (changes, others []string, err error) {
	asks := s.Asks()
	for _, name := range changeable() {
		now, given := asks[name]
		before, had := asked[name]
		cluster := c.setting(name)
		switch {
		case given && (!had || now != before), !given && had:
			cluster.Set(s.setting(name)) // the zero value, if it is not given any more
			changes = append(changes, name)
		case given && now != text(cluster.Interface()):
			others = append(others, name)
		}
	}
	if err := s.adopt(c, others, thisMachine); err != nil || len(changes) == 0 {
		return changes, others, err
	}
	sources := map[string]string{}
	for _, name := range changeable() {
		sources[name] = "the cluster's " + name
		if source, given := s.Given[name]; given && slices.Contains(changes, name) {
			sources[name] = source
		}
	}
	return changes, others, s.validateFloating(sources)
}

// Change gives c those settings of from that have these names.
func (c *Cluster) Change(from Cluster, names []string) {
	for _, name := range names {
		c.setting(name).Set(from.setting(name))
	}
}

// Changed names the settings that can be changed in which two clusters differ.
func (c *Cluster) Changed(other Cluster) []string {
	return slices.DeleteFunc(changeable(), func(name string) bool {
		return text(c.setting(name).Interface()) == text(other.setting(name).Interface())
	})
}

// Setting is the text of a setting, by the name of its option.
func (c *Cluster) Setting(name string) string { return text(c.setting(name).Interface()) }

// setting is a field, by the name of its option.
func (c *Cluster) setting(name string) reflect.Value {
	v := reflect.ValueOf(c).Elem()
	for i := range v.NumField() {
		if v.Type().Field(i).Tag.Get("json") == name {
			return v.Field(i)
		}
	}
	return reflect.Value{}
}

func (s *Config) adopt(c Cluster, others []string, look func() (machine, error)) error {
	if err := errors.Join(c.complete(), s.contradictions(c, others)); err != nil {
		return err
	}
	mode := s.ProxyMode
	s.Cluster = c
	if _, given := s.Given["proxy-mode"]; given {
		s.ProxyMode = mode
	}
	sources := map[string]string{}
	for _, o := range options() {
		sources[o.name] = cmp.Or(s.Given[o.name], "default of "+o.name)
	}
	fields := reflect.TypeFor[Cluster]()
	for i := range fields.NumField() {
		name := fields.Field(i).Tag.Get("json")
		sources[name] = "the cluster's " + name
	}
	if !slices.Equal(families(s.NodeIP), c.ClusterCIDR.families()) {
		if err := s.chooseAgain(look, sources); err != nil {
			return err
		}
	}
	return s.validateNetworkOf(sources, true, "give this node another address with node-ip")
}

// chooseAgain repeats those choices of complete that go by the cluster's address families.
func (s *Config) chooseAgain(look func() (machine, error), sources map[string]string) error {
	for name, field := range map[string]*netip.Addr{"bind-address": &s.BindAddress, "advertise-address": &s.AdvertiseAddress} {
		if _, given := s.Given[name]; !given {
			*field = netip.Addr{}
		}
	}
	if _, given := s.Given["node-ip"]; !given {
		s.NodeIP = nil
	}
	m, err := look()
	if err != nil {
		return err
	}
	return s.complete(m, sources)
}

// complete refuses settings that were cut off or never were any.
func (c Cluster) complete() error {
	for name, there := range map[string]bool{
		"cluster-cidr": len(c.ClusterCIDR) > 0, "service-cidr": len(c.ServiceCIDR) > 0, "cluster-dns": c.ClusterDNS.IsValid(),
		"cluster-domain": c.ClusterDomain != "",
	} {
		if !there {
			return fmt.Errorf("%w: there is no %s", ErrIncomplete, name)
		}
	}
	return nil
}

// contradictions are the options of this node that say something else than the cluster, but for those that may.
func (s *Config) contradictions(c Cluster, may []string) error {
	var errs []error
	own, cluster := reflect.ValueOf(s.Cluster), reflect.ValueOf(c)
	for i := range own.NumField() {
		name := own.Type().Field(i).Tag.Get("json")
		source, given := s.Given[name]
		if mine, theirs := text(own.Field(i).Interface()), text(cluster.Field(i).Interface()); given && mine != theirs && name != "proxy-mode" && !slices.Contains(may, name) {
			errs = append(errs, fmt.Errorf("%s: %s contradicts the cluster, which was made with %s; leave it out, every node takes it from the cluster",
				source, mine, theirs))
		}
	}
	return errors.Join(errs...)
}

func text(v any) string {
	list := reflect.ValueOf(v)
	if list.Kind() != reflect.Slice {
		return fmt.Sprint(v)
	}
	var texts []string
	for i := range list.Len() {
		texts = append(texts, fmt.Sprint(list.Index(i).Interface()))
	}
	if len(texts) == 0 {
		return "nothing"
	}
	if _, ordered := v.(Prefixes); !ordered {
		slices.Sort(texts)
	}
	return strings.Join(texts, ",")
}
