// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"testing"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kedge-io/kedge/pkg/join"
)

// A node takes itself out of the cluster, with all that would keep its name from a machine to come; no other node's.
func TestNodeRemovesItself(t *testing.T) {
	a := newJoinAPI(t)
	for _, name := range []string{"a1", "a2"} {
		if _, err := a.client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		csr := bootstrap(name, []string{join.GroupBootstrapAgents}).object(t, "csr-"+name)
		if _, err := a.client.CertificatesV1().CertificateSigningRequests().Create(t.Context(), csr, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	a1 := a.as(a.ownCA, "system:node:a1", join.GroupNodes)
	if err := a1.RemoveNode(t.Context(), "a2"); !apierrors.IsForbidden(err) {
		t.Errorf("another node: got %v, want a refusal", err)
	}
	for range 2 { // an answer may get lost
		if err := a1.RemoveNode(t.Context(), "a1"); err != nil {
			t.Fatal(err)
		}
	}
	nodes, err := a.client.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil || len(nodes.Items) != 1 || nodes.Items[0].Name != "a2" {
		t.Errorf("nodes %v, %v; want a2", nodes.Items, err)
	}
	requests, err := a.client.CertificatesV1().CertificateSigningRequests().List(t.Context(), metav1.ListOptions{})
	if err != nil || len(requests.Items) != 1 || requests.Items[0].Name != "csr-a2" {
		t.Errorf("requests %v, %v; want that of a2", names(requests.Items), err)
	}
}

func names(list []certificatesv1.CertificateSigningRequest) (out []string) {
	for _, csr := range list {
		out = append(out, csr.Name)
	}
	return out
}
