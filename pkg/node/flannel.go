// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/flannel-io/flannel/pkg/backend"
	_ "github.com/flannel-io/flannel/pkg/backend/hostgw"    // registers itself
	_ "github.com/flannel-io/flannel/pkg/backend/vxlan"     // registers itself
	_ "github.com/flannel-io/flannel/pkg/backend/wireguard" // registers itself
	"github.com/flannel-io/flannel/pkg/ip"
	"github.com/flannel-io/flannel/pkg/lease"
	"github.com/flannel-io/flannel/pkg/subnet"
	"github.com/flannel-io/flannel/pkg/trafficmngr"
	"github.com/flannel-io/flannel/pkg/trafficmngr/iptables"
	"github.com/flannel-io/flannel/pkg/trafficmngr/nftables"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/kedge-io/kedge/pkg/check"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// runFlannel leases this node's subnet, sets up the overlay and, when services and DNS work too, writes the CNI
// configuration: its presence is what the kubelet calls a ready network. It blocks until ctx ends.
func (n *node) runFlannel(ctx context.Context, client kubernetes.Interface, proxyReady <-chan struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conf := flannelConfig(n.cfg)
	if err := n.checkFlannel(); err != nil {
		return err
	}
	n.child.Report(ComponentFlannel, supervise.Waiting, "for the controller manager to give this node a pod CIDR")
	node, err := n.waitForNode(ctx, client, func(node *corev1.Node) bool { return node.Spec.PodCIDR != "" })
	if err != nil {
		return err
	}
	var podCIDRs config.Prefixes
	if err := podCIDRs.UnmarshalText([]byte(strings.Join(node.Spec.PodCIDRs, ","))); err != nil {
		return err
	}
	n.child.Report(ComponentFlannel, supervise.Running, "setting up "+string(n.cfg.Backend))
	var public []netip.Addr
	if n.cfg.FlannelExternalIP {
		public = n.cfg.ExternalAddress
	}
	leases, err := newLeases(ctx, client, node, conf, public)
	if err != nil {
		return err
	}
	network, mtu, used, err := n.overlay(ctx, conf, leases)
	if err != nil {
		return err
	}
	running := make(chan struct{})
	go func() { defer close(running); network.Run(ctx) }()
	defer func() {
		cancel()
		select {
		case <-running:
		case <-time.After(5 * time.Second): // the backend for WireGuard may wait for itself, with a node's change in its hands
		}
	}()
	// Not before: until the other nodes are in a WireGuard device that was made anew, packets get lost.
	if err := n.podRules(ctx, conf, network.Lease()); err != nil {
		return err
	}
	n.child.Report(ComponentFlannel, supervise.Waiting, "for the first service rules of kube-proxy")
	select {
	case <-proxyReady:
	case <-ctx.Done():
		return nil
	}
	if n.policy != nil {
		n.child.Report(ComponentFlannel, supervise.Waiting, "for the rules of network policies")
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return watchLinks(ctx, used) })
	group.Go(func() error {
		select {
		case <-running:
			return errors.New("ended by itself")
		case <-ctx.Done():
			return nil
		}
	})
	group.Go(func() error {
		return n.publishNetwork(ctx, node, func() error { return writeConflist(n.cfg, podCIDRs, mtu) }, func() {
			n.child.Report(ComponentFlannel, supervise.Ready, fmt.Sprintf("%s, pods %s", n.cfg.Backend, podCIDRs))
		})
	})
	return group.Wait()
}

// leaveFlannel removes what flannel has left if it ran here since the machine booted: its CNI configuration says so. Where it did not
// run, devices of the same names are those of a flannel that the operator runs.
func leaveFlannel(cfg Config) error {
	if _, err := os.Stat(conflistFile(cfg)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return errors.Join(
		removeDevices(nil),
		pruneRoutes(cfg.ClusterCIDR, nil),
		removeTables([]string{"flannel-ipv4", "flannel-ipv6"}),
		os.Remove(conflistFile(cfg)),
	)
}

// checkFlannel refuses what cannot work, in words that flannel does not have.
func (n *node) checkFlannel() error {
	switch {
	case n.cfg.Backend == config.FlannelHostGW && n.cfg.FlannelExternalIP:
		return errors.New("--flannel-external-ip does not go with flannel-backend host-gw, which needs all nodes in one network: " +
			"leave the option out, or make the cluster with vxlan or wireguard-native")
	case n.cfg.Backend == config.FlannelWireGuard:
		if err := check.WireGuard(); err != nil {
			return fmt.Errorf("flannel-backend wireguard-native: %w: load the module wireguard (Linux 5.6 and later have it), "+
				"or make the cluster with another backend", err)
		}
	}
	return nil
}

// overlay makes what packets to other nodes go through, and takes away what is left of other backends and of nodes that are gone.
// mtu is the pods', used are the interfaces that all of it depends on.
func (n *node) overlay(ctx context.Context, conf *subnet.Config, leases *leases) (network backend.Network, mtu int, used map[string]linkState, err error) {
	ext, err := externalInterface(n.cfg)
	if err != nil {
		return nil, 0, nil, err
	}
	own := devices(n.cfg.Backend, n.cfg.ClusterCIDR)
	if err := removeDevices(own); err != nil {
		return nil, 0, nil, err
	}
	if err := os.Setenv("WIREGUARD_KEY_FILE", wireguardKey(n.cfg.RunDir)); err != nil { // flannel has no other way
		return nil, 0, nil, err
	}
	be, err := backend.NewManager(ctx, leases, ext).GetBackend(conf.BackendType)
	if err != nil {
		return nil, 0, nil, err
	}
	// The backend for WireGuard removes its devices when its context ends. Pods keep running then, so their network has to.
	network, err = be.RegisterNetwork(context.WithoutCancel(ctx), &sync.WaitGroup{}, conf)
	if err != nil {
		return nil, 0, nil, err
	}
	if mtu, err = tuneDevices(own, ext.Iface.MTU); err != nil {
		return nil, 0, nil, err
	}
	if n.cfg.Backend == config.FlannelVXLAN {
		for device := range own {
			if err := setTxChecksum(device, n.cfg.TxOffload); err != nil {
				n.log.Warn("checksum offload stays as it is: with it on, some network cards drop packets between nodes", "component", ComponentFlannel, "device", device, "error", err)
			}
		}
	}
	if err := prune(n.cfg.Backend, n.cfg.ClusterCIDR, ext, leases.others()); err != nil {
		n.log.Warn("traces of nodes that are gone could not be removed", "component", ComponentFlannel, "error", err)
	}
	used, err = links(append(slices.Collect(maps.Keys(own)), ext.IfaceName)...)
	return network, mtu, used, err
}

// podRules lets the packets of pods through, and gives those that leave the cluster the node's address.
func (n *node) podRules(ctx context.Context, conf *subnet.Config, own *lease.Lease) error {
	var rules trafficmngr.TrafficManager = &nftables.NFTablesManager{}
	if !conf.EnableNFTables {
		rules = &iptables.IPTablesManager{}
	}
	if err := rules.Init(ctx); err != nil {
		return err
	}
	const resync = 60 // seconds
	// With what is there now named as what was there before, nothing is looked for to be taken away: switchMode has done it.
	if err := rules.SetupAndEnsureMasqRules(ctx, conf.Network, own.Subnet, conf.Network, conf.IPv6Network, own.IPv6Subnet, conf.IPv6Network, own, resync, false); err != nil {
		return err
	}
	rules.SetupAndEnsureForwardRules(ctx, conf.Network, conf.IPv6Network, resync)
	return nil
}

// wireguardKey is where flannel keeps this node's key. A new one after a reboot does no harm: it tells the other nodes.
func wireguardKey(runDir string) string { return filepath.Join(runDir, "wireguard.key") }

// flannelConfig is the cluster's part of flannel's configuration.
func flannelConfig(cfg Config) *subnet.Config {
	conf := &subnet.Config{EnableNFTables: cfg.ProxyMode != config.ProxyIPTables, BackendType: string(cfg.Backend)}
	if cfg.Backend == config.FlannelWireGuard {
		conf.BackendType = "wireguard" // flannel's name for it
		// A node whose device is made anew opens the tunnels itself then: the others would notice after 15 seconds only.
		conf.Backend = json.RawMessage(`{"PersistentKeepaliveInterval": 25}`)
	}
	for _, p := range cfg.ClusterCIDR {
		n := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
		if p.Addr().Is6() {
			conf.EnableIPv6, conf.IPv6Network = true, ip.FromIP6Net(n)
		} else {
			conf.EnableIPv4, conf.Network = true, ip.FromIPNet(n)
		}
	}
	return conf
}
