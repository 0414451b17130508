// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"fmt"
	"maps"
	"reflect"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	coreinformers "k8s.io/client-go/informers/core/v1"
	networkinginformers "k8s.io/client-go/informers/networking/v1"
	"k8s.io/client-go/tools/cache"
)

// mirrorAnnotation has the UID that a static pod's containers know, on the object that stands for it in the API.
const mirrorAnnotation = "kubernetes.io/config.mirror"

// linger is how long the pods and namespaces of the cluster are watched after the last policy went away.
const linger = 10 * time.Minute

// watches are the objects that rules are made from. Without a policy only policies and this node's pods are watched.
type watches struct {
	cfg      Config
	changed  func()
	policies cache.SharedIndexInformer
	local    cache.SharedIndexInformer

	ctx     context.Context // of all watches
	wg      sync.WaitGroup
	cluster *clusterWatches // nil unless needed
	needed  time.Time       // when there was a policy last

	mu  sync.Mutex
	err error // of a watch, until one works again
}

// clusterWatches are the pods and namespaces of the whole cluster.
type clusterWatches struct {
	pods, namespaces cache.SharedIndexInformer
	stop             context.CancelFunc
}

// startWatches watches until ctx ends. Its methods are for one goroutine; changed is called by others.
func startWatches(ctx context.Context, cfg Config, changed func()) *watches {
	w := &watches{cfg: cfg, changed: changed, ctx: ctx}
	w.policies = networkinginformers.NewNetworkPolicyInformer(cfg.Client, metav1.NamespaceAll, 0, cache.Indexers{})
	own := fields.OneTermEqualSelector("spec.nodeName", cfg.NodeName).String()
	w.local = coreinformers.NewFilteredPodInformer(cfg.Client, metav1.NamespaceAll, 0, cache.Indexers{},
		func(o *metav1.ListOptions) { o.FieldSelector = own })
	w.start(ctx, w.policies, stripPolicy)
	w.start(ctx, w.local, stripPod)
	return w
}

// start runs an informer until ctx ends, and says when it has all there is and when that changes.
func (w *watches) start(ctx context.Context, informer cache.SharedIndexInformer, strip cache.TransformFunc) {
	// Errors can only be that it runs already.
	_ = informer.SetTransform(strip)
	_ = informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, r *cache.Reflector, err error) {
		w.fail(err)
		cache.DefaultWatchErrorHandler(ctx, r, err)
	})
	_, _ = informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { w.changed() },
		DeleteFunc: func(any) { w.changed() },
		UpdateFunc: func(before, after any) {
			if !same(before, after) {
				w.changed()
			}
		},
	})
	w.wg.Go(func() { informer.RunWithContext(ctx) })
	w.wg.Go(func() {
		if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
			w.fail(nil)
			w.changed()
		}
	})
}

func (w *watches) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
}

// ready says what is missing to make rules. It starts to watch the cluster when there is a policy.
func (w *watches) ready() error {
	if !w.policies.HasSynced() || !w.local.HasSynced() {
		return w.waiting("the API")
	}
	if len(w.policies.GetStore().ListKeys()) == 0 {
		return nil
	}
	w.needed = time.Now()
	if w.cluster == nil {
		w.fail(nil)
		ctx, stop := context.WithCancel(w.ctx)
		w.cluster = &clusterWatches{
			pods:       coreinformers.NewPodInformer(w.cfg.Client, metav1.NamespaceAll, 0, cache.Indexers{}),
			namespaces: coreinformers.NewNamespaceInformer(w.cfg.Client, 0, cache.Indexers{}),
			stop:       stop,
		}
		w.start(ctx, w.cluster.pods, stripPod)
		w.start(ctx, w.cluster.namespaces, stripNamespace)
	}
	if !w.cluster.pods.HasSynced() || !w.cluster.namespaces.HasSynced() {
		return w.waiting("the cluster's pods and namespaces")
	}
	return nil
}

func (w *watches) waiting(what string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return fmt.Errorf("network policies: %s cannot be read: %w", what, w.err)
	}
	return waiting("for %s", what)
}

// rest forgets the cluster's pods and namespaces when no policy has needed them for a while.
func (w *watches) rest() {
	if w.cluster != nil && len(w.policies.GetStore().ListKeys()) == 0 && time.Since(w.needed) > linger {
		w.cluster.stop()
		w.cluster = nil
	}
}

// stripPod leaves what policies can see, and what tells pods apart.
func stripPod(obj any) (any, error) {
	p, ok := obj.(*corev1.Pod)
	if !ok {
		return obj, nil
	}
	s := &corev1.Pod{
		ObjectMeta: stripMeta(p.ObjectMeta),
		Spec:       corev1.PodSpec{NodeName: p.Spec.NodeName, HostNetwork: p.Spec.HostNetwork},
		Status:     corev1.PodStatus{Phase: p.Status.Phase, PodIPs: p.Status.PodIPs},
	}
	if uid, ok := p.Annotations[mirrorAnnotation]; ok {
		s.Annotations = map[string]string{mirrorAnnotation: uid}
	}
	var ports []corev1.ContainerPort
	for _, c := range containersOf(p) {
		for _, port := range c.Ports {
			if port.Name != "" {
				ports = append(ports, corev1.ContainerPort{Name: strings.Clone(port.Name), Protocol: port.Protocol, ContainerPort: port.ContainerPort})
			}
		}
	}
	if len(ports) > 0 {
		s.Spec.Containers = []corev1.Container{{Ports: ports}}
	}
	return s, nil
}

// containersOf a pod that may have ports for as long as it runs: restartable init containers, too.
func containersOf(p *corev1.Pod) []corev1.Container {
	all := p.Spec.Containers
	for _, c := range p.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			all = append(all[:len(all):len(all)], c)
		}
	}
	return all
}

func stripNamespace(obj any) (any, error) {
	if n, ok := obj.(*corev1.Namespace); ok {
		return &corev1.Namespace{ObjectMeta: stripMeta(n.ObjectMeta)}, nil
	}
	return obj, nil
}

func stripPolicy(obj any) (any, error) {
	if p, ok := obj.(*networkingv1.NetworkPolicy); ok {
		return &networkingv1.NetworkPolicy{ObjectMeta: stripMeta(p.ObjectMeta), Spec: p.Spec}, nil
	}
	return obj, nil
}

func stripMeta(m metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion, Labels: m.Labels}
}

// same tells whether an update leaves all that is looked at as it was. Objects are stripped.
func same(before, after any) bool {
	switch b := before.(type) {
	case *corev1.Pod:
		a, ok := after.(*corev1.Pod)
		return ok && a.UID == b.UID && maps.Equal(a.Labels, b.Labels) && reflect.DeepEqual(a.Spec, b.Spec) && reflect.DeepEqual(a.Status.PodIPs, b.Status.PodIPs) &&
			finished(a) == finished(b)
	case *corev1.Namespace:
		a, ok := after.(*corev1.Namespace)
		return ok && maps.Equal(a.Labels, b.Labels)
	case *networkingv1.NetworkPolicy:
		a, ok := after.(*networkingv1.NetworkPolicy)
		return ok && reflect.DeepEqual(a.Spec, b.Spec)
	}
	return false
}

func finished(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}
