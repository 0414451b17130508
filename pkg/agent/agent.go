// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/apilb"
	"github.com/kedge-io/kedge/pkg/check"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/registries"
	"github.com/kedge-io/kedge/pkg/supervise"
	"github.com/kedge-io/kedge/pkg/version"
)

// Run starts an agent and blocks until ctx ends and everything has stopped. What it refuses, it refuses before it writes.
func Run(ctx context.Context, cfg *config.Config) error {
	m := New(cfg)
	return m.Try(func() error { return m.runAgent(ctx) })
}

func (m *Machine) runAgent(ctx context.Context) error {
	cfg := m.cfg
	known, err := Recall(cfg)
	if err := errors.Join(err, m.preflight(ctx)); err != nil {
		return err
	}
	unlock, err := Lock(cfg.RunDir)
	if err != nil {
		return err
	}
	defer unlock()
	m.log.Info("starting", "version", version.Version, "node", cfg.NodeName, "address", cfg.NodeIP[0], "addressReason", cfg.NodeIPReason, "dataDir", cfg.DataDir)
	return m.Serve(ctx, func(ctx context.Context) error {
		go m.Stage(ctx) //nolint:errcheck // the processes that need it ask again and get the error
		files := pki.Agent{Dir: cfg.PKIDir(), Credentials: node.ClientCertFile(cfg.KubeletRootDir), BalancerPort: cfg.LBServerPort}
		if err := m.enroll(ctx, known, files); err != nil {
			return err
		}
		m.Credentials = Credentials{Kubeconfig: files.KubeconfigFile(), ClientCert: files.Credentials, ServerCA: files.ServerCAFile(), ClientCA: files.ClientCAFile()}
		removed := make(chan struct{}, 1)
		m.OnChange = func(processes []supervise.ProcessStatus) {
			m.noteRegistered(processes)
			noteRemoved(processes, removed)
		}
		m.RotateCertificates = m.rotateKubelet
		follower := &caFollower{m: m, files: files, changed: make(chan *authority.Rotation, 1)}
		m.OnRotation = follower.note
		if _, err := m.Balance(""); err != nil {
			return err
		}
		err := m.Run(ctx, nil, []string{NodeProcess, Containerd}, m.watchCredentials, follower.run, func(ctx context.Context) error { return m.watchRemoved(ctx, removed) })
		return m.Ended(err)
	})
}

// noteRemoved tells removed when the node process has found that its Node is not in the cluster any more.
func noteRemoved(processes []supervise.ProcessStatus, removed chan<- struct{}) {
	for _, p := range processes {
		for _, c := range p.Components {
			if c.Name == node.ComponentKubelet && c.State == supervise.Failed && c.Reason == node.Removed {
				select {
				case removed <- struct{}{}:
				default:
				}
			}
		}
	}
}

// watchRemoved ends a node that was removed while it ran.
func (m *Machine) watchRemoved(ctx context.Context, removed <-chan struct{}) error {
	select {
	case <-ctx.Done():
		return nil
	case <-removed:
	}
	if m.Leaving() {
		return nil
	}
	m.log.Warn("this node has been removed from the cluster and stops; pods keep running. Start it again to join afresh with a valid token")
	return ErrRemoved
}

// preflight refuses what cannot work before anything is written: the machine, then the arguments for components.
func (m *Machine) preflight(ctx context.Context) error {
	o := CheckOptions(m.cfg)
	errs := []error{m.AwaitPorts(ctx, o), check.RunFatal(ctx, o)}
	if c := m.cfg; len(c.KubeletArgs)+len(c.KubeProxyArgs) > 0 {
		errs = append(errs, node.CheckArgs(NodeConfig(c, Credentials{})))
	}
	_, err := registries.Load(m.cfg.PrivateRegistry)
	return errors.Join(append(errs, err)...)
}

// CheckOptions tells the preflight what a machine with this configuration is going to do as a node.
func CheckOptions(c *config.Config) check.Options {
	o := check.Options{
		DataDir: c.DataDir, KubeletDir: c.KubeletRootDir, NodeName: c.NodeName, Agent: c.Role == config.RoleAgent,
		ProxyMode: string(c.ProxyMode), FlannelBackend: string(c.FlannelBackend), Snapshotter: string(c.Snapshotter),
		ClusterCIDR: c.ClusterCIDR, ServiceCIDR: c.ServiceCIDR, DNSAddress: c.ClusterDNS, ResolvConf: c.ResolvConf, BalancerPort: c.LBServerPort,
	}
	if c.DisableKubeProxy {
		o.ProxyMode = "none"
	}
	return o
}

// enroll makes the machine a node of the cluster, unless it is one already and its credentials still hold.
func (m *Machine) enroll(ctx context.Context, known *Membership, files pki.Agent) error {
	lapsed := checkCredentials(files.Credentials, m.cfg.NodeName)
	if known != nil && errors.Is(lapsed, errExpired) {
		if lapsed = m.renewExpired(ctx, files, lapsed); lapsed != nil && ctx.Err() == nil {
			m.log.Warn("the cluster does not renew this node's certificate: it has to join again", "reason", lapsed)
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if lapsed == nil && known != nil && known.Registered {
		lapsed = m.checkRegistered(ctx, files)
	}
	if known != nil && lapsed == nil {
		return nil
	}
	if m.cfg.Server == "" {
		return m.notPart(known, lapsed)
	}
	return m.Join(ctx, join.Agent, func(ctx context.Context, c *Candidate) error {
		cert, key, err := c.NodeCertificate(ctx, m.cfg.NodeName)
		if err != nil {
			return err
		}
		files.ServerCA, files.ClientCA = c.Cluster.CA, c.ClientCA
		if err := files.Write(); err != nil {
			return err
		}
		if err := join.StoreKubeletClient(node.CertDir(m.cfg.KubeletRootDir), cert, key); err != nil {
			return err
		}
		return Remember(m.cfg, Membership{Cluster: c.Settings, Joined: true})
	})
}

// registeredTimeout is how long a start waits for a server that may know that this node was removed: when all are down it goes on.
const registeredTimeout = 3 * time.Second

// errNotRegistered is why credentials that are valid are not used: a certificate cannot be taken back.
var errNotRegistered = errors.New(node.Removed)

// checkRegistered asks the servers known here whether a node that has been in the cluster still is.
func (m *Machine) checkRegistered(ctx context.Context, files pki.Agent) error {
	ctx, cancel := context.WithTimeout(ctx, registeredTimeout)
	defer cancel()
	addresses := m.knownServers()
	config, err := clientcmd.BuildConfigFromFlags("", files.KubeconfigFile())
	if err != nil {
		return err
	}
	gone := make(chan bool, len(addresses))
	for _, address := range addresses {
		go func() { gone <- nodeIsGone(ctx, config, address, m.cfg.NodeName) }()
	}
	for range addresses {
		if <-gone {
			return errNotRegistered
		}
	}
	return nil
}

// knownServers are the addresses of API servers that an earlier start kept, and the one to join through.
func (m *Machine) knownServers() []string {
	addresses, err := apilb.ReadFile(BalancerFile(m.cfg))
	if err != nil {
		m.log.Warn("list of servers", "error", err)
	}
	if u, err := url.Parse(m.cfg.Server); err == nil && u.Host != "" && !slices.Contains(addresses, u.Host) {
		addresses = append(addresses, u.Host)
	}
	return addresses
}

// nodeIsGone says whether a server answers that there is no such Node.
func nodeIsGone(ctx context.Context, config *rest.Config, address, name string) bool {
	config = rest.CopyConfig(config)
	config.Host = "https://" + address
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return false
	}
	_, err = client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	return apierrors.IsNotFound(err)
}

// noteRegistered remembers that the Node has been there, so that a later start can tell a removed node from one that is still to
// register.
func (m *Machine) noteRegistered(processes []supervise.ProcessStatus) {
	for _, p := range processes {
		for _, c := range p.Components {
			if c.Name == node.ComponentKubelet && c.State == supervise.Ready {
				m.registered.Do(func() {
					known, err := readMembership(m.cfg)
					if err == nil && known != nil && !known.Registered {
						known.Registered = true
						err = Remember(m.cfg, *known)
					}
					if err != nil {
						m.log.Warn("what this machine knows of its cluster could not be written", "error", err)
					}
				})
			}
		}
	}
}

func (m *Machine) notPart(known *Membership, lapsed error) error {
	const how = "give --server and --token (on a server: kedge token create)"
	if known == nil {
		return errors.New("this machine is not part of a cluster yet: " + how)
	}
	return fmt.Errorf("this node's credentials do not hold any more (%w): to join again, %s", lapsed, how)
}

// errExpired is why a machine that was switched off for long cannot use its credentials.
var errExpired = errors.New("they have expired")

// checkCredentials says why the kubelet cannot use its client certificate.
func checkCredentials(file, name string) error {
	pair, err := tls.LoadX509KeyPair(file, file)
	if err != nil {
		return err
	}
	switch cert := pair.Leaf; {
	case cert.Subject.CommonName != join.UserNodePrefix+name:
		return fmt.Errorf("they are those of %s, and this node is called %s", cert.Subject.CommonName, name)
	case time.Now().After(cert.NotAfter):
		return fmt.Errorf("%w on %s, and the clock says %s", errExpired, cert.NotAfter.Format(time.DateOnly), time.Now().UTC().Format(time.DateOnly))
	}
	return nil
}

// Candidate is a machine that the cluster knows by its token: it may ask for more.
type Candidate struct {
	*join.Client
	Cluster  *join.Cluster
	Settings config.Cluster
	ClientCA []byte // PEM
}

// Join asks the cluster at --server to take this machine in, with --token, and again until then by --join-timeout: it verifies who
// answers, agrees on the settings, and calls admitted, which changes things.
func (m *Machine) Join(ctx context.Context, role join.Role, admitted func(context.Context, *Candidate) error) error {
	m.log.Info("joining", "server", m.cfg.Server, "as", role)
	start := time.Now()
	report := func(reason string) {
		m.log.Info("waiting to join", "server", m.cfg.Server, "reason", reason)
		m.Phase("waiting to join: " + reason)
	}
	// What has been got is kept for the next try: not every one shall leave a request in the cluster.
	var c *Candidate
	return join.Wait(ctx, m.cfg.JoinTimeout, report, func(ctx context.Context) error {
		if c == nil {
			found, err := m.discover(ctx, role)
			if err != nil {
				return err
			}
			c = found
		}
		if err := admitted(ctx, c); err != nil {
			return err
		}
		m.log.Info("joined", "server", m.cfg.Server, "took", time.Since(start).Round(time.Millisecond))
		return nil
	})
}

func (m *Machine) discover(ctx context.Context, role join.Role) (*Candidate, error) {
	text, err := m.cfg.TokenText()
	if err != nil {
		return nil, err
	}
	if text == "" {
		return nil, fmt.Errorf("a token is needed to join %s: give --token (on a server: kedge token create --role %s)", m.cfg.Server, role)
	}
	token, err := join.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.tokenSource(), err)
	}
	cluster, err := join.Discover(ctx, join.Target{Server: m.cfg.Server, Token: token, Role: role, Log: m.log})
	if err != nil {
		return nil, err
	}
	client, err := cluster.Client(token, nil)
	if err != nil {
		return nil, err
	}
	settings, ca, err := client.Settings(ctx)
	if err != nil {
		return nil, err
	}
	c := &Candidate{Client: client, Cluster: cluster, ClientCA: ca}
	if err := json.Unmarshal(settings, &c.Settings); err != nil {
		return nil, fmt.Errorf("the cluster's settings (ConfigMap kube-system/%s): %w", join.ConfigMapCluster, err)
	}
	return c, m.cfg.Adopt(c.Settings)
}

func (m *Machine) tokenSource() string {
	if m.cfg.TokenFile != "" {
		return m.cfg.TokenFile
	}
	return m.cfg.Given["token"]
}
