// SPDX-License-Identifier: Apache-2.0

// Command flanneld is flannel's daemon for the stock side of the benchmark: the Kubernetes subnet manager and the VXLAN
// backend, which is what flannel's own main runs in a cluster. That main cannot be linked here: it contains backends for
// clouds whose SDKs are not in this module.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"

	"github.com/flannel-io/flannel/pkg/backend"         //policy:allow imports a program of the benchmark, not part of Kedge
	_ "github.com/flannel-io/flannel/pkg/backend/vxlan" //policy:allow imports a program of the benchmark, not part of Kedge
	"github.com/flannel-io/flannel/pkg/ip"              //policy:allow imports a program of the benchmark, not part of Kedge
	"github.com/flannel-io/flannel/pkg/ipmatch"         //policy:allow imports a program of the benchmark, not part of Kedge
	"github.com/flannel-io/flannel/pkg/subnet/kube"     //policy:allow imports a program of the benchmark, not part of Kedge
	//policy:allow imports a program of the benchmark, not part of Kedge
	"github.com/flannel-io/flannel/pkg/trafficmngr/nftables"
	"golang.org/x/sys/unix"
)

func main() {
	kubeconfig := flag.String("kubeconfig", "", "kubeconfig `file`")
	netConf := flag.String("net-conf", "/etc/kube-flannel/net-conf.json", "network configuration `file`")
	iface := flag.String("iface", "", "network interface of the node")
	subnetFile := flag.String("subnet-file", "/run/flannel/subnet.env", "`file` to write for the CNI plugin")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if err := run(ctx, *kubeconfig, *netConf, *iface, *subnetFile); err != nil {
		slog.Error("flanneld ends", "error", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, kubeconfig, netConf, iface, subnetFile string) error {
	manager, err := kube.NewSubnetManager(ctx, "", kubeconfig, "flannel.alpha.coreos.com", netConf, false)
	if err != nil {
		return fmt.Errorf("subnet manager: %w", err)
	}
	conf, err := manager.GetNetworkConfig(ctx)
	if err != nil {
		return fmt.Errorf("network configuration: %w", err)
	}
	family, err := ipmatch.GetIPFamily(conf.EnableIPv4, conf.EnableIPv6)
	if err != nil {
		return err
	}
	ext, err := ipmatch.LookupExtIface(iface, "", "", family, ipmatch.PublicIPOpts{})
	if err != nil {
		return fmt.Errorf("interface %s: %w", iface, err)
	}
	be, err := backend.NewManager(ctx, manager, ext).GetBackend(conf.BackendType)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	network, err := be.RegisterNetwork(ctx, &wg, conf)
	if err != nil {
		return fmt.Errorf("register the network: %w", err)
	}
	traffic := &nftables.NFTablesManager{}
	if err := traffic.Init(ctx); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	lease := network.Lease()
	err = traffic.SetupAndEnsureMasqRules(ctx, conf.Network, ip.IP4Net{}, ip.IP4Net{}, conf.IPv6Network, ip.IP6Net{}, ip.IP6Net{}, lease, 60, false)
	if err != nil {
		return fmt.Errorf("masquerading: %w", err)
	}
	traffic.SetupAndEnsureForwardRules(ctx, conf.Network, conf.IPv6Network, 60)
	if err := manager.HandleSubnetFile(subnetFile, conf, true, lease.Subnet, lease.IPv6Subnet, network.MTU()); err != nil {
		return fmt.Errorf("write %s: %w", subnetFile, err)
	}
	wg.Go(func() { network.Run(ctx) })
	return manager.CompleteLease(ctx, lease, &wg)
}
