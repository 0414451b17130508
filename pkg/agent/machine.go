// SPDX-License-Identifier: Apache-2.0

// Package agent is what every machine of a cluster runs, be it started by `kedge agent` or by `kedge server`: the supervisor of the
// child processes, containerd and the node's components, the load balancer in front of the API servers, the tunnel by which API
// servers reach this node, and the status. Package server puts the control plane on top.
package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/docker/go-units"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/kubernetes"
	certutil "k8s.io/client-go/util/cert"

	"github.com/kedge-io/kedge/pkg/apilb"
	"github.com/kedge-io/kedge/pkg/check"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/embed"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/logging"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
	"github.com/kedge-io/kedge/pkg/tunnel"
)

// Names of the child processes of every machine.
const (
	Containerd  = "containerd"
	NodeProcess = "node"
)

// ErrRestart is what Run returns when the machine has to begin anew, with all of its children, for a change that reaches
// everywhere: another address, a place in the cluster that was lost. The reason has been logged.
var ErrRestart = errors.New("kedge starts again")

// Credentials are files: those of the node's components, and how they know the API servers.
type Credentials struct {
	Kubeconfig  string // of kubelet, kube-proxy, flannel, DNS; its server is the load balancer
	ClientCert  string // certificate and key of that kubeconfig
	ServingCert string // of the kubelet; empty: it gets one from the cluster
	ServerCA    string
	ClientCA    string
}

// Machine is the part of a server or an agent that both have. Its life: New, then Run, once the machine is part of a cluster.
type Machine struct {
	cfg     *config.Config
	log     *slog.Logger
	notify  *notifier
	started time.Time

	// Set before Run.
	Credentials Credentials
	OnChange    func([]supervise.ProcessStatus) // called after each change of a process; may be nil
	// RotateCertificates renews the leaf certificates of these names, or all, for `kedge certificate rotate`. say gets progress.
	RotateCertificates func(ctx context.Context, names []pki.Name, say func(string)) error

	// StartRotation begins a change of the CAs, for `kedge certificate rotate-ca`; nil on agents.
	StartRotation func(ctx context.Context, overlap time.Duration, say func(string)) error
	OnRotation    func(*authority.Rotation) // called with the last change of the CAs, if there is one, at first and when it goes on; may be nil

	// Preflight says what this machine is meant to do; Datastore is nil on a machine without a member. Both are for `kedge doctor`.
	Preflight func() check.Options
	Datastore func(context.Context) (*datastore.Health, error)

	OnServers func(map[string]authority.Server) // called with the cluster's servers, at first and after each change; may be nil

	// LeaveCluster has the cluster forget this machine, for `kedge leave`; LeaveFiles are removed when it has stopped. Package server
	// sets them for servers.
	LeaveCluster func(ctx context.Context, force bool, say func(string)) error
	LeaveFiles   []string

	// SaveDatastore takes a snapshot before an upgrade and says where it is; Administrator gives a client with an administrator's rights.
	// Package server sets them for servers.
	SaveDatastore func(ctx context.Context) (string, error)
	Administrator func() (kubernetes.Interface, error)

	balancer   *apilb.Balancer
	tunnel     *tunnel.Client // nil on a server that is no node
	supervisor *supervise.Supervisor

	mu    sync.Mutex
	ready bool
	phase string // what goes on before the processes start

	registered sync.Once

	upgrading upgrading

	leaving *leaving // nil: it does not leave
	left    chan struct{}

	podStop    *podStop // nil: pods stay when Kedge stops
	podsEnding bool
	draining   atomic.Bool // the [node] process is to run nothing that starts pods

	staging sync.Mutex
	tree    *embed.Tree
}

// New makes a machine that answers status requests from Serve on.
func New(cfg *config.Config) *Machine {
	log := logging.New(LogConfig(cfg))
	if err := logging.Klog(log, cfg.Debug); err != nil { // client-go's
		log.Warn("messages of Kubernetes' client library have a format of their own", "error", err)
	}
	return &Machine{cfg: cfg, log: log, notify: newNotifier(log), started: time.Now(), left: make(chan struct{}), upgrading: upgrading{restart: make(chan struct{})},
		Preflight: func() check.Options { return CheckOptions(cfg) }}
}

// Logger of the machine.
func (m *Machine) Logger() *slog.Logger { return m.log }

// Phase tells the status and the service manager what the machine waits for before its processes start.
func (m *Machine) Phase(text string) {
	m.mu.Lock()
	m.phase = text
	m.mu.Unlock()
	m.notify.status(text)
}

// LogConfig is the logging of all processes.
func LogConfig(cfg *config.Config) logging.Config {
	return logging.Config{Format: string(cfg.LogFormat), Debug: cfg.Debug}
}

// BalancerAddress is where this machine's components reach the API servers.
func (m *Machine) BalancerAddress() string {
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(m.cfg.LBServerPort))
}

// BalancerFile is where the load balancer keeps the list of servers.
func BalancerFile(cfg *config.Config) string { return filepath.Join(cfg.DataDir, "servers.json") }

// Balance makes the load balancer. local is the address of this machine's own API server, empty if there is none.
func (m *Machine) Balance(local string) (*apilb.Balancer, error) {
	join := ""
	if u, err := url.Parse(m.cfg.Server); err == nil {
		join = u.Host
	}
	ca := func() (*x509.CertPool, error) { return certutil.NewPool(m.Credentials.ServerCA) }
	b, err := apilb.New(apilb.Config{
		Listen:   m.BalancerAddress(),
		Local:    local,
		Join:     join,
		File:     BalancerFile(m.cfg),
		NodeName: m.cfg.NodeName,
		Probe:    apilb.HTTPSProbe(ca),
		Logger:   m.log.With("component", "load-balancer"),
	})
	m.balancer = b
	return b, err
}

// Run starts the processes, those of package server first, and blocks until ctx ends and everything has stopped, or until a task
// ends with an error. own are tasks beside the processes. Balance has been called.
func (m *Machine) Run(ctx context.Context, first []*supervise.Process, stopOrder []string, own ...func(context.Context) error) error {
	processes := first
	if m.cfg.HasNode() {
		processes = append(processes, m.processes(ctx)...)
		m.tunnel = m.newTunnel()
		own = append(own, m.tunnel.Run)
	}
	m.Phase("")
	m.mu.Lock()
	m.supervisor = &supervise.Supervisor{Processes: processes, StopOrder: stopOrder, BeforeStop: m.beforeStop, Changed: m.changed, Logger: m.log}
	m.mu.Unlock()
	supervise.SettleMemory()
	tasks := append(own,
		m.balancer.Run,
		m.watchAddress,
		m.watchLeave,
		m.watchUpgrade,
		func(ctx context.Context) error { m.watchServers(ctx); return nil },
		func(ctx context.Context) error { m.watchRegistries(ctx); return nil },
		func(ctx context.Context) error { m.settle(ctx); return nil },
		m.keepPodsUnit,
		func(ctx context.Context) error { m.supervisor.Run(ctx); return nil },
	)
	// What the tasks do goes on while pods end: they need the API, names and the network until the last moment.
	all, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	group, running := errgroup.WithContext(all)
	for _, task := range tasks {
		group.Go(func() error { return task(running) })
	}
	select {
	case <-running.Done():
	case <-ctx.Done():
	}
	// A version under trial that fails becomes the old one: for the service manager, it does not stop.
	if !errors.Is(context.Cause(running), ErrRestart) && m.trialAgainst() == "" {
		m.notify.stopping()
	}
	if ctx.Err() != nil {
		m.endPods()
	}
	if !m.hasLeft() && !m.draining.Load() {
		m.log.Info("stopping; pods keep running")
	}
	end()
	err := group.Wait()
	if m.hasLeft() { // also when a signal to stop came in between
		m.finishLeave()
		return nil
	}
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}

// Serve answers status requests and the service manager's watchdog, from before the machine joins until its end, while run runs.
func (m *Machine) Serve(ctx context.Context, run func(context.Context) error) error {
	// They answer until run has ended, not only until it is told to.
	base, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	group, serving := errgroup.WithContext(base)
	ctx, cancel := context.WithCancel(ctx)
	defer context.AfterFunc(serving, cancel)()
	group.Go(func() error { return serveSocket(serving, SocketPath(m.cfg.RunDir), m.requests()) })
	group.Go(func() error { return serveSocket(serving, QuerySocket(m.cfg.RunDir), m.queries()) })
	group.Go(func() error { m.notify.watchdog(serving); return nil })
	group.Go(func() error {
		defer end()
		return run(ctx)
	})
	return group.Wait()
}

// Restart ends one process so that it starts again at once.
func (m *Machine) Restart(name, reason string) error { return m.supervisor.Restart(name, reason) }

// Stage unpacks what is embedded, once; after a failure (a full disk) the next caller tries again.
func (m *Machine) Stage(ctx context.Context) (*embed.Tree, error) {
	m.staging.Lock()
	defer m.staging.Unlock()
	if m.tree == nil {
		tree, err := embed.Stage(ctx, m.cfg.DataDir, m.log)
		if err != nil {
			return nil, err
		}
		// The children call nft, iptables, ipset and conntrack by name: the staged ones come first.
		if err := os.Setenv("PATH", tree.Dir+":"+os.Getenv("PATH")); err != nil {
			return nil, err
		}
		m.tree = tree
	}
	return m.tree, nil
}

// settle makes the staged files safe against power loss when the machine has calmed down.
func (m *Machine) settle(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(time.Minute):
	}
	stage, err := m.Stage(ctx)
	if err == nil {
		err = stage.Settle(ctx)
	}
	if err != nil && ctx.Err() == nil {
		m.log.Warn("staged programs", "error", err)
	}
}

// Process describes a child process of this machine.
func (m *Machine) Process(name string, components []string, config func() (any, error)) *supervise.Process {
	return &supervise.Process{Name: name, RunDir: m.cfg.RunDir, StopTimeout: 10 * time.Second, Components: components, Config: config, Suspect: m.fullDisk}
}

// full is what etcd wants to have free when it starts: a file of its log.
const full = 64 * units.MB

// fullDisk says that a disk with this machine's data is full, if one is: etcd ends without a word of it.
func (m *Machine) fullDisk() string {
	for _, dir := range []string{filepath.Dir(m.cfg.EtcdDir()), m.cfg.DataDir} {
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil {
			continue
		}
		if free := fs.Bavail * uint64(fs.Bsize); free < full {
			return fmt.Sprintf("no space: the disk of %s has %s free", dir, units.HumanSize(float64(free)))
		}
	}
	return ""
}

// processes are those of a node. None waits for another to start: each waits for what it needs.
func (m *Machine) processes(ctx context.Context) []*supervise.Process {
	return []*supervise.Process{
		m.Process(Containerd, []string{node.ComponentContainerd}, func() (any, error) {
			stage, err := m.Stage(ctx)
			if err != nil {
				return nil, err
			}
			return m.containerdConfig(stage)
		}),
		m.Process(NodeProcess, NodeConfig(m.cfg, m.Credentials).Components(), func() (any, error) {
			if _, err := m.Stage(ctx); err != nil {
				return nil, err
			}
			cfg := NodeConfig(m.cfg, m.Credentials)
			cfg.Stopping = m.draining.Load()
			if known, err := readMembership(m.cfg); err == nil && known != nil { // the next start of Kedge says what is wrong with it
				cfg.Registered = known.Registered
			}
			return cfg, nil
		}),
	}
}

func (m *Machine) containerdConfig(stage *embed.Tree) (node.ContainerdConfig, error) {
	c := m.cfg
	registries, err := m.writeRegistries()
	if err != nil {
		return node.ContainerdConfig{}, err
	}
	cfg := node.ContainerdConfig{
		Logging:             LogConfig(c),
		Root:                filepath.Join(c.DataDir, "containerd"),
		State:               filepath.Dir(ContainerdSocket(c.RunDir)),
		Runc:                stage.Path(embed.Runc),
		Shim:                stage.Path(embed.Shim),
		CNIBinDir:           stage.CNIDir(),
		CNIConfDir:          cniConfDir(c),
		Snapshotter:         string(c.Snapshotter),
		CertsDir:            m.certsDir(),
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

func cniConfDir(c *config.Config) string { return filepath.Join(c.RunDir, "cni", "net.d") }

// NodeConfig is the configuration of the [node] process. Without credentials it serves to check arguments.
func NodeConfig(c *config.Config, credentials Credentials) node.Config {
	cfg := node.Config{
		Logging:          LogConfig(c),
		Name:             c.NodeName,
		Address:          c.NodeIP,
		Labels:           c.NodeLabels,
		Taints:           c.NodeTaints,
		Kubeconfig:       credentials.Kubeconfig,
		ServingCert:      credentials.ServingCert,
		ClientCA:         credentials.ClientCA,
		ContainerdSocket: ContainerdSocket(c.RunDir),
		RootDir:          c.KubeletRootDir,
		RunDir:           c.RunDir,
		DataDir:          c.DataDir,
		CNIConfDir:       cniConfDir(c),
		ResolvConf:       c.ResolvConf,
		ClusterCIDR:      c.ClusterCIDR,
		ServiceCIDR:      c.ServiceCIDR,
		ClusterDNS:       c.ClusterDNS,
		ClusterDomain:    c.ClusterDomain,
		ProxyMode:        c.ProxyMode,
		Backend:          c.FlannelBackend,
		Iface:            c.FlannelIface,
		TxOffload:        c.FlannelTxOffload,
		ExternalAddress:  c.NodeExternalIP,
		DNS:              !c.Disabled(config.ComponentCoreDNS),
		NetworkPolicy:    !c.Disabled(config.ComponentNetworkPolicy) && c.FlannelBackend != config.FlannelNone,
		ServiceLB:        !c.Disabled(config.ComponentServiceLB),
		Certificates:     CertificatePlaces(c),
		KubeletArgs:      c.KubeletArgs,
		ProxyArgs:        c.KubeProxyArgs,
	}
	cfg.FlannelExternalIP = c.FlannelExternalIP
	cfg.ProtectKernelDefaults = c.ProtectKernelDefaults
	if c.DisableKubeProxy {
		cfg.ProxyMode = ""
	}
	return cfg
}

// lingering is how long a start waits for the children of a Kedge that was killed. They end with it, and a busy machine takes a while to
// free the memory of a process before it closes its files.
const lingering = 15 * time.Second

// AwaitPorts waits until what was left of a Kedge that was killed has let go of the ports that o names. What else holds them is for the
// preflight to tell.
func (m *Machine) AwaitPorts(ctx context.Context, o check.Options) error {
	if os.Geteuid() != 0 {
		return nil // the preflight refuses that
	}
	ctx, cancel := context.WithTimeoutCause(ctx, lingering, errLingering)
	defer cancel()
	said := false
	for start := time.Now(); ; {
		held, err := check.Lingering(ctx, o)
		if err != nil || len(held) == 0 || locked(m.cfg.RunDir) {
			if err == nil && said {
				m.log.Info("the ports are free", "took", time.Since(start).Round(time.Millisecond))
			}
			return nil //nolint:nilerr // the preflight looks again
		}
		if !said {
			said = true
			m.log.Warn("what is left of a Kedge that was killed still holds ports, waiting for them", "ports", held)
		}
		select {
		case <-ctx.Done():
			if !errors.Is(context.Cause(ctx), errLingering) {
				return ctx.Err()
			}
			m.log.Warn("the ports are still held", "ports", held, "waited", lingering)
			return nil
		case <-time.After(50 * time.Millisecond):
		}
	}
}

var errLingering = errors.New("the ports are still held")

// locked tells whether another Kedge has the lock.
func locked(runDir string) bool {
	f, err := os.Open(lockFile(runDir))
	if err != nil {
		return false
	}
	defer f.Close()
	return flock(f) != nil
}

func lockFile(runDir string) string { return filepath.Join(runDir, "kedge.lock") }

// Lock makes sure that one Kedge runs on a machine. The lock ends with the process, whatever ends it.
func Lock(runDir string) (unlock func(), err error) {
	if err := os.MkdirAll(runDir, 0o711); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(lockFile(runDir), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f); err != nil {
		defer f.Close()
		pid := make([]byte, 16)
		n, _ := f.Read(pid)
		return nil, fmt.Errorf("another kedge is running on this machine (pid %s): see `kedge status`, or stop it first", pid[:n])
	}
	if err := f.Truncate(0); err != nil {
		return nil, err
	}
	if _, err := fmt.Fprint(f, os.Getpid()); err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

// tlsConfig is how the node shows itself to API servers; the kubelet replaces the certificate now and then.
func (m *Machine) tlsConfig() (*tls.Config, error) {
	pool, err := certutil.NewPool(m.Credentials.ServerCA)
	if err != nil {
		return nil, err
	}
	cert, err := tls.LoadX509KeyPair(m.Credentials.ClientCert, m.Credentials.ClientCert)
	if err != nil {
		return nil, err
	}
	return &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}, nil
}
