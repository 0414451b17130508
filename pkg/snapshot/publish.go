// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/pki"
)

// ConfigMap in kube-system that shows the snapshots of all servers: one key a server, its node's name.
const ConfigMap = "kedge-snapshots"

// Listed is an entry of the ConfigMap.
type Listed struct {
	Name     string    `json:"name"`
	Node     string    `json:"node"`
	Created  time.Time `json:"created"`
	Trigger  Trigger   `json:"trigger"`
	Revision int64     `json:"revision"`
	Hash     string    `json:"hash"`
	Bytes    int64     `json:"bytes"`
	Location string    `json:"location"`
	Keys     bool      `json:"keys"`
	Problem  string    `json:"problem,omitempty"`
}

// maxListed bounds a server's part of the ConfigMap; the newest are shown.
const maxListed = 200

// Publish writes what this server has, and what is in the bucket, into the ConfigMap, by server-side apply: each server owns its key. What has not
// changed costs no write.
func Publish(ctx context.Context, s Settings) error {
	kubeconfig := filepath.Join(s.PKIDir, string(pki.KedgeController)+".kubeconfig")
	if _, err := os.Stat(kubeconfig); err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	config.Timeout = 10 * time.Second
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	stores, err := s.Stores()
	if err != nil {
		return err
	}
	list := []Listed{}
	for _, store := range stores {
		entries, err := store.List(ctx)
		if err != nil {
			return err
		}
		for _, e := range entries {
			list = append(list, Listed{Name: e.Name, Node: e.Node, Created: e.Created, Trigger: e.Trigger, Revision: e.Data.Revision, Hash: fmt.Sprintf("%08x", e.Data.Hash),
				Bytes: e.Bytes, Location: e.Location, Keys: e.HasKeys(), Problem: e.Problem})
		}
	}
	text, err := json.MarshalIndent(list[:min(len(list), maxListed)], "", " ")
	if err != nil {
		return err
	}
	cm := applycorev1.ConfigMap(ConfigMap, metav1.NamespaceSystem).WithData(map[string]string{s.Node: string(text)})
	_, err = client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Apply(ctx, cm, metav1.ApplyOptions{FieldManager: "kedge-snapshot-" + s.Node, Force: true})
	return err
}

// Published reads the snapshots of all servers from the cluster, by node name.
func Published(ctx context.Context, kubeconfig string) (map[string][]Listed, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	config.Timeout = 15 * time.Second
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	all := map[string][]Listed{}
	cm, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, ConfigMap, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return all, nil
	}
	if err != nil {
		return nil, err
	}
	for node, text := range cm.Data {
		var list []Listed
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			return nil, fmt.Errorf("ConfigMap %s, %s: %w", ConfigMap, node, err)
		}
		all[node] = list
	}
	return all, nil
}
