// SPDX-License-Identifier: Apache-2.0

//lint:file-ignore SA1019 upstream's adapter takes Endpoints, and writes the EndpointSlice as well

package controlplane

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/retry"
	"k8s.io/kubernetes/pkg/controlplane/reconcilers"

	"github.com/kedge-io/kedge/pkg/apilb"
)

const kubernetesService = "kubernetes"

// endpointReconciler keeps the addresses of the API servers in the endpoints of the kubernetes Service. Each server adds its own and takes
// it away when it stops; the others take away that of a server that does not answer (dropDead). Upstream's reconcilers write a
// lease per server every ten seconds, or need to be told how many servers there are; this one writes when something changes.
// The API server calls it every ten seconds.
type endpointReconciler struct {
	adapter reconcilers.EndpointsAdapter

	mu      sync.Mutex
	stopped bool
}

var _ reconcilers.EndpointReconciler = (*endpointReconciler)(nil)

func newEndpointReconciler(config *rest.Config) (*endpointReconciler, error) {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	return &endpointReconciler{adapter: reconcilers.NewEndpointsAdapter(client.CoreV1(), client.DiscoveryV1())}, nil
}

// ValidateIP accepts every address: configuration has been validated.
func (*endpointReconciler) ValidateIP(net.IP) error { return nil }

// ReconcileEndpoints adds this server's address, and repairs what somebody else has made of the object.
func (r *endpointReconciler) ReconcileEndpoints(_ string, ip net.IP, ports []corev1.EndpointPort, _ bool) error {
	return r.change(func(e *corev1.Endpoints) bool {
		addresses := addressesOf(e)
		sound := len(e.Subsets) == 1 && slices.Equal(e.Subsets[0].Ports, ports) && len(e.Subsets[0].Addresses) == len(addresses) &&
			len(e.Subsets[0].NotReadyAddresses) == 0 && e.Labels[discoveryv1.LabelSkipMirror] == "true"
		if !slices.ContainsFunc(addresses, func(a corev1.EndpointAddress) bool { return a.IP == ip.String() }) {
			addresses = append(addresses, corev1.EndpointAddress{IP: ip.String()})
		} else if sound {
			return false
		}
		// With the label the EndpointSlice mirroring controller leaves it alone: the adapter writes the slice.
		metav1.SetMetaDataLabel(&e.ObjectMeta, discoveryv1.LabelSkipMirror, "true")
		e.Subsets = []corev1.EndpointSubset{{Ports: ports, Addresses: addresses}}
		return true
	})
}

// RemoveEndpoints takes it away.
func (r *endpointReconciler) RemoveEndpoints(_ string, ip net.IP, _ []corev1.EndpointPort) error {
	return removeAddresses(r.adapter, ip.String())
}

// StopReconciling makes later calls do nothing.
func (r *endpointReconciler) StopReconciling() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = true
}

// Destroy has nothing to do.
func (*endpointReconciler) Destroy() {}

// change applies a modification, which says whether it modified anything, and makes the EndpointSlice follow.
func (r *endpointReconciler) change(modify func(*corev1.Endpoints) bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped {
		return nil
	}
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		e, err := r.adapter.Get(metav1.NamespaceDefault, kubernetesService, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			e = &corev1.Endpoints{ObjectMeta: metav1.ObjectMeta{Name: kubernetesService, Namespace: metav1.NamespaceDefault}}
			modify(e)
			_, err = r.adapter.Create(metav1.NamespaceDefault, e)
			return err
		}
		if err != nil {
			return err
		}
		if modify(e) {
			_, err = r.adapter.Update(metav1.NamespaceDefault, e)
			return err
		}
		return r.adapter.EnsureEndpointSliceFromEndpoints(metav1.NamespaceDefault, e)
	})
}

func addressesOf(e *corev1.Endpoints) []corev1.EndpointAddress {
	var all []corev1.EndpointAddress
	for _, s := range e.Subsets {
		all = append(all, s.Addresses...)
	}
	slices.SortFunc(all, func(a, b corev1.EndpointAddress) int { return strings.Compare(a.IP, b.IP) })
	return slices.CompactFunc(all, func(a, b corev1.EndpointAddress) bool { return a.IP == b.IP })
}

// removeAddresses takes addresses out of the Service's endpoints.
func removeAddresses(adapter reconcilers.EndpointsAdapter, gone ...string) error {
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		e, err := adapter.Get(metav1.NamespaceDefault, kubernetesService, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		removed := false
		for i := range e.Subsets {
			before := len(e.Subsets[i].Addresses)
			e.Subsets[i].Addresses = slices.DeleteFunc(e.Subsets[i].Addresses, func(a corev1.EndpointAddress) bool { return slices.Contains(gone, a.IP) })
			removed = removed || len(e.Subsets[i].Addresses) != before
		}
		e.Subsets = slices.DeleteFunc(e.Subsets, func(s corev1.EndpointSubset) bool { return len(s.Addresses) == 0 })
		if !removed {
			return nil
		}
		_, err = adapter.Update(metav1.NamespaceDefault, e)
		return err
	})
}

// Timing of dropDead: a dead server leaves the Service's endpoints within a few seconds.
const (
	deadInterval = 2 * time.Second
	deadAfter    = 3 // failed probes in a row
)

// dropDead takes the addresses of API servers that do not answer out of the Service's endpoints, until ctx ends. Every server does
// it, not the leader alone: it may be the leader that died. With one address there is nothing to probe.
func (p *plane) dropDead(ctx context.Context) {
	d := deadDropper{
		adapter:  reconcilers.NewEndpointsAdapter(p.client.CoreV1(), p.client.DiscoveryV1()),
		probe:    apilb.HTTPSProbe(func() (*x509.CertPool, error) { return cert.NewPool(p.cfg.Files.TrustedServerCA) }),
		own:      p.cfg.AdvertiseAddress.String(),
		log:      p.log.With("component", ComponentAPIServer),
		failures: map[string]int{},
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(deadInterval):
		}
		d.look(ctx)
	}
}

type deadDropper struct {
	adapter  reconcilers.EndpointsAdapter
	probe    func(ctx context.Context, address string) error
	own      string
	log      *slog.Logger
	failures map[string]int // in a row, by address
}

// look probes every other server once.
func (d *deadDropper) look(ctx context.Context) {
	// From the watch cache: this read costs the datastore nothing.
	e, err := d.adapter.Get(metav1.NamespaceDefault, kubernetesService, metav1.GetOptions{ResourceVersion: "0"})
	if err != nil || len(addressesOf(e)) < 2 || len(e.Subsets[0].Ports) == 0 {
		clear(d.failures)
		return
	}
	port := strconv.Itoa(int(e.Subsets[0].Ports[0].Port))
	var dead []string
	for _, a := range addressesOf(e) {
		if a.IP == d.own {
			continue
		}
		probeCtx, cancel := context.WithTimeout(ctx, time.Second)
		err := d.probe(probeCtx, net.JoinHostPort(a.IP, port))
		cancel()
		if err == nil {
			delete(d.failures, a.IP)
		} else if d.failures[a.IP]++; d.failures[a.IP] >= deadAfter {
			dead = append(dead, a.IP)
		}
	}
	if len(dead) == 0 || ctx.Err() != nil {
		return
	}
	d.log.Info("API servers that do not answer leave the endpoints of the kubernetes Service", "addresses", dead)
	if err := removeAddresses(d.adapter, dead...); err != nil {
		d.log.Warn("endpoints of the kubernetes Service", "error", err)
		return
	}
	for _, ip := range dead { // when it is back it is to be judged anew
		delete(d.failures, ip)
	}
}
