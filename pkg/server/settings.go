// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/apilb"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// cluster is the cluster's settings as they are known now.
func (s *server) cluster() config.Cluster {
	if c := s.settings.Load(); c != nil {
		return *c
	}
	return s.cfg.Cluster
}

// followCluster brings into the cluster what this server's options ask to change of its settings, and follows what others change.
func (s *server) followCluster(b *apilb.Balancer, known *agent.Membership) func(context.Context) error {
	var changes []string
	if known != nil {
		changes = known.Changes
		for _, name := range known.Others {
			s.log.Warn("the cluster's setting was changed by another server since this one's option was new: goes by the cluster; leave the option out, or set it to the cluster's value",
				"option", s.cfg.Given[name], "cluster", known.Cluster.Setting(name))
		}
	}
	return func(ctx context.Context) error {
		client, err := kubernetes.NewForConfig(s.serverConfig(b))
		if err != nil {
			return err
		}
		said := ""
		err = supervise.Poll(ctx, func() error {
			// On a cluster's first start the API is there before the rule that lets servers read them, and a watch that is refused is an error in
			// the log.
			if _, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, join.ConfigMapCluster, metav1.GetOptions{}); err != nil {
				return err
			}
			err := changeSettings(ctx, client, s.cfg.Cluster, changes)
			if err != nil && err.Error() != said && ctx.Err() == nil {
				said = err.Error()
				s.log.Debug("the cluster's settings cannot be changed yet", "error", err)
			}
			return err
		})
		if err != nil {
			return nil // the server is stopping
		}
		if len(changes) > 0 {
			s.log.Info("changed settings of the cluster", "settings", changes)
		}
		authority.WatchSettings(ctx, client, func(settings []byte) {
			// Not into a copy of what is known: the lists in that are shared, and would be written over.
			var c config.Cluster
			if err := json.Unmarshal(settings, &c); err != nil {
				s.log.Warn("the cluster's settings (ConfigMap kube-system/"+join.ConfigMapCluster+") are damaged", "error", err)
				return
			}
			s.takeSettings(c)
		})
		return nil
	}
}

// takeSettings makes this server go by settings that were changed.
func (s *server) takeSettings(c config.Cluster) {
	now := s.cluster()
	changed := now.Changed(c)
	now.Change(c, changed)
	if err := agent.Follow(s.cfg, now); err != nil {
		s.log.Warn("the cluster's settings could not be kept for the next start", "error", err)
	}
	if len(changed) == 0 {
		return
	}
	s.settings.Store(&now)
	s.log.Info("the cluster's settings have changed", "settings", changed)
	if slices.Contains(changed, "api-vip") {
		select {
		case s.renamed <- struct{}{}:
		default:
		}
	}
}

// changeSettings writes some of the settings of c into the cluster's.
func changeSettings(ctx context.Context, client kubernetes.Interface, c config.Cluster, names []string) error {
	if len(names) == 0 {
		return nil
	}
	maps := client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	cm, err := maps.Get(ctx, join.ConfigMapCluster, metav1.GetOptions{})
	if err != nil {
		return err
	}
	var have config.Cluster
	if err := json.Unmarshal([]byte(cm.Data[join.KeyCluster]), &have); err != nil {
		return fmt.Errorf("ConfigMap kube-system/%s: %w", join.ConfigMapCluster, err)
	}
	if differ := have.Changed(c); !slices.ContainsFunc(names, func(name string) bool { return slices.Contains(differ, name) }) {
		return nil
	}
	have.Change(c, names)
	settings, err := json.Marshal(have)
	if err != nil {
		return err
	}
	cm.Data[join.KeyCluster] = string(settings)
	_, err = maps.Update(ctx, cm, metav1.UpdateOptions{FieldManager: "kedge-server"}) // fails if somebody else was faster
	return err
}

// keepKeys renews certificates, and issues the API server's anew when the API has got another floating address; it reloads that by itself.
func (s *server) keepKeys(ctx context.Context) error {
	for {
		running, stop := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() { ended <- s.keys.Load().Run(running) }()
		select {
		case <-s.renamed:
		case <-ctx.Done():
		}
		stop()
		if err := <-ended; err != nil || ctx.Err() != nil {
			return err
		}
		keys, err := pki.Ensure(ctx, s.pkiConfig())
		if err != nil {
			s.log.Error("the API server's certificate does not have the floating address until the next start", "error", err)
			continue
		}
		s.keys.Store(keys)
	}
}
