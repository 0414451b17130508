// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/google/renameio/v2"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	kubeoptions "k8s.io/kubernetes/pkg/kubeapiserver/options"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/apilb"
	"github.com/kedge-io/kedge/pkg/controlplane"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/deploy"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
	"github.com/kedge-io/kedge/pkg/version"
)

// enter decides what this server is to its cluster: one that was part of it before goes on, one that has lost its place or has none
// joins, and only one that was told of no other makes a cluster.
func (s *server) enter(ctx context.Context, known *agent.Membership) error {
	removed, err := datastore.ReadRemoved(s.etcdDir())
	switch {
	case err != nil:
		return err
	case removed != nil:
		return s.comeBack(ctx, removed)
	case s.cfg.HasEtcd() && datastore.HasMember(s.etcdDir()), !s.cfg.HasEtcd() && known != nil:
		if known == nil { // of a version that did not keep it
			return agent.Remember(s.cfg, agent.Membership{Cluster: s.cfg.Cluster})
		}
		return nil
	case s.cfg.Server != "":
		return s.join(ctx)
	case known != nil && known.Joined:
		return fmt.Errorf("this server joined a cluster, but its datastore %s is empty: to join again, give --server and --token "+
			"(on another server: kedge token create --role server); it does not make a cluster of its own", s.etcdDir())
	case s.cfg.DisableEtcd || s.cfg.DisableControl:
		return errors.New("the first server of a cluster needs both control plane and datastore: to join another one give --server and --token, " +
			"or leave out --disable-etcd and --disable-control-plane")
	}
	if err := s.checkMoved(); err != nil {
		return err
	}
	s.bootstrap = true
	return agent.Remember(s.cfg, agent.Membership{Cluster: s.cfg.Cluster})
}

// etcdDirFile notes where the datastore is when that is outside of data-dir: on another disk, which may not be mounted at a start.
func (s *server) etcdDirFile() string { return filepath.Join(s.cfg.DataDir, "etcd.dir") }

func (s *server) noteEtcdDir() error {
	if s.cfg.EtcdDataDir == "" {
		if err := os.Remove(s.etcdDirFile()); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	if noted, err := os.ReadFile(s.etcdDirFile()); err == nil && string(noted) == s.etcdDir() {
		return nil
	}
	return renameio.WriteFile(s.etcdDirFile(), []byte(s.etcdDir()), 0o600)
}

// checkMoved keeps a server from making an empty cluster because its data is somewhere else: etcd-data-dir has changed, or its disk is not
// mounted.
func (s *server) checkMoved() error {
	former := filepath.Join(s.cfg.DataDir, "etcd")
	noted, err := os.ReadFile(s.etcdDirFile())
	switch {
	case err == nil:
		former = string(noted)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	case !datastore.HasMember(former):
		return nil
	}
	now := s.etcdDir()
	if former != now {
		return fmt.Errorf("etcd-data-dir has changed: the datastore was in %s, and %s has none. Move it and start again:\n  mv %s %s.*.json %s/\n"+
			"or leave the option as it was", former, now, former, former, filepath.Dir(now))
	}
	return fmt.Errorf("the datastore was in %s, and there is none: is its disk mounted? If it is lost, see docs/backup.md; to start with an empty cluster, remove %s",
		former, s.etcdDirFile())
}

// comeBack lets a server whose member was removed from the datastore take part again. Its old data is moved aside. Where the cluster
// still counts on it (after a reset of the datastore on another server) its keys are enough; if somebody removed it, it takes a token.
func (s *server) comeBack(ctx context.Context, removed *datastore.Removal) error {
	api, err := s.readmission(ctx)
	if err != nil && s.cfg.Server == "" {
		return fmt.Errorf("this server was removed from its cluster (noticed %s), and cannot take part again by itself: %w. To join, give --server and --token "+
			"(on another server: kedge token create --role server); its old data is moved aside then, not deleted", removed.Time.Format(time.RFC3339), err)
	}
	// There is a cluster, even if this server made it: from now on its own must not come of an empty directory.
	if err := agent.Remember(s.cfg, agent.Membership{Cluster: s.cfg.Cluster, Joined: true}); err != nil {
		return err
	}
	moved, moveErr := datastore.MoveAside(s.etcdDir())
	if moveErr != nil {
		return moveErr
	}
	s.log.Warn("this server is not a member of the datastore any more: its old data has been moved aside", "noticed", removed.Time, "data", moved)
	if err != nil {
		return s.join(ctx)
	}
	report := func(reason string) {
		s.log.Info("waiting to take part again", "reason", reason)
		s.Phase("waiting to take part again: " + reason)
	}
	return join.Wait(ctx, s.cfg.JoinTimeout, report, func(ctx context.Context) error {
		s.joining, err = api.AddMember(ctx, s.cfg.NodeName, s.peerURL())
		return err
	})
}

// readmission finds a server that still has this one in its list, and returns a client of its join API with this server's own
// certificate.
func (s *server) readmission(ctx context.Context) (*join.API, error) {
	var err error
	if s.pki, err = pki.Ensure(ctx, s.pkiConfig()); err != nil {
		return nil, err
	}
	addresses, err := apilb.ReadFile(agent.BalancerFile(s.cfg))
	if err != nil {
		return nil, err
	}
	errs := []error{errors.New("no other server that is known here counts on it")}
	for _, address := range addresses {
		config := s.serverConfig(nil)
		config.Host, config.Timeout = "https://"+address, 5*time.Second
		client, err := kubernetes.NewForConfig(config)
		if err != nil {
			return nil, err
		}
		servers, err := authority.ListServers(ctx, client)
		if _, listed := servers[s.cfg.NodeName]; err == nil && listed {
			config.Timeout = 0
			return join.NewAPI(config)
		} else if err != nil {
			errs = append(errs, err)
		}
	}
	return nil, errors.Join(errs...)
}

// join gets the keys of the cluster and a place in its datastore.
func (s *server) join(ctx context.Context) error {
	var cert, key []byte
	return s.Join(ctx, join.Server, func(ctx context.Context, c *agent.Candidate) (err error) {
		if cert == nil {
			if cert, key, err = c.ServerCertificate(ctx, s.cfg.NodeName); err != nil {
				return err
			}
		}
		api, err := c.Cluster.API(cert, key, nil)
		if err != nil {
			return err
		}
		keys, err := api.Keys(ctx)
		if err != nil {
			return err
		}
		if err := pki.Import(s.cfg.PKIDir(), keys); err != nil {
			return err
		}
		if err := agent.Remember(s.cfg, agent.Membership{Cluster: c.Settings, Joined: true}); err != nil {
			return err
		}
		if s.cfg.HasEtcd() {
			s.joining, err = api.AddMember(ctx, s.cfg.NodeName, s.peerURL())
		}
		return err
	})
}

// serverConfig is how this server shows itself to the API and the join API of whichever server answers.
func (s *server) serverConfig(b *apilb.Balancer) *rest.Config {
	config := &rest.Config{
		Host:            "https://" + s.BalancerAddress(),
		TLSClientConfig: rest.TLSClientConfig{CAFile: s.pki.TrustFile(pki.ServerCA), CertFile: s.pki.CertFile(pki.ServerClient), KeyFile: s.pki.KeyFile(pki.ServerClient)},
		Timeout:         15 * time.Second,
	}
	if b != nil {
		config.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) { return b.Dial(ctx) }
	}
	return config
}

// promote asks the cluster to make this server's member a voter as soon as it has caught up. If it was removed meanwhile, watchMembership
// ends it.
func (s *server) promote(b *apilb.Balancer) func(context.Context) error {
	return func(ctx context.Context) error {
		api, err := join.NewAPI(s.serverConfig(b))
		if err != nil {
			return err
		}
		var said string
		start := time.Now()
		err = supervise.Poll(ctx, func() error {
			err := api.Promote(ctx, s.cfg.NodeName) // the name is known as soon as the member has started
			if err != nil && err.Error() != said {
				said = err.Error()
				s.log.Info("datastore member is a learner", "component", datastore.Component, "reason", err)
			}
			return err
		})
		if err == nil {
			s.log.Info("datastore member votes", "component", datastore.Component, "took", time.Since(start).Round(time.Millisecond))
		}
		return nil // a stop is the other tasks' business
	}
}

// register enters this server in the cluster's list, by which all nodes find API servers.
func (s *server) register(b *apilb.Balancer) func(context.Context) error {
	return func(ctx context.Context) error {
		client, err := kubernetes.NewForConfig(s.serverConfig(b))
		if err != nil {
			return err
		}
		_ = supervise.Poll(ctx, func() error { return s.putEntry(ctx, client) }) // ends with ctx
		return nil
	}
}

func (s *server) putEntry(ctx context.Context, client kubernetes.Interface) error {
	entry := authority.Server{Etcd: s.cfg.HasEtcd(), ControlPlane: s.cfg.HasControlPlane(), Version: version.Version, CAs: s.keys.Load().RotationState()}
	if entry.ControlPlane {
		entry.Address = net.JoinHostPort(s.cfg.AdvertiseAddress.String(), strconv.Itoa(s.cfg.HTTPSListenPort))
	}
	if entry.Etcd {
		entry.PeerURL = s.peerURL()
	}
	return authority.PutServer(ctx, client, s.cfg.NodeName, entry)
}

// watchMembership ends this server when its member was removed from the datastore: for good if it was part of the cluster in this
// run, as somebody removed it just now; for a fresh start, which joins again, if it has come back to a cluster that does not know it.
func (s *server) watchMembership(ctx context.Context) error {
	if !s.cfg.HasEtcd() {
		return nil
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.etcdChanged:
		}
		removed, err := datastore.ReadRemoved(s.etcdDir())
		if err != nil || removed == nil || s.Leaving() {
			continue
		}
		if s.voted.Load() {
			s.log.Warn("this server has been removed from the cluster and stops; pods keep running. Start it again to join afresh with a valid token; " +
				"its data is kept")
			return agent.ErrRemoved
		}
		s.log.Warn("this server is not a member of the datastore any more, starting again to take part afresh")
		return agent.ErrRestart
	}
}

// leaveCluster has another server remove this one: its own datastore member ends by it.
func (s *server) leaveCluster(b *apilb.Balancer) func(context.Context, bool, func(string)) error {
	return func(ctx context.Context, force bool, say func(string)) error {
		remover, err := s.otherServer(ctx, b)
		if err != nil {
			return fmt.Errorf("nothing was changed: %w", err)
		}
		plan, err := remover.Plan(ctx, s.cfg.NodeName)
		if err != nil {
			return fmt.Errorf("nothing was changed: %w", err)
		}
		say(plan.String())
		if plan.BreaksQuorum() && !force {
			return errors.New("nothing was changed: the datastore would lose its majority; bring the other servers back first, or use --force")
		}
		if err := remover.Remove(ctx, s.cfg.NodeName, force); apierrors.IsConflict(err) {
			return fmt.Errorf("nothing was changed: %w; --force leaves all the same", err)
		} else if err != nil {
			return err
		}
		// What the other servers have as well; what the operator has not brought into the cluster stays.
		s.LeaveFiles = append(s.LeaveFiles, deploy.Copies(deploy.Dir(s.cfg.DataDir))...)
		return nil
	}
}

// otherServer finds one that answers, with the administrator's rights.
func (s *server) otherServer(ctx context.Context, b *apilb.Balancer) (*authority.Remover, error) {
	config, err := clientcmd.BuildConfigFromFlags("", s.cfg.WriteKubeconfig)
	if err != nil {
		return nil, err
	}
	errs := []error{errors.New("no other server answers, and without one the cluster would end with this machine")}
	for _, server := range b.Servers() {
		if server.Local {
			continue
		}
		config.Host, config.Timeout = "https://"+server.Address, 5*time.Second
		client, err := kubernetes.NewForConfig(config)
		if err != nil {
			return nil, err
		}
		// The balancer may not have noticed yet that it is gone.
		if _, err := authority.ListServers(ctx, client); err != nil {
			errs = append(errs, err)
			continue
		}
		config.Timeout = 30 * time.Second
		if client, err = kubernetes.NewForConfig(config); err != nil {
			return nil, err
		}
		api, err := join.NewAPI(config)
		return &authority.Remover{Client: client, API: api}, err
	}
	return nil, errors.Join(errs...)
}

// observe follows the state of the datastore's process for watchMembership.
func (s *server) observe(processes []supervise.ProcessStatus) {
	for _, p := range processes {
		if p.Name != etcd {
			continue
		}
		if p.State == supervise.Ready && !s.voted.Swap(true) {
			if err := s.noteEtcdDir(); err != nil {
				s.log.Error("where the datastore is cannot be noted", "error", err)
			}
		}
		select {
		case s.etcdChanged <- struct{}{}:
		default:
		}
	}
}

// datastoreBalancer is the way to the other servers' datastore members for an API server without one of its own.
func (s *server) datastoreBalancer() (*apilb.Balancer, error) {
	files := datastore.TLSFiles{Cert: s.pki.CertFile(pki.EtcdPeer), Key: s.pki.KeyFile(pki.EtcdPeer), CA: s.pki.TrustFile(pki.EtcdCA)}
	probe, err := memberProbe(files)
	if err != nil {
		return nil, err
	}
	return apilb.New(apilb.Config{
		Listen:   netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), etcdClientPort).String(),
		File:     filepath.Join(s.cfg.DataDir, "datastores.json"),
		NodeName: s.cfg.NodeName,
		Probe:    probe,
		Logger:   s.log.With("component", datastore.Component),
	})
}

// memberProbe asks a datastore member on its client port whether it has a leader.
func memberProbe(files datastore.TLSFiles) (func(context.Context, string) error, error) {
	if _, err := files.ClientConfig(); err != nil {
		return nil, err
	}
	// The CAs may change while this runs: they are read for each connection.
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		config, err := files.ClientConfig()
		if err != nil {
			return nil, err
		}
		dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: time.Second}, Config: config}
		return dialer.DialContext(ctx, network, address)
	}
	client := &http.Client{Transport: &http.Transport{DialTLSContext: dial, MaxIdleConnsPerHost: 1}} // dials outlive the probe
	return func(ctx context.Context, address string) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address+"/health?serializable=true", nil)
		if err != nil {
			return err
		}
		res, err := client.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if _, err := io.Copy(io.Discard, res.Body); err != nil {
			return err
		}
		if res.StatusCode != http.StatusOK {
			return &apilb.NotReadyError{Reason: res.Status}
		}
		return nil
	}, nil
}

// reset makes this server's member the only one of the datastore.
func (s *server) reset(ctx context.Context, known *agent.Membership) error {
	if !s.cfg.HasEtcd() || known == nil && !datastore.HasMember(s.etcdDir()) {
		return fmt.Errorf("--cluster-reset: there is no data of a cluster in %s", s.etcdDir())
	}
	var err error
	if s.pki, err = pki.Ensure(ctx, s.pkiConfig()); err != nil {
		return err
	}
	// The former leader may be gone for good, and would be waited for.
	options := datastore.ResetOptions{Delete: []string{controlplane.LeaseKey(kubeoptions.DefaultEtcdPathPrefix)}}
	if err := datastore.Reset(ctx, s.etcdConfig(), options, s.log.With("component", datastore.Component)); err != nil {
		return fmt.Errorf("--cluster-reset: %w", err)
	}
	fmt.Fprintln(os.Stderr, resetDone)
	return nil
}

const resetDone = `
This server is now the only member of the datastore, with all its data. Next:
  1. start it again without --cluster-reset (systemctl start kedge)
  2. start the other servers with their ordinary command: they notice that they are not members any more, move their old data
     aside and join again. Do it when this one is ready, not before.`
