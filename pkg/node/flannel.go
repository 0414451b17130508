// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/flannel-io/flannel/pkg/backend"
	_ "github.com/flannel-io/flannel/pkg/backend/hostgw" // registers itself
	_ "github.com/flannel-io/flannel/pkg/backend/vxlan"  // registers itself
	"github.com/flannel-io/flannel/pkg/ip"
	"github.com/flannel-io/flannel/pkg/ipmatch"
	"github.com/flannel-io/flannel/pkg/subnet/kube"
	"github.com/flannel-io/flannel/pkg/trafficmngr"
	"github.com/flannel-io/flannel/pkg/trafficmngr/iptables"
	"github.com/flannel-io/flannel/pkg/trafficmngr/nftables"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/supervise"
)

const flannelAnnotations = "flannel.alpha.coreos.com"

// runFlannel leases this node's subnet, sets up the overlay and, when services and DNS work too, writes the CNI
// configuration: its presence is what the kubelet calls a ready network. It blocks until ctx ends.
func (n *node) runFlannel(ctx context.Context, client kubernetes.Interface, proxyReady <-chan struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	n.child.Report(ComponentFlannel, supervise.Running, "reading the nodes")
	netConf := filepath.Join(n.cfg.RunDir, "flannel.json")
	if err := writeNetConf(netConf, n.cfg); err != nil {
		return err
	}
	// The subnet manager takes the node's name from the environment only.
	if err := os.Setenv("NODE_NAME", n.cfg.Name); err != nil {
		return err
	}
	manager, err := kube.NewSubnetManager(ctx, "", n.cfg.Kubeconfig, flannelAnnotations, netConf, false)
	if err != nil {
		return err
	}
	n.child.Report(ComponentFlannel, supervise.Waiting, "for the controller manager to give this node a pod CIDR")
	node, err := n.waitForNode(ctx, client, func(node *corev1.Node) bool { return node.Spec.PodCIDR != "" })
	if err != nil {
		return err
	}
	n.child.Report(ComponentFlannel, supervise.Running, "setting up "+string(n.cfg.Backend))
	conf, err := manager.GetNetworkConfig(ctx)
	if err != nil {
		return err
	}
	family, err := ipmatch.GetIPFamily(conf.EnableIPv4, conf.EnableIPv6)
	if err != nil {
		return err
	}
	iface, public := n.cfg.Iface, ipmatch.PublicIPOpts{}
	if iface == "" {
		addresses := slices.SortedFunc(slices.Values(n.cfg.Address), netip.Addr.Compare) // IPv4 first
		iface = addresses[0].String()
		if conf.EnableIPv4 && conf.EnableIPv6 {
			public.PublicIPv6 = addresses[1].String()
		}
	}
	external, err := ipmatch.LookupExtIface(iface, "", "", family, public)
	if err != nil {
		return fmt.Errorf("no interface %s for the pod network (--flannel-iface, --node-ip): %w", iface, err)
	}
	be, err := backend.NewManager(ctx, manager, external).GetBackend(conf.BackendType)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	network, err := be.RegisterNetwork(ctx, &wg, conf)
	if err != nil {
		return err
	}
	if n.cfg.Backend == config.FlannelVXLAN {
		if err := disableTxChecksum("flannel.1"); err != nil {
			n.log.Warn("checksum offload stays on: some network cards then drop packets between nodes", "component", ComponentFlannel, "error", err)
		}
	}
	var rules trafficmngr.TrafficManager = &nftables.NFTablesManager{}
	if n.cfg.ProxyMode == config.ProxyIPTables {
		rules = &iptables.IPTablesManager{}
	}
	if err := rules.Init(ctx); err != nil {
		return err
	}
	const resync = 60 // seconds
	if err := rules.SetupAndEnsureMasqRules(ctx, conf.Network, ip.IP4Net{}, ip.IP4Net{}, conf.IPv6Network, ip.IP6Net{}, ip.IP6Net{}, network.Lease(), resync, false); err != nil {
		return err
	}
	rules.SetupAndEnsureForwardRules(ctx, conf.Network, conf.IPv6Network, resync)
	running := make(chan struct{})
	go func() { defer close(running); network.Run(ctx) }()

	var podCIDRs config.Prefixes
	if err := podCIDRs.UnmarshalText([]byte(strings.Join(node.Spec.PodCIDRs, ","))); err != nil {
		return err
	}
	n.child.Report(ComponentFlannel, supervise.Waiting, "for the first service rules of kube-proxy")
	select {
	case <-proxyReady:
	case <-ctx.Done():
		return nil
	}
	if err := writeConflist(n.cfg, podCIDRs, network.MTU()); err != nil {
		return err
	}
	n.child.Report(ComponentFlannel, supervise.Ready, fmt.Sprintf("%s, pods %s", n.cfg.Backend, podCIDRs))
	<-running
	return nil
}

func writeNetConf(file string, cfg Config) error {
	conf := map[string]any{
		"EnableIPv4":     false, // true if it is left out
		"EnableNFTables": cfg.ProxyMode != config.ProxyIPTables,
		"Backend":        map[string]string{"Type": string(cfg.Backend)},
	}
	for _, p := range cfg.ClusterCIDR {
		if p.Addr().Is6() {
			conf["IPv6Network"], conf["EnableIPv6"] = p, true
		} else {
			conf["Network"], conf["EnableIPv4"] = p, true
		}
	}
	b, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o600)
}
