// SPDX-License-Identifier: Apache-2.0

// Package server is `kedge server`: it prepares the machine (preflight, keys, staged files), describes the child processes
// and keeps them running. Everything that Kedge is made of meets here.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kedge-io/kedge/pkg/check"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/controlplane"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/embed"
	"github.com/kedge-io/kedge/pkg/logging"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/registries"
	"github.com/kedge-io/kedge/pkg/supervise"
	"github.com/kedge-io/kedge/pkg/version"
)

// Names of the child processes.
const (
	etcd         = "etcd"
	controlPlane = "controlplane"
	containerd   = "containerd"
	nodeProcess  = "node"
)

// Run starts a server and blocks until ctx ends and everything has stopped. What it refuses, it refuses before it writes.
func Run(ctx context.Context, cfg *config.Server) error {
	start := time.Now()
	log := logging.New(logConfig(cfg))
	notify := newNotifier(log)
	s := &server{cfg: cfg, log: log, notify: notify, started: start}
	if err := s.preflight(ctx); err != nil {
		return err
	}
	unlock, err := lock(cfg.RunDir)
	if err != nil {
		return err
	}
	defer unlock()
	log.Info("starting", "version", version.Version, "node", cfg.NodeName, "address", cfg.NodeIP, "addressReason", cfg.NodeIPReason, "dataDir", cfg.DataDir)

	// The files are staged while the keys are made and etcd and the control plane start, which do not need them.
	go s.stage(ctx) //nolint:errcheck // the processes that need it ask again and get the error
	if s.pki, err = pki.Ensure(ctx, s.pkiConfig()); err != nil {
		return err
	}
	s.supervisor = &supervise.Supervisor{
		Processes: s.processes(ctx),
		StopOrder: []string{nodeProcess, controlPlane, etcd, containerd},
		Changed:   s.changed,
		Logger:    log,
	}
	supervise.SettleMemory()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.serveStatus(ctx) })
	group.Go(func() error { return s.pki.Run(ctx) })
	group.Go(func() error { s.watchRegistries(ctx); return nil })
	group.Go(func() error { notify.watchdog(ctx); return nil })
	group.Go(func() error { s.settle(ctx); return nil })
	group.Go(func() error { s.supervisor.Run(ctx); return nil })
	<-ctx.Done()
	notify.stopping()
	log.Info("stopping; pods keep running")
	err = group.Wait()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}

type server struct {
	cfg        *config.Server
	log        *slog.Logger
	notify     *notifier
	started    time.Time
	pki        *pki.PKI
	supervisor *supervise.Supervisor

	mu    sync.Mutex
	ready bool

	staging sync.Mutex
	tree    *embed.Tree
}

// stage unpacks what is embedded, once; after a failure (a full disk) the next caller tries again.
func (s *server) stage(ctx context.Context) (*embed.Tree, error) {
	s.staging.Lock()
	defer s.staging.Unlock()
	if s.tree == nil {
		tree, err := embed.Stage(ctx, s.cfg.DataDir, s.log)
		if err != nil {
			return nil, err
		}
		// The children call nft, iptables, ipset and conntrack by name: the staged ones come first.
		if err := os.Setenv("PATH", tree.Dir+":"+os.Getenv("PATH")); err != nil {
			return nil, err
		}
		s.tree = tree
	}
	return s.tree, nil
}

// preflight refuses what cannot work before anything is written: the machine, then the arguments for components.
func (s *server) preflight(ctx context.Context) error {
	var errs []error
	errs = append(errs, check.RunFatal(ctx, CheckOptions(s.cfg)))
	// Building the components' options takes a while: only when there is something to check.
	if c := s.cfg; len(c.KubeAPIServerArgs)+len(c.KubeControllerManagerArgs)+len(c.KubeSchedulerArgs) > 0 {
		errs = append(errs, controlplane.CheckArgs(s.controlPlaneConfig()))
	}
	if c := s.cfg; len(c.KubeletArgs)+len(c.KubeProxyArgs) > 0 {
		errs = append(errs, node.CheckArgs(s.nodeConfig()))
	}
	_, err := registries.Load(s.cfg.PrivateRegistry)
	return errors.Join(append(errs, datastore.CheckArgs(s.cfg.EtcdArgs.Flags()), err)...)
}

// settle makes the staged files safe against power loss when the machine has calmed down.
func (s *server) settle(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(time.Minute):
	}
	stage, err := s.stage(ctx)
	if err == nil {
		err = stage.Settle(ctx)
	}
	if err != nil && ctx.Err() == nil {
		s.log.Warn("staged programs", "error", err)
	}
}

// CheckOptions tells the preflight what a server with this configuration is going to do.
func CheckOptions(c *config.Server) check.Options {
	o := check.Options{
		DataDir: c.DataDir, KubeletDir: c.KubeletRootDir, NodeName: c.NodeName,
		ProxyMode: string(c.ProxyMode), FlannelBackend: string(c.FlannelBackend), Snapshotter: string(c.Snapshotter),
		ClusterCIDR: c.ClusterCIDR, ServiceCIDR: c.ServiceCIDR, DNSAddress: c.ClusterDNS, ResolvConf: c.ResolvConf,
	}
	if c.DisableKubeProxy {
		o.ProxyMode = "none"
	}
	o.Ports = check.DefaultPorts(o, netip.AddrPortFrom(c.BindAddress, uint16(c.HTTPSListenPort)))
	if c.Disabled(config.ComponentCoreDNS) {
		o.Ports = slices.DeleteFunc(o.Ports, func(p check.Port) bool { return p.Addr == c.ClusterDNS })
	}
	return o
}

// processes describes the children in the order of their start. None waits for another to start: each waits for what it needs.
func (s *server) processes(ctx context.Context) []*supervise.Process {
	process := func(name string, stop time.Duration, components []string, config func() (any, error)) *supervise.Process {
		return &supervise.Process{Name: name, RunDir: s.cfg.RunDir, StopTimeout: stop, Components: components, Config: config}
	}
	return []*supervise.Process{
		process(etcd, 10*time.Second, []string{datastore.Component}, func() (any, error) { return s.etcdConfig(), nil }),
		process(controlPlane, 10*time.Second, controlplane.Components(), func() (any, error) { return s.controlPlaneConfig(), nil }),
		process(containerd, 10*time.Second, []string{node.ComponentContainerd}, func() (any, error) {
			stage, err := s.stage(ctx)
			if err != nil {
				return nil, err
			}
			return s.containerdConfig(stage)
		}),
		process(nodeProcess, 10*time.Second, s.nodeConfig().Components(), func() (any, error) {
			if _, err := s.stage(ctx); err != nil {
				return nil, err
			}
			return s.nodeConfig(), nil
		}),
	}
}

func logConfig(cfg *config.Server) logging.Config {
	return logging.Config{Format: string(cfg.LogFormat), Debug: cfg.Debug}
}

func (s *server) etcdSocket() string { return filepath.Join(s.cfg.RunDir, "etcd.sock") }

func (s *server) pkiConfig() pki.Config {
	c := s.cfg
	return pki.Config{
		Dir:                 c.PKIDir(),
		NodeName:            c.NodeName,
		NodeIPs:             c.NodeIP,
		AdvertiseAddress:    c.AdvertiseAddress,
		ServiceIPs:          []netip.Addr{c.ServiceCIDR.Addr().Next()},
		ClusterDomain:       c.ClusterDomain,
		ExtraSANs:           c.TLSSANs,
		APIHost:             s.apiHost(),
		APIPort:             c.HTTPSListenPort,
		AdminKubeconfigPath: c.WriteKubeconfig,
		AdminKubeconfigMode: c.WriteKubeconfigMode,
		Logger:              s.log.With("component", "pki"),
		OnRenew: func(name pki.Name) {
			if err := s.supervisor.Restart(controlPlane, "its certificate "+string(name)+" has to be replaced"); err != nil {
				s.log.Error("restart for a certificate", "error", err)
			}
		},
	}
}

// apiHost is where this machine's components reach the API server: loopback, unless it listens on one other address only.
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
	return datastore.Config{
		Logging:     logConfig(s.cfg),
		Name:        s.cfg.NodeName,
		Dir:         filepath.Join(s.cfg.DataDir, "etcd"),
		Socket:      s.etcdSocket(),
		PeerAddress: netip.AddrPortFrom(s.cfg.NodeIP[0], 2380),
		PeerCert:    s.pki.CertFile(pki.EtcdPeer),
		PeerKey:     s.pki.KeyFile(pki.EtcdPeer),
		PeerCA:      s.pki.CertFile(pki.EtcdCA),
		Args:        s.cfg.EtcdArgs.Flags(),
	}
}

func (s *server) controlPlaneConfig() controlplane.Config {
	c := s.cfg
	cfg := controlplane.Config{
		Logging:               logConfig(c),
		NodeName:              c.NodeName,
		EtcdSocket:            s.etcdSocket(),
		BindAddress:           c.BindAddress,
		Port:                  c.HTTPSListenPort,
		AdvertiseAddress:      c.AdvertiseAddress,
		ClusterCIDR:           c.ClusterCIDR,
		ServiceCIDR:           c.ServiceCIDR,
		ServiceNodePortRange:  c.ServiceNodePortRange.String(),
		ClusterDomain:         c.ClusterDomain,
		ClusterDNS:            c.ClusterDNS,
		Single:                true, // joining servers are not there yet
		Disable:               c.Disable,
		APIServerArgs:         c.KubeAPIServerArgs,
		ControllerManagerArgs: c.KubeControllerManagerArgs,
		SchedulerArgs:         c.KubeSchedulerArgs,
	}
	if p := s.pki; p != nil { // nil while arguments are checked
		cfg.Files = controlplane.Files{
			ServerCA: p.CertFile(pki.ServerCA), ServerCAKey: p.KeyFile(pki.ServerCA),
			ClientCA: p.CertFile(pki.ClientCA), ClientCAKey: p.KeyFile(pki.ClientCA),
			RequestHeaderCA:   p.CertFile(pki.RequestHeaderCA),
			APIServer:         p.CertFile(pki.APIServer),
			KubeletClient:     p.CertFile(pki.APIServerKubeletClient),
			FrontProxyClient:  p.CertFile(pki.FrontProxyClient),
			FrontProxyName:    pki.UserFrontProxy,
			ServiceAccountKey: p.KeyFile(pki.ServiceAccount),
			EncryptionConfig:  p.EncryptionConfigFile(),
			Kubeconfig:        p.KubeconfigFile(pki.KedgeController),
		}
	}
	return cfg
}

func (s *server) containerdConfig(stage *embed.Tree) (node.ContainerdConfig, error) {
	c := s.cfg
	registries, err := s.writeRegistries()
	if err != nil {
		return node.ContainerdConfig{}, err
	}
	cfg := node.ContainerdConfig{
		Logging:             logConfig(c),
		Root:                filepath.Join(c.DataDir, "containerd"),
		State:               s.containerdState(),
		Runc:                stage.Path(embed.Runc),
		Shim:                stage.Path(embed.Shim),
		CNIBinDir:           stage.CNIDir(),
		CNIConfDir:          s.cniConfDir(),
		Snapshotter:         string(c.Snapshotter),
		CertsDir:            s.certsDir(),
		RegistryConfig:      registries,
		PauseImage:          c.PauseImage,
		ImagesDir:           filepath.Join(c.DataDir, "images"),
		SystemdCgroup:       node.SystemdCgroup(),
		RestrictOOMScoreAdj: node.RestrictOOMScoreAdj(),
	}
	if cfg.PauseImage == "" {
		cfg.PauseArchive, cfg.PauseImage = stage.PauseImage()
	}
	return cfg, nil
}

func (s *server) containerdState() string { return filepath.Join(s.cfg.RunDir, "containerd") }
func (s *server) cniConfDir() string      { return filepath.Join(s.cfg.RunDir, "cni", "net.d") }

func (s *server) nodeConfig() node.Config {
	c := s.cfg
	cfg := node.Config{
		Logging:          logConfig(c),
		Name:             c.NodeName,
		Address:          c.NodeIP,
		Labels:           c.NodeLabels,
		Taints:           c.NodeTaints,
		ContainerdSocket: node.ContainerdConfig{State: s.containerdState()}.Socket(),
		RootDir:          c.KubeletRootDir,
		RunDir:           c.RunDir,
		DataDir:          c.DataDir,
		CNIConfDir:       s.cniConfDir(),
		ResolvConf:       c.ResolvConf,
		ClusterCIDR:      c.ClusterCIDR,
		ClusterDNS:       c.ClusterDNS,
		ClusterDomain:    c.ClusterDomain,
		ProxyMode:        c.ProxyMode,
		Backend:          c.FlannelBackend,
		Iface:            c.FlannelIface,
		DNS:              !c.Disabled(config.ComponentCoreDNS),
		KubeletArgs:      c.KubeletArgs,
		ProxyArgs:        c.KubeProxyArgs,
	}
	if c.DisableKubeProxy {
		cfg.ProxyMode = ""
	}
	if p := s.pki; p != nil { // nil while arguments are checked
		cfg.Kubeconfig = p.KubeconfigFile(pki.KubeletClient)
		cfg.ServingCert = p.CertFile(pki.KubeletServing)
		cfg.ClientCA = p.CertFile(pki.ClientCA)
	}
	return cfg
}

// lock makes sure that one server runs on a machine. The lock ends with the process, whatever ends it.
func lock(runDir string) (unlock func(), err error) {
	if err := os.MkdirAll(runDir, 0o711); err != nil {
		return nil, err
	}
	file := filepath.Join(runDir, "kedge.lock")
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f); err != nil {
		defer f.Close()
		pid := make([]byte, 16)
		n, _ := f.Read(pid)
		return nil, fmt.Errorf("another kedge server is running on this machine (pid %s): see `kedge status`, or stop it first", pid[:n])
	}
	if err := f.Truncate(0); err != nil {
		return nil, err
	}
	if _, err := fmt.Fprint(f, os.Getpid()); err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}
