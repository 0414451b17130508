// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
)

// complete fills the fields whose default depends on others or on the machine.
func (s *Config) complete(m machine, sources map[string]string) error {
	var errs []error
	if s.NodeName == "" && strings.HasPrefix(sources["node-name"], "default") {
		s.NodeName = strings.ToLower(m.hostname)
		if problems := validation.IsDNS1123Subdomain(s.NodeName); len(problems) > 0 {
			errs = append(errs, fmt.Errorf("the host name %q cannot be a node name: %s; rename the machine or set node-name",
				m.hostname, strings.Join(problems, "; ")))
		}
	}
	if !s.ClusterDNS.IsValid() && len(s.ServiceCIDR) > 0 {
		a := s.ServiceCIDR[0].Addr()
		for range 10 {
			a = a.Next()
		}
		s.ClusterDNS = a
	}
	if !s.BindAddress.IsValid() && len(s.ClusterCIDR) > 0 {
		s.BindAddress = netip.IPv4Unspecified()
		if slices.Contains(s.ClusterCIDR.families(), true) {
			s.BindAddress = netip.IPv6Unspecified() // of both families
		}
	}
	if len(s.NodeIP) > 0 {
		s.NodeIPReason = "given by " + sources["node-ip"]
	} else if strings.HasPrefix(sources["node-ip"], "default") && len(s.ClusterCIDR) > 0 && (s.FlannelIface == "" || m.find(s.FlannelIface) != nil) {
		var err error
		s.NodeIP, s.NodeIPReason, err = s.chooseNodeIPs(m, !strings.HasPrefix(sources["cluster-cidr"], "default"))
		errs = append(errs, err)
	}
	if !s.AdvertiseAddress.IsValid() {
		switch {
		case s.BindAddress.IsValid() && !s.BindAddress.IsUnspecified():
			s.AdvertiseAddress = s.BindAddress
		case len(s.NodeIP) > 0:
			s.AdvertiseAddress = s.NodeIP[0]
		}
	}
	return errors.Join(errs...)
}

// chooseNodeIPs gives an address of each family of the cluster, and says why the first was chosen. Before a node that joins knows
// them for certain, the address by which it reaches the server counts, whatever its family (see Adopt).
func (s *Config) chooseNodeIPs(m machine, certain bool) (list []netip.Addr, why string, err error) {
	wanted := s.FlannelIface
	for i, v6 := range s.ClusterCIDR.families() {
		a, reason := s.sourceToServer(m), "the address by which this machine reaches "+s.Server
		if i > 0 || !a.IsValid() || a.Is6() != v6 && certain {
			if a, reason, err = m.chooseNodeIP(v6, wanted, slices.Concat(s.ClusterCIDR, s.ServiceCIDR)...); err != nil {
				return list, why, err
			}
		}
		list = append(list, a)
		if i == 0 {
			why = reason
			// The other family's address had better be on the same interface.
			if l := m.withAddress(a); l != nil && l.address(!v6).IsValid() {
				wanted = l.name
			}
		}
	}
	return list, why, nil
}

// sourceToServer is the address of this machine that the server to join sees; invalid if there is none, or an interface was chosen.
func (s *Config) sourceToServer(m machine) netip.Addr {
	u, err := url.Parse(s.Server)
	if s.Server == "" || s.FlannelIface != "" || m.sourceTo == nil || err != nil {
		return netip.Addr{}
	}
	a, err := m.sourceTo(u.Hostname())
	if err != nil || !a.IsGlobalUnicast() || a.IsLoopback() || !m.has(a) {
		return netip.Addr{}
	}
	return a
}

// validate checks what involves several fields or the machine. Fields that could not be parsed are skipped: they have
// been reported.
func (s *Config) validate(m machine, sources map[string]string) error {
	return errors.Join(
		s.validateNetworks(sources),
		s.validateAddresses(m, sources),
		s.validatePorts(sources),
		s.validateFiles(m, sources),
		s.validateRoles(m, sources),
		s.validateSnapshots(sources),
	)
}

func (s *Config) validateRoles(m machine, sources map[string]string) error {
	var errs []error
	for _, pair := range []struct{ text, file, textOption, fileOption string }{
		{s.Token, s.TokenFile, "token", "token-file"}, {s.AgentToken, s.AgentTokenFile, "agent-token", "agent-token-file"},
	} {
		if pair.text != "" && pair.file != "" {
			errs = append(errs, fmt.Errorf("%s: the token is also given by %s; leave one out", sources[pair.fileOption], sources[pair.textOption]))
		}
	}
	switch d := s.Datastore; {
	case s.FlannelExternalIP && len(s.NodeExternalIP) == 0:
		errs = append(errs, fmt.Errorf("%s: there is no node-external-ip", sources["flannel-external-ip"]))
	case s.DisableEtcd && s.DisableControl:
		errs = append(errs, fmt.Errorf("%s: and no control plane (%s): nothing of a server is left; use kedge agent", sources["disable-etcd"], sources["disable-control-plane"]))
	case s.DisableControl && d.External():
		errs = append(errs, fmt.Errorf("%s: with an etcd of your own (%s) nothing of a server is left", sources["disable-control-plane"], sources["datastore-endpoint"]))
	case s.DisableEtcd && d.External():
		errs = append(errs, fmt.Errorf("%s: with an etcd of your own (%s) there is no member here anyway; leave it out", sources["disable-etcd"], sources["datastore-endpoint"]))
	case (d.CAFile != "" || d.CertFile != "" || d.KeyFile != "") && !d.External():
		errs = append(errs, errors.New("datastore-cafile, datastore-certfile and datastore-keyfile belong to datastore-endpoint, which is not given"))
	case (d.CertFile == "") != (d.KeyFile == ""):
		errs = append(errs, errors.New("datastore-certfile and datastore-keyfile go together: give both"))
	}
	for option, file := range map[string]string{"token-file": s.TokenFile, "agent-token-file": s.AgentTokenFile,
		"datastore-cafile": s.Datastore.CAFile, "datastore-certfile": s.Datastore.CertFile, "datastore-keyfile": s.Datastore.KeyFile} {
		_, err := os.Stat(file)
		switch {
		case file == "" || err == nil:
		case m.later != nil && s.Server == "" && strings.HasSuffix(option, "token-file") && errors.Is(err, fs.ErrNotExist):
			*m.later = append(*m.later, fmt.Errorf("%s: %s is not there yet", sources[option], file))
		default:
			errs = append(errs, fmt.Errorf("%s: %w", sources[option], err))
		}
	}
	return errors.Join(errs...)
}

// maxServiceBits is the API server's limit for the services' network (k8s.io/kubernetes/pkg/apis/networking/validation).
const maxServiceBits = 64

func (s *Config) validateNetworks(sources map[string]string) error {
	var errs []error
	pods, services := s.ClusterCIDR, s.ServiceCIDR
	for option, list := range map[string]Prefixes{"cluster-cidr": pods, "service-cidr": services} {
		if len(list) > 2 || len(list) == 2 && list[0].Addr().Is6() == list[1].Addr().Is6() {
			return fmt.Errorf("%s: %s: accepted: one network, or one IPv4 and one IPv6 network", sources[option], list)
		}
	}
	if len(pods) > 0 && len(services) > 0 && !slices.Equal(pods.families(), services.families()) {
		errs = append(errs, fmt.Errorf("%s: %s and the services' %s (%s) are of different address families; give both one network of each family, in the same order",
			sources["cluster-cidr"], pods, services, sources["service-cidr"]))
	}
	for _, p := range pods {
		if slices.ContainsFunc(services, p.Overlaps) {
			errs = append(errs, fmt.Errorf("%s: %s overlaps with the services' %s (%s)",
				sources["cluster-cidr"], p, services, sources["service-cidr"]))
		}
		errs = append(errs, s.validateNodeMask(p, sources["cluster-cidr"]))
	}
	for i, p := range services {
		switch dns := s.ClusterDNS; {
		case p.Addr().BitLen()-p.Bits() < 4:
			errs = append(errs, fmt.Errorf("%s: %s is too small for the services; it must hold at least 16 addresses", sources["service-cidr"], p))
		case p.Addr().BitLen()-p.Bits() > maxServiceBits:
			errs = append(errs, fmt.Errorf("%s: %s is too large; give a /%d or smaller", sources["service-cidr"], p, p.Addr().BitLen()-maxServiceBits))
		case i == 0 && dns.IsValid() && (!p.Contains(dns) || dns == p.Addr() || dns == p.Addr().Next()):
			errs = append(errs, fmt.Errorf("%s: %s must be an address of service-cidr %s (%s) and not its first, which the API server gets",
				sources["cluster-dns"], dns, p, sources["service-cidr"]))
		}
	}
	return errors.Join(append(errs, s.validateFloating(sources))...)
}

// validateFloating checks the addresses that no machine has for good.
func (s *Config) validateFloating(sources map[string]string) error {
	var errs []error
	free := func(option string, r AddressRange) {
		for _, p := range slices.Concat(s.ClusterCIDR, s.ServiceCIDR) {
			if p.Contains(r.First) || p.Contains(r.Last) || r.Contains(p.Addr()) {
				errs = append(errs, fmt.Errorf("%s: %s has addresses of the cluster's own network %s; give some of the network that the nodes are in", sources[option], r, p))
			}
		}
	}
	for _, r := range s.ServiceLBPool {
		free("servicelb-pool", r)
	}
	if len(s.APIVIP) > 2 || len(s.APIVIP) == 2 && s.APIVIP[0].Is6() == s.APIVIP[1].Is6() {
		errs = append(errs, fmt.Errorf("%s: %d addresses; accepted: one, or one IPv4 and one IPv6 address", sources["api-vip"], len(s.APIVIP)))
	}
	for _, a := range s.APIVIP {
		free("api-vip", AddressRange{a, a})
		for _, r := range s.ServiceLBPool {
			if r.Contains(a) {
				errs = append(errs, fmt.Errorf("%s: %s is in servicelb-pool %s (%s)", sources["api-vip"], a, r, sources["servicelb-pool"]))
			}
		}
	}
	return errors.Join(errs...)
}

// validateNodeMask applies the rule of the controller-manager's node IPAM
// (k8s.io/kubernetes/pkg/controller/nodeipam/ipam/cidrset): every node gets a network of the mask's size out of the
// pods' network, at most 2^16 of them.
func (s *Config) validateNodeMask(pods netip.Prefix, source string) error {
	mask, flag := 24, "node-cidr-mask-size-ipv4"
	if pods.Addr().Is6() {
		mask, flag = 64, "node-cidr-mask-size-ipv6"
	}
	for _, name := range []string{"node-cidr-mask-size", flag} {
		if text, ok := s.KubeControllerManagerArgs.Get(name); ok {
			if n, err := strconv.Atoi(text); err == nil {
				mask = n
			}
		}
	}
	switch bits := pods.Bits(); {
	case bits > mask:
		return fmt.Errorf("%s: %s is too small: every node needs a /%d of it (kube-controller-manager-arg node-cidr-mask-size)", source, pods, mask)
	case mask-bits > 16:
		return fmt.Errorf("%s: %s is too large for nodes with a /%d each; give a /%d or smaller", source, pods, mask, mask-16)
	}
	return nil
}

func (s *Config) validateAddresses(m machine, sources map[string]string) error {
	var errs []error
	if len(s.NodeIP) > 2 || len(s.NodeIP) == 2 && s.NodeIP[0].Is6() == s.NodeIP[1].Is6() {
		errs = append(errs, fmt.Errorf("%s: %d addresses; accepted: one, or one IPv4 and one IPv6 address", sources["node-ip"], len(s.NodeIP)))
	}
	for _, a := range s.NodeIP {
		if !m.has(a) {
			errs = append(errs, fmt.Errorf("%s: no interface of this machine has the address %s (it has %s): %w", sources["node-ip"], a, m.addressList(), ErrNoNodeAddress))
		}
	}
	// A node that joins learns the cluster's networks later (Adopt): until then the defaults say nothing.
	makes := s.Role != RoleAgent && s.Server == ""
	errs = append(errs, s.validateNetworkOf(sources, makes, "choose another network for the cluster"))
	if a := s.BindAddress; a.IsValid() && !a.IsUnspecified() && !m.has(a) {
		errs = append(errs, fmt.Errorf("%s: no interface of this machine has the address %s (it has %s): %w", sources["bind-address"], a, m.addressList(), ErrNoNodeAddress))
	}
	return errors.Join(errs...)
}

// validateNetworkOf checks the addresses of the node against the networks of the cluster: all of them if they are final, otherwise
// those that were given.
func (s *Config) validateNetworkOf(sources map[string]string, final bool, remedy string) error {
	counts := func(name string, p Prefixes) bool {
		_, given := s.Given[name]
		return len(p) > 0 && (final || given)
	}
	check := func(option string, a netip.Addr, first bool) error {
		if p := s.ClusterCIDR; first && counts("cluster-cidr", p) && a.Is6() != p.Is6() {
			return fmt.Errorf("%s: %s is not of the first address family of cluster-cidr %s (%s)", sources[option], a, p, sources["cluster-cidr"])
		}
		for name, p := range map[string]Prefixes{"cluster-cidr": s.ClusterCIDR, "service-cidr": s.ServiceCIDR} {
			if counts(name, p) && p.Contains(a) {
				return fmt.Errorf("%s: %s lies inside of %s %s (%s); %s", sources[option], a, name, p, sources[name], remedy)
			}
		}
		return nil
	}
	var errs []error
	for i, a := range s.NodeIP {
		errs = append(errs, check("node-ip", a, i == 0))
	}
	if p := s.ClusterCIDR; len(s.NodeIP) == 1 && len(p.families()) == 2 && counts("cluster-cidr", p) {
		errs = append(errs, fmt.Errorf("%s: a node of a cluster with two address families (cluster-cidr %s) needs an address of each; give one IPv4 and one IPv6 address",
			sources["node-ip"], p))
	}
	if a := s.AdvertiseAddress; a.IsValid() && !slices.Contains(s.NodeIP, a) {
		errs = append(errs, check("advertise-address", a, true))
	}
	return errors.Join(errs...)
}

func (s *Config) validatePorts(sources map[string]string) error {
	// k8s.io/kubernetes/pkg/cluster/ports and etcd's ports.
	taken := map[int]string{
		2379: "etcd", 2380: "etcd", 10248: "the kubelet", 10249: "kube-proxy", 10250: "the kubelet", 10256: "kube-proxy",
		10257: "the controller-manager", 10259: "the scheduler",
	}
	var errs []error
	for option, p := range map[string]int{"https-listen-port": s.HTTPSListenPort, "lb-server-port": s.LBServerPort} {
		if owner := taken[p]; owner != "" {
			errs = append(errs, fmt.Errorf("%s: port %d is used by %s", sources[option], p, owner))
		}
	}
	if s.Role != RoleAgent && s.LBServerPort == s.HTTPSListenPort {
		errs = append(errs, fmt.Errorf("%s: port %d is that of the API server (%s); choose another one for the load balancer",
			sources["lb-server-port"], s.LBServerPort, sources["https-listen-port"]))
	}
	return errors.Join(errs...)
}

func (s *Config) validateFiles(m machine, sources map[string]string) error {
	var errs []error
	if s.ResolvConf != "" {
		if _, err := os.ReadFile(s.ResolvConf); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", sources["resolv-conf"], err))
		}
	}
	if s.FlannelIface != "" {
		if s.FlannelBackend == FlannelNone {
			errs = append(errs, fmt.Errorf("%s: there is no flannel with flannel-backend none (%s)", sources["flannel-iface"], sources["flannel-backend"]))
		} else if m.find(s.FlannelIface) == nil {
			errs = append(errs, fmt.Errorf("%s: this machine has no network interface %q; it has %s", sources["flannel-iface"], s.FlannelIface, m.linkList()))
		}
	}
	for _, dir := range []struct{ name, path string }{
		{"data-dir", s.DataDir}, {"run-dir", s.RunDir}, {"kubelet-root-dir", s.KubeletRootDir},
	} {
		if info, err := os.Stat(dir.path); dir.path != "" && err == nil && !info.IsDir() {
			errs = append(errs, fmt.Errorf("%s: %s is not a directory", sources[dir.name], dir.path))
		}
	}
	if info, err := os.Stat(s.WriteKubeconfig); s.WriteKubeconfig != "" && err == nil && info.IsDir() {
		errs = append(errs, fmt.Errorf("%s: %s is a directory; give the name of a file", sources["write-kubeconfig"], s.WriteKubeconfig))
	}
	return errors.Join(errs...)
}
