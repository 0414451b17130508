// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"encoding/json"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// announceExternal writes this node's external addresses to its Node, or takes away those of an earlier start.
func (n *node) announceExternal(ctx context.Context, client kubernetes.Interface) {
	texts := make([]string, len(n.cfg.ExternalAddress))
	for i, a := range n.cfg.ExternalAddress {
		texts[i] = a.String()
	}
	want := strings.Join(texts, ",")
	_ = supervise.Poll(ctx, func() error { // ends with ctx
		node, err := n.waitForNode(ctx, client, func(*corev1.Node) bool { return true })
		if err != nil || node.Annotations[config.AnnotationExternalIP] == want {
			return err
		}
		value := &want
		if want == "" {
			value = nil
		}
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]*string{config.AnnotationExternalIP: value}}})
		if err == nil {
			_, err = client.CoreV1().Nodes().Patch(ctx, n.cfg.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "kedge"})
		}
		if err != nil {
			n.log.Debug("the node's external address is not known to the cluster yet", "error", err)
		}
		return err
	})
}
