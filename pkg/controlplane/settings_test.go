// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join"
)

// A change of the API's floating addresses is noticed, and leaves what the server was started with as it is.
func TestFollowSettings(t *testing.T) {
	first := []netip.Addr{netip.MustParseAddr("192.0.2.200"), netip.MustParseAddr("fd00::200")}
	second := []netip.Addr{netip.MustParseAddr("192.0.2.220")}
	object := func(vip []netip.Addr) *corev1.ConfigMap {
		text, err := json.Marshal(config.Cluster{APIVIP: vip})
		if err != nil {
			t.Fatal(err)
		}
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: join.ConfigMapCluster},
			Data: map[string]string{join.KeyCluster: string(text)}}
	}
	client := fake.NewClientset(object(first))
	p := &plane{client: client, log: slog.New(slog.DiscardHandler), poolChanged: make(chan struct{}, 1), vipChanged: make(chan struct{}, 1)}
	p.cfg.Cluster.APIVIP = slices.Clone(first)
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { p.followSettings(ctx) })
	defer running.Wait()
	defer stop()
	// The change may come before the watch: it is a change all the same.
	if _, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Update(ctx, object(second), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	<-p.vipChanged
	if now := p.cluster().APIVIP; !slices.Equal(now, second) {
		t.Errorf("goes by %v", now)
	}
	if !slices.Equal(p.cfg.Cluster.APIVIP, first) {
		t.Errorf("what it was started with has become %v", p.cfg.Cluster.APIVIP)
	}
	if len(p.poolChanged) > 0 {
		t.Error("the pool has not changed")
	}
}
