// SPDX-License-Identifier: Apache-2.0

// Package config holds the typed configuration of `kedge server`: what every option is called, where its value may
// come from (file < environment < flag) and what is accepted. Everything that can be refused is refused here, before
// anything is written to the machine.
package config

import (
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Server is the complete, validated configuration of a server. Load fills every field, defaults included, so that
// nobody else has to know a default. It survives a round trip through JSON, which is how the supervisor hands it to
// its child processes.
type Server struct {
	Config  string `json:"config"`   // the configuration file that was looked for, default /etc/kedge/config.yaml
	DataDir string `json:"data-dir"` // absolute; default /var/lib/kedge
	RunDir  string `json:"run-dir"`  // absolute; sockets and generated files, default /run/kedge

	NodeName string `json:"node-name"` // lower-case RFC 1123 subdomain; default: the host name, lower-cased
	// NodeIP holds one address, or one of each family; the first is of the cluster's family. Never empty.
	NodeIP []netip.Addr `json:"node-ip"`
	// NodeIPReason says in words why NodeIP was chosen. For the log.
	NodeIPReason string   `json:"node-ip-reason"`
	NodeLabels   []string `json:"node-label"` // key=value
	NodeTaints   []string `json:"node-taint"` // key[=value]:effect

	TLSSANs         []string   `json:"tls-san"`           // further host names and addresses in the API server's certificate
	BindAddress     netip.Addr `json:"bind-address"`      // default 0.0.0.0, or :: in an IPv6 cluster
	HTTPSListenPort int        `json:"https-listen-port"` // 1-65535, default 6443
	// AdvertiseAddress is where pods and other nodes reach this API server; default: the first of NodeIP.
	AdvertiseAddress netip.Addr `json:"advertise-address"`

	ClusterCIDR          netip.Prefix `json:"cluster-cidr"`            // pods; masked; default 10.42.0.0/16
	ServiceCIDR          netip.Prefix `json:"service-cidr"`            // services; masked; default 10.43.0.0/16
	ClusterDNS           netip.Addr   `json:"cluster-dns"`             // default: the tenth address of ServiceCIDR
	ClusterDomain        string       `json:"cluster-domain"`          // no trailing dot; default cluster.local
	ServiceNodePortRange PortRange    `json:"service-node-port-range"` // default 30000-32767

	WriteKubeconfig     string      `json:"write-kubeconfig"`      // absolute; default /etc/kedge/kubeconfig.yaml
	WriteKubeconfigMode fs.FileMode `json:"write-kubeconfig-mode"` // permission bits, default 0600

	Disable          []string    `json:"disable"`            // packaged components that are left out: see Component…
	DisableKubeProxy bool        `json:"disable-kube-proxy"` // nothing serves the service addresses on this node
	ProxyMode        ProxyMode   `json:"proxy-mode"`         // default auto
	FlannelBackend   FlannelMode `json:"flannel-backend"`    // default vxlan
	FlannelIface     string      `json:"flannel-iface"`      // interface name; default empty: the one that has NodeIP
	ResolvConf       string      `json:"resolv-conf"`        // absolute; default empty: chosen by the node
	PrivateRegistry  string      `json:"private-registry"`   // absolute; default /etc/kedge/registries.yaml
	PauseImage       string      `json:"pause-image"`        // default empty: the built-in one
	Snapshotter      Snapshotter `json:"snapshotter"`        // default overlayfs
	KubeletRootDir   string      `json:"kubelet-root-dir"`   // absolute; default /var/lib/kubelet
	Debug            bool        `json:"debug"`
	LogFormat        LogFormat   `json:"log-format"` // default text

	KubeAPIServerArgs         Args `json:"kube-apiserver-arg"`
	KubeControllerManagerArgs Args `json:"kube-controller-manager-arg"`
	KubeSchedulerArgs         Args `json:"kube-scheduler-arg"`
	KubeletArgs               Args `json:"kubelet-arg"`
	KubeProxyArgs             Args `json:"kube-proxy-arg"`
	EtcdArgs                  Args `json:"etcd-arg"`
}

// Disabled says whether a packaged component was left out with --disable.
func (s *Server) Disabled(component string) bool { return slices.Contains(s.Disable, component) }

// PKIDir is where keys and certificates are kept.
func (s *Server) PKIDir() string { return filepath.Join(s.DataDir, "pki") }

// ComponentCoreDNS is the cluster DNS, as --disable calls it.
const ComponentCoreDNS = "coredns"

// ProxyMode is how service addresses are programmed into the kernel.
type ProxyMode string

// The values of --proxy-mode. ProxyAuto is ipvs where the kernel has it, else nftables.
const (
	ProxyAuto     ProxyMode = "auto"
	ProxyIPVS     ProxyMode = "ipvs"
	ProxyNFTables ProxyMode = "nftables"
	ProxyIPTables ProxyMode = "iptables"
)

// FlannelMode is how pods of different nodes reach each other.
type FlannelMode string

// The values of --flannel-backend. With FlannelNone the operator brings a CNI plugin of their own.
const (
	FlannelVXLAN  FlannelMode = "vxlan"
	FlannelHostGW FlannelMode = "host-gw"
	FlannelNone   FlannelMode = "none"
)

// Snapshotter is how containerd puts image layers together.
type Snapshotter string

// The values of --snapshotter. SnapshotterNative copies every layer: slow and large, but works on any file system.
const (
	SnapshotterOverlayFS Snapshotter = "overlayfs"
	SnapshotterNative    Snapshotter = "native"
)

// LogFormat is the form of the log on standard error.
type LogFormat string

// The values of --log-format.
const (
	LogText LogFormat = "text"
	LogJSON LogFormat = "json"
)

// PortRange is a range of ports, both ends included.
type PortRange struct {
	First int `json:"first"`
	Last  int `json:"last"`
}

// String gives the form that the API server's flag takes: first-last.
func (r PortRange) String() string { return strconv.Itoa(r.First) + "-" + strconv.Itoa(r.Last) }

// Args are further arguments for an upstream component, each as key=value, without leading dashes and in the order
// given. A key may occur more than once. Whether the component knows a key is checked by the component's flag set.
type Args []string

// Flags gives the arguments as a flag set parses them: --key=value.
func (a Args) Flags() []string {
	flags := make([]string, len(a))
	for i, arg := range a {
		flags[i] = "--" + arg
	}
	return flags
}

// Get gives the value of the last argument with that key.
func (a Args) Get(key string) (string, bool) {
	for _, arg := range slices.Backward(a) {
		if k, v, _ := strings.Cut(arg, "="); k == key {
			return v, true
		}
	}
	return "", false
}
