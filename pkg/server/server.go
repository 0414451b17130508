// SPDX-License-Identifier: Apache-2.0

// Package server is `kedge server`: it prepares the machine (preflight, a place in the cluster, keys), describes the processes of
// the control plane and puts them on top of what every machine runs (package agent). Everything that Kedge is made of meets here.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/apilb"
	"github.com/kedge-io/kedge/pkg/check"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/controlplane"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/deploy"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/registries"
	"github.com/kedge-io/kedge/pkg/snapshot"
	"github.com/kedge-io/kedge/pkg/supervise"
	"github.com/kedge-io/kedge/pkg/version"
)

// Names of the child processes that only servers have.
const (
	etcd         = "etcd"
	controlPlane = "controlplane"
)

// etcdPeerPort is where datastore members reach each other; etcdClientPort serves those servers that have no member.
const (
	etcdPeerPort   = 2380
	etcdClientPort = 2379
)

// Run starts a server and blocks until ctx ends and everything has stopped. What it refuses, it refuses before it writes.
func Run(ctx context.Context, cfg *config.Config) error {
	m := agent.New(cfg)
	s := &server{Machine: m, cfg: cfg, log: m.Logger(), etcdChanged: make(chan struct{}, 1), renamed: make(chan struct{}, 1),
		rotations: make(chan *authority.Rotation, 1)}
	if cfg.ClusterReset {
		return s.start(ctx)
	}
	return m.Try(func() error { return s.start(ctx) })
}

func (s *server) start(ctx context.Context) error {
	cfg := s.cfg
	if name, err := completeRestore(cfg); err != nil {
		return err
	} else if name != "" {
		s.log.Warn("a restore had been interrupted and has been completed", "component", "snapshot", "snapshot", name)
	}
	known, err := agent.Recall(cfg)
	if err := errors.Join(err, s.preflight(ctx)); err != nil {
		return err
	}
	unlock, err := agent.Lock(cfg.RunDir)
	if err != nil {
		return err
	}
	defer unlock()
	s.log.Info("starting", "version", version.Version, "node", cfg.NodeName, "address", cfg.NodeIP[0], "addressReason", cfg.NodeIPReason, "dataDir", cfg.DataDir)
	if cfg.ClusterReset {
		return s.reset(ctx, known)
	}
	return s.Ended(s.Serve(ctx, func(ctx context.Context) error { return s.run(ctx, known) }))
}

type server struct {
	*agent.Machine

	cfg *config.Config
	log *slog.Logger
	pki *pki.PKI // for the places of files

	keys     atomic.Pointer[pki.PKI]        // which renews them; another one after a change of names
	renamed  chan struct{}                  // the API has other floating addresses
	settings atomic.Pointer[config.Cluster] // nil: those of cfg

	tokens    []controlplane.OperatorToken
	bootstrap bool // this start makes a cluster
	// joining is what the cluster said when it took this server in as a learner; nil at any other start.
	joining *join.AddMemberResponse

	voted       atomic.Bool     // the datastore member was ready in this run
	etcdChanged chan struct{}   // its process changed state
	datastores  *apilb.Balancer // on a server without a member
	serveEtcd   atomic.Bool     // other servers have no datastore member and use this one

	rotations chan *authority.Rotation // the latest change of the CAs
}

func (s *server) run(ctx context.Context, known *agent.Membership) error {
	// The files are staged while the keys are made and etcd and the control plane start, which do not need them.
	go s.Stage(ctx) //nolint:errcheck // the processes that need it ask again and get the error
	if err := s.enter(ctx, known); err != nil {
		return err
	}
	var err error
	if s.pki, err = pki.Ensure(ctx, s.pkiConfig()); err != nil {
		return err
	}
	s.Credentials = agent.Credentials{
		Kubeconfig: s.pki.KubeconfigFile(pki.KubeletClient), ClientCert: s.pki.CertFile(pki.KubeletClient),
		ServingCert: s.pki.CertFile(pki.KubeletServing), ServerCA: s.pki.TrustFile(pki.ServerCA), ClientCA: s.pki.TrustFile(pki.ClientCA),
	}
	s.keys.Store(s.pki)
	s.RotateCertificates, s.StartRotation, s.OnRotation = s.rotateCertificates, s.startRotation, s.noteRotation
	s.OnChange, s.OnServers = s.observe, s.followServers
	s.Preflight = func() check.Options { return CheckOptions(s.cfg) }
	if s.cfg.HasEtcd() {
		s.Datastore = func(ctx context.Context) (*datastore.Health, error) {
			return datastore.Inspect(ctx, datastore.Endpoint(s.etcdSocket()))
		}
	}
	local := ""
	if s.cfg.HasControlPlane() {
		local = net.JoinHostPort(s.apiHost(), strconv.Itoa(s.cfg.HTTPSListenPort))
	}
	balancer, err := s.Balance(local)
	if err != nil {
		return err
	}
	s.LeaveCluster = s.leaveCluster(balancer)
	s.Administrator = s.administrator
	if s.cfg.HasEtcd() {
		s.SaveDatastore = s.saveDatastore
	}
	s.LeaveFiles = []string{s.etcdDir(), datastore.MemberFile(s.etcdDir()), datastore.RemovedFile(s.etcdDir()), datastore.DiskFile(s.etcdDir()), s.etcdDirFile(), s.cfg.WriteKubeconfig,
		filepath.Join(s.cfg.DataDir, "datastores.json")}
	tasks := []func(context.Context) error{s.keepKeys, s.watchMembership, s.register(balancer), s.followCluster(balancer, known), s.snapshots, s.finishRestore,
		s.followRotation(balancer)}
	if s.joining != nil {
		tasks = append(tasks, s.promote(balancer))
	}
	if s.cfg.DisableEtcd {
		if s.datastores, err = s.datastoreBalancer(); err != nil {
			return err
		}
		tasks = append(tasks, s.datastores.Run)
	}
	return s.Run(ctx, s.processes(), []string{agent.NodeProcess, controlPlane, etcd, agent.Containerd}, tasks...)
}

// preflight refuses what cannot work before anything is written: the machine, then the arguments for components.
func (s *server) preflight(ctx context.Context) error {
	o := CheckOptions(s.cfg)
	errs := []error{s.AwaitPorts(ctx, o), check.RunFatal(ctx, o)}
	// Building the components' options takes a while: only when there is something to check.
	if c := s.cfg; len(c.KubeAPIServerArgs)+len(c.KubeControllerManagerArgs)+len(c.KubeSchedulerArgs) > 0 {
		errs = append(errs, controlplane.CheckArgs(s.controlPlaneConfig()))
	}
	if c := s.cfg; len(c.KubeletArgs)+len(c.KubeProxyArgs) > 0 {
		errs = append(errs, node.CheckArgs(agent.NodeConfig(c, agent.Credentials{})))
	}
	_, err := registries.Load(s.cfg.PrivateRegistry)
	var tokenErr error
	s.tokens, tokenErr = s.operatorTokens()
	errs = append(errs, tokenErr)
	return errors.Join(append(errs, datastore.CheckArgs(s.cfg.EtcdArgs.Flags()), err)...)
}

// CheckOptions tells the preflight what a machine with this configuration is going to do.
func CheckOptions(c *config.Config) check.Options {
	o := agent.CheckOptions(c)
	o.Ports = check.DefaultPorts(o, netip.AddrPortFrom(c.BindAddress, uint16(c.HTTPSListenPort)))
	o.Ports = slices.DeleteFunc(o.Ports, func(p check.Port) bool {
		return c.Disabled(config.ComponentCoreDNS) && p.Addr == c.ClusterDNS || p.Port == etcdPeerPort && !c.HasEtcd() ||
			p.Port == c.HTTPSListenPort && !c.HasControlPlane()
	})
	return o
}

// processes describes the children of the control plane in the order of their start. None waits for another to start: each waits
// for what it needs.
func (s *server) processes() []*supervise.Process {
	var list []*supervise.Process
	if s.cfg.HasEtcd() {
		list = append(list, s.Process(etcd, []string{datastore.Component}, func() (any, error) { return s.etcdConfig(), nil }))
	}
	if s.cfg.HasControlPlane() {
		list = append(list, s.Process(controlPlane, s.controlPlaneConfig().Components(), func() (any, error) { return s.controlPlaneConfig(), nil }))
	}
	return list
}

func (s *server) etcdSocket() string { return filepath.Join(s.cfg.RunDir, "etcd.sock") }

func (s *server) etcdDir() string { return s.cfg.EtcdDir() }

func (s *server) peerURL() string {
	return "https://" + netip.AddrPortFrom(s.cfg.NodeIP[0], etcdPeerPort).String()
}

func (s *server) pkiConfig() pki.Config {
	c := s.cfg
	cfg := pki.Config{
		Dir:                 c.PKIDir(),
		NodeName:            c.NodeName,
		NodeIPs:             c.NodeIP,
		AdvertiseAddress:    c.AdvertiseAddress,
		ServiceIPs:          serviceIPs(c.ServiceCIDR),
		ClusterDomain:       c.ClusterDomain,
		ExtraSANs:           append(slices.Clone(c.TLSSANs), texts(s.cluster().APIVIP)...),
		APIHost:             s.apiHost(),
		APIPort:             c.HTTPSListenPort,
		BalancerPort:        c.LBServerPort,
		AdminKubeconfigPath: c.WriteKubeconfig,
		AdminKubeconfigMode: c.WriteKubeconfigMode,
		Logger:              s.log.With("component", "pki"),
		OnRenew: func(name pki.Name) {
			if err := s.Restart(controlPlane, "its certificate "+string(name)+" has to be replaced"); err != nil {
				s.log.Error("restart for a certificate", "error", err)
			}
		},
	}
	if !c.HasControlPlane() { // kubectl on this machine asks the other servers
		cfg.APIHost, cfg.APIPort = "127.0.0.1", c.LBServerPort
	}
	return cfg
}

// serviceIPs are the addresses that the kubernetes Service may have.
func serviceIPs(services config.Prefixes) []netip.Addr {
	var list []netip.Addr
	for _, p := range services {
		list = append(list, p.Addr().Next())
	}
	return list
}

func texts(addresses []netip.Addr) []string {
	var list []string
	for _, a := range addresses {
		list = append(list, a.String())
	}
	return list
}

// apiHost is where this machine's components reach its API server: loopback, unless it listens on one other address only.
func (s *server) apiHost() string {
	if b := s.cfg.BindAddress; !b.IsUnspecified() {
		return b.String()
	}
	if s.cfg.BindAddress.Is6() && !s.cfg.NodeIP[0].Is4() {
		return "::1"
	}
	return "127.0.0.1"
}

func (s *server) etcdConfig() datastore.Config {
	cfg := datastore.Config{
		Logging:     agent.LogConfig(s.cfg),
		Name:        s.cfg.NodeName,
		Dir:         s.etcdDir(),
		Socket:      s.etcdSocket(),
		PeerAddress: netip.AddrPortFrom(s.cfg.NodeIP[0], etcdPeerPort),
		PeerCert:    s.pki.CertFile(pki.EtcdPeer),
		PeerKey:     s.pki.KeyFile(pki.EtcdPeer),
		PeerCA:      s.pki.TrustFile(pki.EtcdCA),
		Bootstrap:   s.bootstrap,
		Args:        s.cfg.EtcdArgs.Flags(),
	}
	if s.joining != nil {
		for _, m := range s.joining.Members {
			cfg.InitialCluster = append(cfg.InitialCluster, datastore.Member(m))
		}
	}
	if s.serveEtcd.Load() {
		cfg.ClientListen = netip.AddrPortFrom(s.cfg.NodeIP[0], etcdClientPort)
	}
	return cfg
}

// followServers makes the datastore reachable for servers that have no member, as long as there are some.
func (s *server) followServers(servers map[string]authority.Server) {
	needed := false
	var members []string
	for _, other := range servers {
		needed = needed || other.ControlPlane && !other.Etcd
		if u, err := url.Parse(other.PeerURL); other.Etcd && err == nil && u.Host != "" { // one that joins has no URL yet
			members = append(members, net.JoinHostPort(u.Hostname(), strconv.Itoa(etcdClientPort)))
		}
	}
	if s.datastores != nil {
		if err := s.datastores.SetServers(members); err != nil {
			s.log.Warn("the list of datastore members could not be kept for the next start", "error", err)
		}
	}
	if s.cfg.HasEtcd() && s.serveEtcd.Swap(needed) != needed {
		if err := s.Restart(etcd, "servers without a datastore member have come or gone"); err != nil {
			s.log.Error("restart of the datastore", "error", err)
		}
	}
}

func (s *server) controlPlaneConfig() controlplane.Config {
	c := s.cfg
	cfg := controlplane.Config{
		Logging:               agent.LogConfig(c),
		NodeName:              c.NodeName,
		RunDir:                c.RunDir,
		ManifestsDir:          deploy.Dir(c.DataDir),
		ChartsDir:             filepath.Join(c.DataDir, "charts"),
		QuerySocket:           agent.QuerySocket(c.RunDir),
		Egress:                c.EgressMode,
		BindAddress:           c.BindAddress,
		Port:                  c.HTTPSListenPort,
		AdvertiseAddress:      c.AdvertiseAddress,
		BalancerPort:          c.LBServerPort,
		Cluster:               s.cluster(),
		Certificates:          agent.CertificatePlaces(c),
		APIServerArgs:         c.KubeAPIServerArgs,
		ControllerManagerArgs: c.KubeControllerManagerArgs,
		SchedulerArgs:         c.KubeSchedulerArgs,
		Hardening:             controlplane.Hardening{AuditLog: c.AuditLog, PodSecurity: c.PodSecurity, PodSecurityExempt: c.PodSecurityExempt},
	}
	if _, err := os.Stat(c.AuditPolicy); err == nil {
		cfg.Hardening.AuditPolicy = c.AuditPolicy
	}
	p := s.pki
	if p == nil { // while arguments are checked
		cfg.Datastore.Endpoints = []string{datastore.Endpoint(s.etcdSocket())}
		return cfg
	}
	cfg.Datastore = s.datastoreConfig()
	if pending, err := snapshot.Unfinished(c.DataDir); err == nil && pending != nil { // an error is reported by finishRestore
		cfg.RestoredRevision = pending.Revision
	}
	cfg.Tokens = s.tokens
	cfg.Files = controlplane.Files{
		ServerCA: p.CertFile(pki.ServerCA), ServerCAKey: p.KeyFile(pki.ServerCA),
		ClientCA: p.CertFile(pki.ClientCA), ClientCAKey: p.KeyFile(pki.ClientCA),
		TrustedServerCA:       p.TrustFile(pki.ServerCA),
		TrustedClientCA:       p.TrustFile(pki.ClientCA),
		RequestHeaderCA:       p.TrustFile(pki.RequestHeaderCA),
		APIServer:             p.CertFile(pki.APIServer),
		KubeletClient:         p.CertFile(pki.APIServerKubeletClient),
		FrontProxyClient:      p.CertFile(pki.FrontProxyClient),
		FrontProxyName:        pki.UserFrontProxy,
		ServiceAccountKey:     p.KeyFile(pki.ServiceAccount),
		ServiceAccountTrusted: p.ServiceAccountTrustFile(),
		EncryptionConfig:      p.EncryptionConfigFile(),
		Keyring:               p.KeyFile(pki.Keyring),
		Kubeconfig:            p.KubeconfigFile(pki.KedgeController),
		Shared:                map[string]string{},
	}
	for _, name := range append(pki.SharedFiles(), pki.RotationFile) {
		cfg.Files.Shared[name] = filepath.Join(c.PKIDir(), name)
	}
	return cfg
}

// datastoreConfig is where the API server keeps its data: in this server's member, in those of others, or in the operator's etcd.
func (s *server) datastoreConfig() controlplane.Datastore {
	if d := s.cfg.Datastore; d.External() {
		return controlplane.Datastore{Endpoints: d.Endpoints, CAFile: d.CAFile, CertFile: d.CertFile, KeyFile: d.KeyFile}
	}
	peer := datastore.TLSFiles{Cert: s.pki.CertFile(pki.EtcdPeer), Key: s.pki.KeyFile(pki.EtcdPeer), CA: s.pki.TrustFile(pki.EtcdCA)}
	d := controlplane.Datastore{Own: true, Peer: peer, Endpoints: []string{datastore.Endpoint(s.etcdSocket())}}
	if s.cfg.DisableEtcd {
		d.Endpoints = []string{"https://" + net.JoinHostPort("127.0.0.1", strconv.Itoa(etcdClientPort))}
		d.CAFile, d.CertFile, d.KeyFile = peer.CA, peer.Cert, peer.Key
	}
	return d
}

// operatorTokens are those that the operator chose. A token that a cluster made is known to it.
func (s *server) operatorTokens() ([]controlplane.OperatorToken, error) {
	var tokens []controlplane.OperatorToken
	for _, t := range []struct {
		option string
		role   join.Role
		text   func() (string, error)
	}{{"token", join.Server, s.cfg.TokenText}, {"agent-token", join.Agent, s.cfg.AgentTokenText}} {
		text, err := t.text()
		if err != nil {
			return nil, err
		}
		if text == "" {
			continue
		}
		token, err := join.Parse(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", t.option, err)
		}
		if token.Derived {
			tokens = append(tokens, controlplane.OperatorToken{ID: token.ID, Secret: token.Secret, Role: t.role})
		}
	}
	return tokens, nil
}
