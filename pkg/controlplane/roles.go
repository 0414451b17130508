// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"github.com/kedge-io/kedge/pkg/join/authority"
)

// Labels by which people and selectors see what a node is. A kubelet may not give them to itself.
const (
	labelControlPlane = "node-role.kubernetes.io/control-plane"
	labelEtcd         = "node-role.kubernetes.io/etcd"
	labelWorker       = "node-role.kubernetes.io/worker"
)

// keepRoles labels every Node by what the registry of servers says of it, and gives it its external addresses, until ctx ends.
func (p *plane) keepRoles(ctx context.Context) {
	var mu sync.Mutex
	var servers map[string]authority.Server // nil: not known yet
	nodes := p.nodes.Informer()
	label := func(obj any) {
		node, ok := obj.(*corev1.Node)
		mu.Lock()
		known := servers
		mu.Unlock()
		if !ok {
			return
		}
		p.addressNode(ctx, node)
		if known != nil {
			p.labelNode(ctx, node, known)
		}
	}
	handler, err := nodes.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: label, UpdateFunc: func(_, obj any) { label(obj) }})
	if err != nil {
		p.log.Error("roles of nodes are not labelled", "error", err)
		return
	}
	defer nodes.RemoveEventHandler(handler) //nolint:errcheck // the process is about to end then
	authority.WatchServers(ctx, p.client, func(now map[string]authority.Server, err error) {
		if err != nil {
			p.log.Warn("the list of servers, ConfigMap kube-system/kedge-servers, is damaged: restart the servers that it concerns", "error", err)
		}
		// An empty list is one that the servers have not entered themselves in yet.
		if len(now) == 0 {
			return
		}
		mu.Lock()
		servers = now
		mu.Unlock()
		for _, obj := range nodes.GetStore().List() {
			label(obj)
		}
	})
}

// rolesOf gives the labels that a node must have (true) and must not have.
func rolesOf(name string, servers map[string]authority.Server) map[string]bool {
	s, isServer := servers[name]
	return map[string]bool{labelControlPlane: s.ControlPlane, labelEtcd: s.Etcd, labelWorker: !isServer}
}

func (p *plane) labelNode(ctx context.Context, node *corev1.Node, servers map[string]authority.Server) {
	change := map[string]any{}
	for label, want := range rolesOf(node.Name, servers) {
		if _, have := node.Labels[label]; have && !want {
			change[label] = nil
		} else if want && !have {
			change[label] = ""
		}
	}
	if len(change) == 0 {
		return
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": change}})
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if _, err := p.client.CoreV1().Nodes().Patch(ctx, node.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager}); err != nil && ctx.Err() == nil {
		// The next change of the Node, a heartbeat at the latest, tries again.
		p.log.Debug("label a node by its role", "node", node.Name, "labels", slices.Sorted(maps.Keys(change)), "error", err)
	}
}
