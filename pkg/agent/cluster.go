// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/renameio/v2"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/supervise"
	"github.com/kedge-io/kedge/pkg/tunnel"
)

// Membership is what a machine remembers of the cluster that it is part of, in data-dir/cluster.json.
type Membership struct {
	Cluster config.Cluster `json:"cluster"`
	// Joined says that the cluster was there before this machine: without its data it must not make one.
	Joined bool `json:"joined"`
	// Registered says that an agent's Node has been there: if it is not any more, somebody removed it.
	Registered bool `json:"registered,omitempty"`
	// Asked is what the machine's own options asked of the cluster when that was last brought into it, see [config.Config.Asks].
	Asked map[string]string `json:"asked,omitempty"`

	// Changes and Others are settings of the cluster which this start's options ask to change, and in which the cluster was changed
	// elsewhere, see [config.Config.AdoptAgain].
	Changes []string `json:"-"`
	Others  []string `json:"-"`
}

func membershipFile(cfg *config.Config) string { return filepath.Join(cfg.DataDir, "cluster.json") }

// Recall reads what an earlier start kept and makes cfg agree with it. It returns nil when the machine is not part of a cluster yet.
func Recall(cfg *config.Config) (*Membership, error) {
	known, err := readMembership(cfg)
	if known == nil || err != nil {
		return nil, err
	}
	known.Changes, known.Others, err = cfg.AdoptAgain(known.Cluster, known.Asked)
	if errors.Is(err, config.ErrIncomplete) {
		return nil, damaged(membershipFile(cfg), err)
	} else if err != nil {
		return nil, err
	}
	return known, nil
}

func readMembership(cfg *config.Config) (*Membership, error) {
	file := membershipFile(cfg)
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var known Membership
	if err := json.Unmarshal(b, &known); err != nil {
		return nil, damaged(file, err)
	}
	return &known, nil
}

// Follow keeps the cluster's settings as they are now, and that they have what this machine's options ask for.
func Follow(cfg *config.Config, c config.Cluster) error {
	known, err := readMembership(cfg)
	if err != nil || known == nil { // left meanwhile
		return err
	}
	asks := cfg.Asks()
	if len(known.Cluster.Changed(c)) == 0 && maps.Equal(asks, known.Asked) {
		return nil
	}
	known.Cluster.Change(c, known.Cluster.Changed(c))
	known.Asked = asks
	return Remember(cfg, *known)
}

func damaged(file string, err error) error {
	return fmt.Errorf("%s is damaged: %w; take it from another node of the cluster, it is the same everywhere, but for \"joined\" and \"registered\"", file, err)
}

// Remember keeps it for later starts. Without Asked it is what the options ask for now.
func Remember(cfg *config.Config, known Membership) error {
	if known.Asked == nil {
		known.Asked = cfg.Asks()
	}
	b, err := json.MarshalIndent(known, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.DataDir, 0o711); err != nil {
		return err
	}
	return renameio.WriteFile(membershipFile(cfg), append(b, '\n'), 0o600)
}

// Client speaks to whichever API server the load balancer finds, as this node.
func (m *Machine) Client() (kubernetes.Interface, error) {
	rest, err := clientcmd.BuildConfigFromFlags("", m.Credentials.Kubeconfig)
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(rest)
}

// watchServers follows the cluster's list of servers: for the load balancer, the tunnels and OnServers.
func (m *Machine) watchServers(ctx context.Context) {
	client, err := m.Client()
	if err != nil {
		m.log.Error("the list of API servers stays as it is", "component", "load-balancer", "error", err)
		return
	}
	// On a cluster's first start the API is there before the rule that lets nodes read the list, and a watch that is refused is an error in
	// the log.
	if supervise.Poll(ctx, func() error { _, err := authority.ListServers(ctx, client); return err }) != nil {
		return
	}
	authority.WatchRegistry(ctx, client, func(servers map[string]authority.Server, err error) {
		if err != nil {
			m.log.Warn("the cluster's list of servers is damaged in part", "component", "load-balancer", "error", err)
		}
		var addresses, others []string
		for name, s := range servers {
			if s.Address == "" {
				continue
			}
			addresses = append(addresses, s.Address)
			if name != m.cfg.NodeName {
				others = append(others, s.Address)
			}
		}
		if m.cfg.HasControlPlane() {
			addresses = others // its own it knows by another address
		}
		if err := m.balancer.SetServers(addresses); err != nil {
			m.log.Warn("the list of API servers could not be kept for the next start", "component", "load-balancer", "error", err)
		}
		if m.tunnel != nil {
			m.tunnel.SetServers(others)
		}
		if m.OnServers != nil {
			m.OnServers(servers)
		}
	}, func(r *authority.Rotation, err error) {
		if err != nil {
			m.log.Error("the change of the CAs is not followed", "error", err)
		} else if r != nil && m.OnRotation != nil {
			m.OnRotation(r)
		}
	})
}

// hostPort says whether a pod in this node's own network declares a port. It is asked for few connections, so it asks each time.
func (m *Machine) hostPort(port uint16) bool {
	client, err := m.Client()
	if err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	own := fields.OneTermEqualSelector("spec.nodeName", m.cfg.NodeName).String() // the only pods that a node may list as such
	pods, err := client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{FieldSelector: own, ResourceVersion: "0"})
	if err != nil {
		m.log.Warn("whether a pod has the port that an API server wants to reach is not known", "component", "tunnel", "port", port, "error", err)
		return false
	}
	declares := func(c corev1.Container) bool {
		return slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.ContainerPort == int32(port) })
	}
	return slices.ContainsFunc(pods.Items, func(p corev1.Pod) bool { return p.Spec.HostNetwork && slices.ContainsFunc(p.Spec.Containers, declares) })
}

// newTunnel lets API servers that cannot connect to this node reach its kubelet and its pods.
func (m *Machine) newTunnel() *tunnel.Client {
	policy := tunnel.Policy{Pods: func() []netip.Prefix { return m.cfg.ClusterCIDR }, HostPort: m.hostPort}
	return tunnel.NewClient(tunnel.ClientConfig{TLS: m.tlsConfig, Allow: policy.Allow, Socket: QuerySocket(m.cfg.RunDir), Log: m.log})
}
