// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"

	"github.com/kedge-io/kedge/pkg/servicelb"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// runServiceLB makes services of type LoadBalancer answer on this node until ctx ends.
func (n *node) runServiceLB(ctx context.Context) error {
	n.child.Report(ComponentServiceLB, supervise.Waiting, "for the API")
	if err := n.waitForRules(ctx, n.client); err != nil {
		return nil // the process is stopping
	}
	lb, err := servicelb.NewNode(servicelb.NodeConfig{
		NodeName: n.cfg.Name, Client: n.client, ClusterCIDRs: n.cfg.ClusterCIDR,
	}, n.log)
	if err != nil {
		return err
	}
	go n.watch(ctx, ComponentServiceLB, "", lb.Ready)
	return n.keep(ctx, ComponentServiceLB, lb.Run)
}
