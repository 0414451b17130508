// SPDX-License-Identifier: Apache-2.0

// Package dns is the cluster's DNS: CoreDNS linked into the node process of every machine, listening on the cluster DNS address
// itself, which it puts on the loopback device. A lookup never leaves the node, is not translated and has no conntrack entry.
//
// What differs from a CoreDNS in a pod, and why:
//
//   - Names of the cluster come from one long-lived instance of CoreDNS's kubernetes plugin, which every Corefile refers to with the
//     directive "cluster". The plugin's own directive is not used: its setup replaces the logger of klog, which kubelet and kube-proxy
//     share, holds up the start for up to 5 s, and fetches everything again on each reload. Its informers are namespaces, services and
//     endpointslices (trimmed to what DNS needs, in protobuf); "pods insecure" needs no pods.
//   - The server answers from its first moment: outside names before the API is there, cluster names with SERVFAIL until they are known.
//   - Only directives in [directives] exist. Those that open ports, end the process (loop), switch off panic recovery (debug) or need cloud
//     SDKs do not.
package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/plugin/kubernetes"
	miekg "github.com/miekg/dns"
)

const (
	// DefaultPort is the port of the cluster DNS, UDP and TCP.
	DefaultPort = 53
	// DefaultMetricsPort is where CoreDNS's metrics are served, on the cluster DNS address.
	DefaultMetricsPort = 9153
	// MetricsOff as Config.MetricsAddr switches metrics off.
	MetricsOff = "off"

	// CustomNamespace and CustomName are the ConfigMap with which users extend the Corefile.
	CustomNamespace = "kube-system"
	CustomName      = "coredns-custom"
)

// Config is the typed configuration of a [Server].
type Config struct {
	// NodeName is this node's name; events about refused configuration carry it.
	NodeName string `json:"nodeName"`
	// ClusterDomain is the cluster's domain without a trailing dot, as in "cluster.local".
	ClusterDomain string `json:"clusterDomain"`
	// Addr is the cluster DNS address. Unless it is a loopback address (tests) it is put on the loopback device.
	Addr netip.Addr `json:"addr"`
	// Port is the port for UDP and TCP. Default 53.
	Port uint16 `json:"port,omitempty"`
	// ClusterCIDRs are the pods' networks. Queries from elsewhere are refused, except the node's own.
	ClusterCIDRs []netip.Prefix `json:"clusterCIDRs"`
	// Kubeconfig is the path of the kubeconfig with the node's identity. It may appear later.
	Kubeconfig string `json:"kubeconfig"`
	// ResolvConf is the host's resolv.conf with the resolvers for outside names. Empty: see [HostResolvConf].
	ResolvConf string `json:"resolvConf,omitempty"`
	// KubeletResolvConf is where a resolv.conf for the kubelet is kept up to date, see [HostResolv.WriteKubelet]. Empty: none.
	KubeletResolvConf string `json:"kubeletResolvConf,omitempty"`
	// HostSearch passes the host's search domains on to pods through KubeletResolvConf.
	HostSearch bool `json:"hostSearch,omitempty"`
	// Dir takes generated files: the Corefile in use and the last good custom configuration. It is made if it is missing.
	Dir string `json:"dir"`
	// MetricsAddr is the host:port of /metrics. Default: Addr, port 9153. "off": none.
	MetricsAddr string `json:"metricsAddr,omitempty"`
}

func (c Config) withDefaults() (Config, error) {
	if !c.Addr.IsValid() {
		return c, errors.New("dns: no cluster DNS address given")
	}
	if c.Dir == "" {
		return c, errors.New("dns: no directory for generated files given")
	}
	if _, ok := miekg.IsDomainName(c.ClusterDomain); !ok || c.ClusterDomain == "" {
		return c, fmt.Errorf("dns: cluster domain %q is no domain name", c.ClusterDomain)
	}
	if c.Port == 0 {
		c.Port = DefaultPort
	}
	switch c.MetricsAddr {
	case "":
		c.MetricsAddr = netip.AddrPortFrom(c.Addr, DefaultMetricsPort).String()
	case MetricsOff:
		c.MetricsAddr = ""
	default:
		if _, err := netip.ParseAddrPort(c.MetricsAddr); err != nil {
			return c, fmt.Errorf("dns: metrics address: %w (give ADDRESS:PORT or %q)", err, MetricsOff)
		}
	}
	return c, nil
}

// listen is the address of the main server block, and the Server's name among the process's Corefiles.
func (c Config) listen() string {
	return net.JoinHostPort(c.Addr.String(), strconv.Itoa(int(c.Port)))
}

// Status is what `kedge status` shows.
type Status struct {
	// Listen is the address in use, empty while the server does not listen.
	Listen string `json:"listen,omitempty"`
	// Synced says that the cluster's names are known.
	Synced bool `json:"synced"`
	// ResolvConf is the file that Upstreams come from.
	ResolvConf string `json:"resolvConf,omitempty"`
	// Upstreams resolve names outside of the cluster. None: such names get SERVFAIL.
	Upstreams []string `json:"upstreams"`
	// Custom tells about the ConfigMap coredns-custom: "none", "in use" or "refused".
	Custom string `json:"custom"`
	// Problems are what does not work, in words.
	Problems []string `json:"problems,omitempty"`
}

// The kinds of problems, in the order of Status.Problems.
const (
	problemListen = iota
	problemAddress
	problemNotrack
	problemResolvConf
	problemCluster
	problemCustom
	problemFiles
	problemCount
)

// Server is the cluster DNS of one node.
type Server struct {
	cfg    Config
	log    *slog.Logger
	engine engine
	custom customStore
	local  localAddrs
	// upstreamAt says where a nameserver listens: port 53, in tests elsewhere.
	upstreamAt func(netip.Addr) netip.AddrPort
	// poll is how often resolv.conf is read.
	poll time.Duration

	cluster  atomic.Pointer[kubernetes.Kubernetes] // nil until the API has been reached
	fromAPI  chan customConfig                     // the latest coredns-custom, one slot
	refusals chan refusal                          // for Events; one slot
	mu       sync.Mutex
	status   Status
	problems [problemCount]string
}

// New checks cfg. Nothing is started and no file is written.
func New(cfg Config, logger *slog.Logger) (*Server, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Server{
		cfg:        cfg,
		log:        logger.With("component", "dns"),
		custom:     customStore{dir: cfg.Dir},
		upstreamAt: dnsPort,
		fromAPI:    make(chan customConfig, 1),
		refusals:   make(chan refusal, 1),
		poll:       pollInterval,
	}
	s.local.own = append(s.local.own, cfg.Addr)
	s.local.prefixes = cfg.ClusterCIDRs
	s.engine = engine{server: s}
	s.problems[problemListen] = "not started"
	s.problems[problemCluster] = "not connected to the Kubernetes API yet"
	s.status.Custom = "none"
	return s, nil
}

// Run serves until ctx ends and returns nil then. Whatever can go away by itself (an address in use, no API, no upstream, a broken
// custom configuration) is no error: it is retried and told by [Server.Ready] and [Server.Status]. One Run for a Server.
//
// The address on the loopback device and the rules are left when Run ends, so that lookups fail at once rather than leave the node
// while the process restarts; see [Cleanup].
func (s *Server) Run(ctx context.Context) error {
	if err := registerDirectives(); err != nil {
		return fmt.Errorf("dns: %w", err)
	}
	defer captureStdLog(s.log)()

	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	s.ensureAddress()
	wg.Go(func() { s.keepNetwork(ctx) })
	wg.Go(func() { s.runCluster(ctx) })
	return s.serve(ctx)
}

// Ready returns nil when the server answers and knows the cluster's names, otherwise the reason why not.
func (s *Server) Ready() error {
	st := s.Status()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case st.Listen == "":
		return errors.New(s.problems[problemListen])
	case !st.Synced:
		return errors.New("names of the cluster are not known: " + s.problems[problemCluster])
	}
	return nil
}

// Status returns the present state.
func (s *Server) Status() Status {
	synced := s.synced()
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	st.Synced = synced
	st.Upstreams = append([]string{}, st.Upstreams...)
	for _, p := range s.problems {
		if p != "" {
			st.Problems = append(st.Problems, p)
		}
	}
	return st
}

// synced is whether the first fetch of the cluster's names is done. It stays true when the API goes away: stale names are served.
func (s *Server) synced() bool {
	k := s.cluster.Load()
	return k != nil && k.Ready()
}

// setProblem records (or with an empty text clears) a problem. It returns whether the text changed, so that callers log it once.
func (s *Server) setProblem(kind int, text string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := s.problems[kind] != text
	s.problems[kind] = text
	return changed
}

func (s *Server) update(f func(*Status)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.status)
}

const (
	pollInterval  = 5 * time.Second // resolv.conf; a stat and a read of a small file
	retryInterval = time.Second     // while nothing listens
	listenRetry   = time.Minute     // a custom configuration that was refused for an address or device, which may appear
	never         = 100 * 365 * 24 * time.Hour
)
