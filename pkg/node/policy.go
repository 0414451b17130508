// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/kedge-io/kedge/pkg/netpolicy"
	"github.com/kedge-io/kedge/pkg/supervise"
)

func (c Config) policySocket() string { return PolicySocket(c.RunDir) }
func (c Config) policyDir() string    { return filepath.Join(c.RunDir, netpolicy.DirName) }

// PolicySocket is where the node process of a machine with that run directory answers questions about its network policies.
func PolicySocket(runDir string) string { return filepath.Join(runDir, netpolicy.SocketName) }

// runPolicy enforces network policies until ctx ends.
func (n *node) runPolicy(ctx context.Context) error {
	// Without its rights, which come a moment after the API on a cluster's first start, it would pause before it tries again.
	n.child.Report(ComponentPolicy, supervise.Waiting, "for the API")
	if err := supervise.Poll(ctx, func() error {
		_, err := n.client.NetworkingV1().NetworkPolicies(metav1.NamespaceAll).List(ctx, metav1.ListOptions{Limit: 1, ResourceVersion: "0"})
		return err
	}); err != nil {
		return nil // the process is stopping
	}
	go n.watch(ctx, ComponentPolicy, "", n.policy.Ready)
	return n.keep(ctx, ComponentPolicy, n.policy.Run)
}

func (n *node) policyConfig() netpolicy.Config {
	c := n.cfg
	return netpolicy.Config{
		NodeName: c.Name, Client: n.client, ClusterCIDRs: c.ClusterCIDR, ClusterDNS: []netip.Addr{c.ClusterDNS},
		Socket: c.policySocket(), Dir: c.policyDir(),
	}
}

const (
	// policyGrace is how long policies may not be enforced until the node is not ready for new pods any more. The rules that were
	// loaded stay in place, and no pod starts without its own.
	policyGrace = 10 * time.Second
	// reasonPolicy is why the network is not available, in the Node's condition of that name.
	reasonPolicy = "NetworkPolicyNotEnforced"
)

// publishNetwork keeps the CNI configuration, whose presence is what the kubelet calls a ready network, in place for as long as
// network policies are enforced, until ctx ends. Where they are not, the Node says why.
func (n *node) publishNetwork(ctx context.Context, node *corev1.Node, write func() error, ready func()) error {
	published := false
	said := slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeNetworkUnavailable && c.Reason == reasonPolicy && c.Status == corev1.ConditionTrue
	})
	var since time.Time // policies are not enforced
	interval := 20 * time.Millisecond
	for {
		var err error
		if n.policy != nil {
			err = n.policy.Ready()
		}
		switch {
		case err == nil:
			since = time.Time{}
			if !published {
				if err := write(); err != nil {
					return err
				}
				published = true
				ready()
			}
			if said && n.sayNetwork(ctx, nil) == nil {
				said = false
			}
		case since.IsZero():
			since = time.Now()
		case time.Since(since) > policyGrace:
			if published {
				if err := removeConflist(n.cfg); err != nil {
					return err
				}
				published = false
			}
			n.child.Report(ComponentFlannel, supervise.Waiting, "with the CNI configuration until network policies are enforced")
			if !said {
				said = n.sayNetwork(ctx, err) == nil
			}
		}
		if published {
			interval = 3 * time.Second
		} else {
			interval = min(interval*5/4, time.Second)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(interval):
		}
	}
}

func removeConflist(cfg Config) error {
	if err := os.Remove(conflistFile(cfg)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// sayNetwork sets the Node's condition.
func (n *node) sayNetwork(ctx context.Context, problem error) error {
	c := corev1.NodeCondition{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse, Reason: "NetworkPolicyEnforced",
		Message: "network policies are enforced", LastTransitionTime: metav1.Now(), LastHeartbeatTime: metav1.Now()}
	if problem != nil {
		c.Status, c.Reason, c.Message = corev1.ConditionTrue, reasonPolicy, fmt.Sprintf("no new pods: %v", problem)
	}
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{c}}})
	if err == nil {
		_, err = n.client.CoreV1().Nodes().Patch(ctx, n.cfg.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	}
	if err != nil {
		n.log.Warn("the Node's condition could not be set", "component", ComponentPolicy, "error", err)
	}
	return err
}
