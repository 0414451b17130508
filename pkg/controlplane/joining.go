// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"slices"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/helm"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/servicelb"
	"github.com/kedge-io/kedge/pkg/supervise"
	"github.com/kedge-io/kedge/pkg/tunnel"
)

// openDatastore makes the client by which this process changes the datastore's membership; the API server has its own. An etcd that is
// not Kedge's is the operator's business.
func (p *plane) openDatastore() error {
	if !p.cfg.Datastore.Own {
		return nil
	}
	tls, err := p.cfg.Datastore.Peer.ClientConfig()
	if err != nil {
		return err
	}
	p.members, err = datastore.NewMembers(p.cfg.Datastore.Endpoints[0], tls)
	return err
}

// datastoreAnswers tells whether a majority stands behind the datastore. An API server that starts before fails in its post-start hooks.
func (p *plane) datastoreAnswers(ctx context.Context) error {
	if p.members == nil {
		d := p.cfg.Datastore
		err := datastore.Healthy(ctx, d.Endpoints, datastore.TLSFiles{CA: d.CAFile, Cert: d.CertFile, Key: d.KeyFile})
		if err != nil && ctx.Err() == nil {
			p.child.Report(ComponentAPIServer, supervise.Waiting, "for the datastore: "+err.Error())
		}
		return err
	}
	_, err := p.members.List(ctx)
	return err
}

// serveEgress makes the API server's way to kubelets and pods.
func (p *plane) serveEgress(ctx context.Context, group *errgroup.Group) error {
	p.tunnel = tunnel.NewServer(tunnel.ServerConfig{Mode: tunnel.Mode(p.cfg.Egress), Nodes: p.nodes.Lister(),
		NodeName: p.cfg.NodeName, Socket: p.cfg.QuerySocket, Log: p.log})
	if p.cfg.Egress == config.EgressDirect {
		return nil
	}
	if err := os.WriteFile(p.cfg.egressFile(), tunnel.EgressConfig(p.cfg.egressSocket()), 0o600); err != nil {
		return err
	}
	group.Go(func() error { return p.tunnel.ServeEgress(ctx, p.cfg.egressSocket()) })
	return nil
}

// joinPrefix is above all paths of the join API.
const joinPrefix = "/kedge/v1/"

// joinAPI hands out what joining servers need.
func (p *plane) joinAPI() http.Handler {
	cfg := authority.Config{
		Files:        p.cfg.Files.Shared,
		ClientCA:     p.cfg.Files.TrustedClientCA,
		IssuingCA:    p.cfg.Files.ClientCA,
		IssuingCAKey: p.cfg.Files.ClientCAKey,
		Client:       p.client,
		BeforeJoin: func(ctx context.Context, _ string) error {
			return p.leadership.shared(ctx, p.alone.Load())
		},
		Logger: p.log,
	}
	if p.members != nil {
		cfg.Members = p.members
	}
	return authority.NewHandler(cfg)
}

// runControllers starts Kedge's own controllers, which run where the leadership is.
func (p *plane) runControllers(ctx context.Context, group *errgroup.Group, clientConfig *rest.Config) {
	approver := authority.NewApprover(authority.ApproverConfig{
		Client:        p.client,
		Networks:      slices.Concat(p.cfg.Cluster.ClusterCIDR, p.cfg.Cluster.ServiceCIDR),
		ReservedNames: []string{"kubernetes.default.svc." + p.cfg.Cluster.ClusterDomain},
		Logger:        p.log,
	})
	group.Go(func() error { return approver.Run(ctx) })
	group.Go(func() error { p.keepRoles(ctx); return nil })
	rotator := authority.Rotator{Client: p.client, Logger: p.log.With("component", "pki")}
	group.Go(func() error { return rotator.Run(ctx) })
	if p.members != nil {
		nodes := authority.NewNodeController(p.client, p.members, p.log)
		group.Go(func() error { return nodes.Run(ctx) })
		group.Go(func() error { p.members.Tend(ctx, p.log.With("component", datastore.Component)); return nil })
	}
	if !slices.Contains(p.cfg.Cluster.Disable, config.ComponentHelm) {
		charts := helm.NewController(helm.ControllerConfig{Client: p.client, REST: clientConfig, Kubeconfig: p.cfg.Files.Kubeconfig,
			ChartsDir: p.cfg.ChartsDir, RunDir: p.cfg.RunDir, Log: p.log})
		group.Go(func() error { return charts.Run(ctx) })
	}
	if !slices.Contains(p.cfg.Cluster.Disable, config.ComponentServiceLB) {
		lb := servicelb.NewController(servicelb.ControllerConfig{
			Client: p.client, Pool: func() servicelb.Pool { return p.cluster().ServiceLBPool }, PoolChanged: p.poolChanged,
			APIPort: p.cfg.Port, BalancerPort: p.cfg.BalancerPort,
		}, p.log)
		group.Go(func() error { return lb.Run(ctx) })
	}
}

// keepTokens makes known what lets machines in: the settings that they have to share, and the tokens that the operator chose.
func (p *plane) keepTokens(ctx context.Context) {
	say := ""
	_ = supervise.Poll(ctx, func() error { // ends with ctx
		err := p.publishCluster(ctx)
		for _, t := range p.cfg.Tokens {
			if err == nil {
				err = p.putToken(ctx, t)
			}
		}
		if err != nil && err.Error() != say && ctx.Err() == nil {
			say = err.Error()
			p.log.Debug("machines cannot join yet", "component", "join", "error", err)
		}
		return err
	})
}

// publishCluster writes the settings once: they are those of the first server. The CAs of clients follow a change.
func (p *plane) publishCluster(ctx context.Context) error {
	settings, err := json.Marshal(p.cfg.Cluster)
	if err != nil {
		return err
	}
	ca, err := os.ReadFile(p.cfg.Files.TrustedClientCA)
	if err != nil {
		return err
	}
	_, err = p.client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: join.ConfigMapCluster, Namespace: metav1.NamespaceSystem},
		Data:       map[string]string{join.KeyCluster: string(settings), join.KeyClientCA: string(ca)},
	}, metav1.CreateOptions{FieldManager: fieldManager})
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	have, err := p.client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, join.ConfigMapCluster, metav1.GetOptions{})
	if err != nil || have.Data[join.KeyClientCA] == string(ca) {
		return err
	}
	have = have.DeepCopy() // the CAs have changed
	if have.Data == nil {
		have.Data = map[string]string{}
	}
	have.Data[join.KeyClientCA] = string(ca)
	_, err = p.client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Update(ctx, have, metav1.UpdateOptions{FieldManager: fieldManager})
	return err
}

func (p *plane) putToken(ctx context.Context, t OperatorToken) error {
	secret := join.Token{ID: t.ID, Secret: t.Secret, Derived: true}.Object(t.Role, 0, fmt.Sprintf("the operator's own, from the configuration of server %s", p.cfg.NodeName))
	secrets := p.client.CoreV1().Secrets(secret.Namespace)
	_, err := secrets.Create(ctx, secret, metav1.CreateOptions{FieldManager: fieldManager})
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	have, err := secrets.Get(ctx, secret.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	// An agents' token that became the servers' in the configuration, or the other way round. Without a difference nothing is written.
	if old, err := join.FromSecret(have); err == nil && old.Role == t.Role && old.Token.Secret == t.Secret {
		return nil
	}
	secret.ResourceVersion = have.ResourceVersion
	_, err = secrets.Update(ctx, secret, metav1.UpdateOptions{FieldManager: fieldManager})
	return err
}
