// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	cloudproviderapi "k8s.io/cloud-provider/api"

	"github.com/kedge-io/kedge/pkg/config"
)

// addressNode gives a Node with external addresses its status of them, in the place of a cloud's controller: the kubelet of such a
// node waits for one, and taints the Node until it has come.
func (p *plane) addressNode(ctx context.Context, node *corev1.Node) {
	external := config.ExternalIPs(node.Annotations[config.AnnotationExternalIP])
	if len(external) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	change := func(patch map[string]any, subresources ...string) {
		body, err := json.Marshal(patch)
		if err == nil {
			_, err = p.client.CoreV1().Nodes().Patch(ctx, node.Name, types.MergePatchType, body, metav1.PatchOptions{FieldManager: fieldManager}, subresources...)
		}
		if err != nil && ctx.Err() == nil {
			// The next change of the Node, a heartbeat at the latest, tries again.
			p.log.Debug("external addresses of a node", "node", node.Name, "error", err)
		}
	}
	if want := statusAddresses(node, external); !slices.Equal(want, node.Status.Addresses) {
		change(map[string]any{"status": map[string]any{"addresses": want}}, "status")
	}
	uninitialized := func(t corev1.Taint) bool { return t.Key == cloudproviderapi.TaintExternalCloudProvider }
	if slices.ContainsFunc(node.Spec.Taints, uninitialized) {
		// The version makes the API server refuse the list if another taint has come or gone meanwhile.
		change(map[string]any{
			"metadata": map[string]any{"resourceVersion": node.ResourceVersion},
			"spec":     map[string]any{"taints": slices.DeleteFunc(slices.Clone(node.Spec.Taints), uninitialized)},
		})
	}
}

// statusAddresses are the addresses of a Node's status: those that its kubelet was started with, the external ones, its name.
func statusAddresses(node *corev1.Node, external []netip.Addr) []corev1.NodeAddress {
	var list []corev1.NodeAddress
	for text := range strings.SplitSeq(node.Annotations[cloudproviderapi.AnnotationAlphaProvidedIPAddr], ",") {
		if a, err := netip.ParseAddr(text); err == nil {
			list = append(list, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
		}
	}
	for _, a := range external {
		list = append(list, corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: a.String()})
	}
	return append(list, corev1.NodeAddress{Type: corev1.NodeHostName, Address: node.Name})
}
