// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"fmt"
	"log/slog"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
	cloudproviderapi "k8s.io/cloud-provider/api"

	"github.com/kedge-io/kedge/pkg/config"
)

// TestAddressNode does for a Node what a cloud's controller would do, and nothing to a Node without external addresses.
func TestAddressNode(t *testing.T) {
	taints := []corev1.Taint{{Key: cloudproviderapi.TaintExternalCloudProvider, Effect: corev1.TaintEffectNoSchedule}, {Key: "mine", Effect: corev1.TaintEffectNoSchedule}}
	for _, test := range []struct {
		name        string
		annotations map[string]string
		want        string
		taints      int
	}{
		{"both families", map[string]string{
			cloudproviderapi.AnnotationAlphaProvidedIPAddr: "192.0.2.1,2001:db8::1", config.AnnotationExternalIP: "203.0.113.7,rubbish,2001:db8:9::7",
		}, "[{InternalIP 192.0.2.1} {InternalIP 2001:db8::1} {ExternalIP 203.0.113.7} {ExternalIP 2001:db8:9::7} {Hostname n}]", 1},
		{"another's cloud", map[string]string{cloudproviderapi.AnnotationAlphaProvidedIPAddr: "192.0.2.1"}, "[]", 2},
	} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", Annotations: test.annotations}, Spec: corev1.NodeSpec{Taints: taints}}
		client := fake.NewClientset(node)
		p := &plane{client: client, log: slog.New(slog.DiscardHandler)}
		for range 2 { // the second time there is nothing to do
			p.addressNode(t.Context(), node)
			var err error
			if node, err = client.CoreV1().Nodes().Get(t.Context(), "n", metav1.GetOptions{}); err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprint(node.Status.Addresses); got != test.want || len(node.Spec.Taints) != test.taints {
				t.Errorf("%s: addresses %s, taints %v", test.name, got, node.Spec.Taints)
			}
		}
		if writes := len(client.Actions()) - 2; test.taints == 1 && writes != 2 || test.taints == 2 && writes != 0 {
			t.Errorf("%s: %d writes: %v", test.name, writes, client.Actions())
		}
	}
}
