// SPDX-License-Identifier: Apache-2.0

// Package config holds the typed configuration of `kedge server` and `kedge agent`: what every option is called, where its value may
// come from (file < environment < flag) and what is accepted. Everything that can be refused is refused here, before
// anything is written to the machine.
package config

import (
	"cmp"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Config is the complete, validated configuration of a server or an agent. Load fills every field, defaults included, so that
// nobody else has to know a default. It survives a round trip through JSON.
type Config struct {
	Role    Role   `json:"role"`     // what was started: kedge server or kedge agent
	Config  string `json:"config"`   // the configuration file that was looked for, default /etc/kedge/config.yaml
	DataDir string `json:"data-dir"` // absolute; default /var/lib/kedge
	// EtcdDataDir has the directory of the datastore in it; absolute; default DataDir.
	EtcdDataDir string `json:"etcd-data-dir,omitempty"`
	RunDir      string `json:"run-dir"` // absolute; sockets and generated files, default /run/kedge

	// Server is the URL of a server of the cluster to join, https://HOST:PORT; empty: this server makes a cluster.
	Server         string        `json:"server,omitempty"`
	Token          string        `json:"token,omitempty"`            // join token, or an operator's own for the whole cluster; secret
	TokenFile      string        `json:"token-file,omitempty"`       // absolute; holds the token, read when it is needed
	AgentToken     string        `json:"agent-token,omitempty"`      // an operator's own token that lets in agents only; secret
	AgentTokenFile string        `json:"agent-token-file,omitempty"` // absolute
	JoinTimeout    time.Duration `json:"join-timeout"`               // how long to try to join; 0: for ever
	LBServerPort   int           `json:"lb-server-port"`             // of the API load balancer on loopback, default 6444
	ClusterReset   bool          `json:"cluster-reset"`              // make this server the only member of the datastore and end
	DisableAgent   bool          `json:"disable-agent"`              // no kubelet: this server is no node
	DisableEtcd    bool          `json:"disable-etcd"`               // no datastore member here: use the other servers'
	DisableControl bool          `json:"disable-control-plane"`      // no API server here: a datastore member only
	EgressMode     EgressMode    `json:"egress-selector-mode"`       // default auto
	Datastore      Datastore     `json:"datastore"`                  // an etcd that is not Kedge's

	NodeName string `json:"node-name"` // lower-case RFC 1123 subdomain; default: the host name, lower-cased
	// NodeIP holds an address of each family of the cluster, in its order. Never empty.
	NodeIP []netip.Addr `json:"node-ip"`
	// NodeIPReason says in words why NodeIP was chosen. For the log.
	NodeIPReason string `json:"node-ip-reason"`
	// NodeExternalIP is where machines outside of the node's network reach it; default: none.
	NodeExternalIP []netip.Addr `json:"node-external-ip,omitempty"`
	NodeLabels     []string     `json:"node-label"` // key=value
	NodeTaints     []string     `json:"node-taint"` // key[=value]:effect

	TLSSANs         []string   `json:"tls-san"`           // further host names and addresses in the API server's certificate
	BindAddress     netip.Addr `json:"bind-address"`      // default 0.0.0.0, or :: in a cluster with IPv6
	HTTPSListenPort int        `json:"https-listen-port"` // 1-65535, default 6443
	// AdvertiseAddress is where pods and other nodes reach this API server; default: the first of NodeIP.
	AdvertiseAddress netip.Addr `json:"advertise-address"`

	Cluster // what all nodes of the cluster agree on

	WriteKubeconfig     string      `json:"write-kubeconfig"`      // absolute; default /etc/kedge/kubeconfig.yaml
	WriteKubeconfigMode fs.FileMode `json:"write-kubeconfig-mode"` // permission bits, default 0600

	AuditLog    string `json:"audit-log,omitempty"` // absolute; empty: none is written
	AuditPolicy string `json:"audit-policy-file"`   // absolute; a file that need not exist, default /etc/kedge/audit-policy.yaml
	// PodSecurity holds in namespaces without a label of their own, but for PodSecurityExempt; default privileged, and kube-system.
	PodSecurity       PodSecurity `json:"pod-security"`
	PodSecurityExempt []string    `json:"pod-security-exempt"`
	// ProtectKernelDefaults makes the kubelet refuse kernel settings that it would change; default false.
	ProtectKernelDefaults bool `json:"protect-kernel-defaults"`

	DisableKubeProxy  bool        `json:"disable-kube-proxy"`  // nothing serves the service addresses on this node
	FlannelIface      string      `json:"flannel-iface"`       // interface name; default empty: the one that has NodeIP
	FlannelTxOffload  bool        `json:"flannel-tx-offload"`  // checksums of VXLAN's packets are the network card's business
	FlannelExternalIP bool        `json:"flannel-external-ip"` // other nodes reach the pods here by NodeExternalIP
	ResolvConf        string      `json:"resolv-conf"`         // absolute; default empty: chosen by the node
	PrivateRegistry   string      `json:"private-registry"`    // absolute; default /etc/kedge/registries.yaml
	PauseImage        string      `json:"pause-image"`         // default empty: the built-in one
	Snapshotter       Snapshotter `json:"snapshotter"`         // default overlayfs
	KubeletRootDir    string      `json:"kubelet-root-dir"`    // absolute; default /var/lib/kubelet
	// ShutdownGracePeriod is what pods get at the most to end before the machine goes down, ShutdownGraceCritical what those get after them that
	// the cluster itself needs; defaults 30 s and 10 s.
	ShutdownGracePeriod   time.Duration `json:"shutdown-grace-period"`
	ShutdownGraceCritical time.Duration `json:"shutdown-grace-period-critical"`

	Debug     bool      `json:"debug"`
	LogFormat LogFormat `json:"log-format"` // default text

	Snapshot Snapshot `json:"snapshot"` // see Snapshots

	KubeAPIServerArgs         Args `json:"kube-apiserver-arg"`
	KubeControllerManagerArgs Args `json:"kube-controller-manager-arg"`
	KubeSchedulerArgs         Args `json:"kube-scheduler-arg"`
	KubeletArgs               Args `json:"kubelet-arg"`
	KubeProxyArgs             Args `json:"kube-proxy-arg"`
	EtcdArgs                  Args `json:"etcd-arg"`

	// Given says where the values of those options come from that are not defaults, by the option's name.
	Given map[string]string `json:"given"`
}

// Role of a machine in the cluster.
type Role string

// The roles.
const (
	RoleServer Role = "server"
	RoleAgent  Role = "agent"
)

// Datastore is an etcd that the operator runs. The zero value stands for Kedge's own.
type Datastore struct {
	Endpoints []string `json:"endpoints,omitempty"` // https://HOST:PORT
	CAFile    string   `json:"cafile,omitempty"`    // absolute
	CertFile  string   `json:"certfile,omitempty"`  // absolute; client certificate
	KeyFile   string   `json:"keyfile,omitempty"`   // absolute
}

// External says that the datastore is not Kedge's own.
func (d Datastore) External() bool { return len(d.Endpoints) > 0 }

// HasEtcd says whether a member of Kedge's datastore runs here.
func (s *Config) HasEtcd() bool {
	return s.Role == RoleServer && !s.DisableEtcd && !s.Datastore.External()
}

// HasControlPlane says whether an API server runs here.
func (s *Config) HasControlPlane() bool { return s.Role == RoleServer && !s.DisableControl }

// HasNode says whether pods can run here.
func (s *Config) HasNode() bool { return !s.DisableAgent }

// TokenText gives the token, from the file if it was given as one.
func (s *Config) TokenText() (string, error) { return tokenText("token-file", s.Token, s.TokenFile) }

// AgentTokenText gives the operator's token for agents.
func (s *Config) AgentTokenText() (string, error) {
	return tokenText("agent-token-file", s.AgentToken, s.AgentTokenFile)
}

func tokenText(option, text, file string) (string, error) {
	if file == "" {
		return text, nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("%s: %w", option, err)
	}
	if text = strings.TrimSpace(string(b)); text == "" {
		return "", fmt.Errorf("%s: %s is empty", option, file)
	}
	return text, nil
}

// Disabled says whether a packaged component was left out with --disable.
func (s *Config) Disabled(component string) bool { return slices.Contains(s.Disable, component) }

// EtcdDir is the datastore's directory.
func (s *Config) EtcdDir() string { return filepath.Join(cmp.Or(s.EtcdDataDir, s.DataDir), "etcd") }

// PKIDir is where keys and certificates are kept.
func (s *Config) PKIDir() string { return filepath.Join(s.DataDir, "pki") }

// The packaged components that --disable leaves out.
const (
	ComponentCoreDNS       = "coredns"        // the cluster DNS
	ComponentNetworkPolicy = "network-policy" // the controller of NetworkPolicies
	ComponentServiceLB     = "servicelb"      // addresses for services of type LoadBalancer
	ComponentHelm          = "helm"           // HelmChart objects
)

func packaged() []string {
	return []string{ComponentCoreDNS, ComponentHelm, ComponentNetworkPolicy, ComponentServiceLB}
}

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
	FlannelVXLAN     FlannelMode = "vxlan"
	FlannelHostGW    FlannelMode = "host-gw"
	FlannelWireGuard FlannelMode = "wireguard-native"
	FlannelNone      FlannelMode = "none"
)

// PodSecurity is a Pod Security Standard.
type PodSecurity string

// The values of --pod-security.
const (
	PodSecurityPrivileged PodSecurity = "privileged"
	PodSecurityBaseline   PodSecurity = "baseline"
	PodSecurityRestricted PodSecurity = "restricted"
)

// EgressMode is how API servers reach kubelets and pods.
type EgressMode string

// The values of --egress-selector-mode. EgressAuto connects directly and, where that fails, through the tunnel that the node
// has opened.
const (
	EgressAuto   EgressMode = "auto"
	EgressDirect EgressMode = "direct"
	EgressTunnel EgressMode = "tunnel"
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
