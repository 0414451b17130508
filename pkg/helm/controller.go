// SPDX-License-Identifier: Apache-2.0

package helm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"

	"golang.org/x/sync/errgroup"
)

const (
	fieldManager = "kedge-helm"
	// workers is how many charts are worked on at the same time: one may wait for what another brings.
	workers = 3
	// firstRetry and lastRetry of what failed before it changed anything, or could not be installed for the first time.
	firstRetry = 10 * time.Second
	lastRetry  = 10 * time.Minute
)

// ControllerConfig is the configuration of a [Controller].
type ControllerConfig struct {
	Client     kubernetes.Interface
	REST       *rest.Config
	Kubeconfig string // file, for the child processes
	ChartsDir  string
	RunDir     string // for files that last as long as a child process
	Log        *slog.Logger
}

// Controller does what HelmChart objects say. One of them runs in a cluster.
type Controller struct {
	cfg    ControllerConfig
	log    *slog.Logger
	charts dynamic.NamespaceableResourceInterface
	events record.EventRecorder
	run    func(context.Context, Request) (Result, error) // start
}

// NewController makes a controller that has not started.
func NewController(cfg ControllerConfig) *Controller {
	return &Controller{cfg: cfg, log: cfg.Log.With("component", "helm"), run: start}
}

// Run works until ctx ends and returns nil then. It may be called again afterwards.
func (c *Controller) Run(ctx context.Context) error {
	objects, err := dynamic.NewForConfig(c.cfg.REST)
	if err != nil {
		return err
	}
	c.charts = objects.Resource(Resource())
	client, err := metadata.NewForConfig(c.cfg.REST)
	if err != nil {
		return err
	}
	if !c.known(ctx, client) {
		return nil
	}
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: c.cfg.Client.CoreV1().Events(metav1.NamespaceAll)})
	c.events = broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: fieldManager})

	queue := workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[types.NamespacedName](firstRetry, lastRetry))
	defer queue.ShutDown()
	add := func(obj any) {
		if o, err := meta.Accessor(obj); err == nil {
			queue.Add(types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()})
		}
	}
	// Metadata only: charts may be large, and most of the time nobody looks at them.
	informer := metadatainformer.NewFilteredMetadataInformer(client, Resource(), metav1.NamespaceAll, 0, cache.Indexers{}, nil).Informer()
	_, err = informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: add, UpdateFunc: func(before, after any) {
		b, err1 := meta.Accessor(before)
		a, err2 := meta.Accessor(after)
		if err := errors.Join(err1, err2); err != nil || a.GetGeneration() != b.GetGeneration() || a.GetDeletionTimestamp() != nil ||
			a.GetAnnotations()[annotationRetry] != b.GetAnnotations()[annotationRetry] {
			add(after)
		}
	}})
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { informer.RunWithContext(ctx); return nil })
	for range workers {
		group.Go(func() error { c.work(ctx, queue); return nil })
	}
	group.Go(func() error { <-ctx.Done(); queue.ShutDown(); return nil })
	return group.Wait()
}

// known waits until the API has HelmCharts.
func (c *Controller) known(ctx context.Context, client metadata.Interface) bool {
	for delay := 100 * time.Millisecond; ; delay = min(2*delay, time.Minute) {
		_, err := client.Resource(Resource()).List(ctx, metav1.ListOptions{Limit: 1})
		if err == nil {
			return true
		}
		c.log.Debug("the API has no HelmCharts yet", "error", err)
		select {
		case <-ctx.Done():
			return false
		case <-time.After(delay):
		}
	}
}

func (c *Controller) work(ctx context.Context, queue workqueue.TypedRateLimitingInterface[types.NamespacedName]) {
	for {
		key, down := queue.Get()
		if down {
			return
		}
		again, err := c.reconcile(ctx, key)
		switch {
		case ctx.Err() != nil:
		case err != nil && !apierrors.IsConflict(err):
			c.log.Warn("HelmChart", "chart", key.String(), "error", err)
			queue.AddRateLimited(key)
		case err != nil || again:
			queue.AddRateLimited(key)
		default:
			queue.Forget(key)
		}
		queue.Done(key)
	}
}

// reconcile does what there is to do about one object; again: it may help to try later.
func (c *Controller) reconcile(ctx context.Context, key types.NamespacedName) (again bool, err error) {
	o, err := c.charts.Namespace(key.Namespace).Get(ctx, key.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	ch, err := parse(o)
	if o.GetDeletionTimestamp() != nil {
		return false, c.uninstall(ctx, ch)
	}
	if err != nil {
		return false, c.write(ctx, ch, Result{Error: err.Error()}, "Invalid", true)
	}
	if ch.status.Hash == ch.hash() && (meta.IsStatusConditionTrue(ch.status.Conditions, conditionReady) || meta.IsStatusConditionTrue(ch.status.Conditions, conditionStalled)) {
		return false, nil
	}
	if before := ch.status.Namespace; before != "" && before != ch.namespace() && ch.status.Revision > 0 {
		return false, c.write(ctx, ch, Result{Error: fmt.Sprintf("the release is in the namespace %s, and cannot be moved to %s: delete the HelmChart, which uninstalls it, and make it anew", before, ch.namespace())}, "Moved", true)
	}
	if !slices.Contains(o.GetFinalizers(), finalizer) {
		if err := c.finalizers(ctx, o, append(o.GetFinalizers(), finalizer)); err != nil {
			return false, err
		}
	}
	return c.deploy(ctx, ch)
}

func (c *Controller) request(verb Verb, ch chart, namespace string) Request {
	return Request{Verb: verb, Name: ch.object.GetName(), Namespace: namespace, Own: ch.object.GetNamespace(), Spec: ch.spec,
		Kubeconfig: c.cfg.Kubeconfig, ChartsDir: c.cfg.ChartsDir, Scratch: c.cfg.RunDir}
}

// deploy installs or upgrades. What failed after it had changed something is not tried again by itself: each try is one more interruption
// of what runs.
func (c *Controller) deploy(ctx context.Context, ch chart) (again bool, err error) {
	name := ch.object.GetNamespace() + "/" + ch.object.GetName()
	if ch.status.Hash != ch.hash() {
		if err := c.progress(ctx, ch); err != nil {
			return false, err
		}
	}
	c.log.Info("deploying a chart", "chart", name)
	begin := time.Now()
	res, err := c.run(ctx, c.request(Deploy, ch, ch.namespace()))
	if ctx.Err() != nil {
		return false, nil // the next leader goes on
	}
	if err != nil {
		res = Result{Error: err.Error(), Status: ch.status.Release, Revision: ch.status.Revision, Chart: ch.status.Chart, AppVersion: ch.status.AppVersion}
	}
	if res.Error == "" {
		c.log.Info("chart deployed", "chart", name, "revision", res.Revision, "took", time.Since(begin).Round(100*time.Millisecond))
		c.events.Eventf(ch.object, corev1.EventTypeNormal, "Deployed", "%s, revision %d", res.Chart, res.Revision)
		return false, c.write(ctx, ch, res, "Deployed", false)
	}
	// A first installation that did not become ready may still do so, and there is nothing that another try could break.
	stalled := res.Touched && (res.RolledBack || res.Revision > 1)
	reason := "Failed"
	if res.RolledBack {
		reason = "RolledBack"
	}
	if old := meta.FindStatusCondition(ch.status.Conditions, conditionReady); old == nil || old.Message != res.Error {
		c.log.Warn("chart not deployed", "chart", name, "reason", reason, "error", res.Error)
		c.events.Event(ch.object, corev1.EventTypeWarning, reason, res.Error[:min(len(res.Error), 1000)])
	}
	return !stalled, c.write(ctx, ch, res, reason, stalled)
}

// uninstall removes the release and lets the object go.
func (c *Controller) uninstall(ctx context.Context, ch chart) error {
	if !slices.Contains(ch.object.GetFinalizers(), finalizer) {
		return nil
	}
	namespace := ch.status.Namespace
	if namespace == "" {
		namespace = ch.namespace()
	}
	res, err := c.run(ctx, c.request(Uninstall, ch, namespace))
	if ctx.Err() != nil {
		return nil
	}
	if err == nil && res.Error != "" {
		err = errors.New(res.Error)
	}
	if err != nil {
		c.events.Event(ch.object, corev1.EventTypeWarning, "UninstallFailed", err.Error()[:min(len(err.Error()), 1000)])
		return fmt.Errorf("uninstall: %w", err)
	}
	c.log.Info("chart uninstalled", "chart", ch.object.GetNamespace()+"/"+ch.object.GetName())
	return c.finalizers(ctx, ch.object, slices.DeleteFunc(ch.object.GetFinalizers(), func(s string) bool { return s == finalizer }))
}

func (c *Controller) finalizers(ctx context.Context, o *unstructured.Unstructured, list []string) error {
	return c.patch(ctx, o, map[string]any{"metadata": map[string]any{"finalizers": list, "resourceVersion": o.GetResourceVersion(), "uid": o.GetUID()}})
}

func (c *Controller) patch(ctx context.Context, o *unstructured.Unstructured, change map[string]any, subresources ...string) error {
	b, err := json.Marshal(change)
	if err != nil {
		return err
	}
	_, err = c.charts.Namespace(o.GetNamespace()).Patch(ctx, o.GetName(), types.MergePatchType, b, metav1.PatchOptions{FieldManager: fieldManager}, subresources...)
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// progress says that work on an object has begun.
func (c *Controller) progress(ctx context.Context, ch chart) error {
	st := ch.status
	st.Message = "being deployed"
	meta.SetStatusCondition(&st.Conditions, metav1.Condition{Type: conditionReady, Status: metav1.ConditionUnknown, Reason: "Deploying", Message: st.Message, ObservedGeneration: ch.object.GetGeneration()})
	meta.RemoveStatusCondition(&st.Conditions, conditionStalled)
	return c.patch(ctx, ch.object, map[string]any{"status": st}, "status")
}

// write puts what came of an object into its status.
func (c *Controller) write(ctx context.Context, ch chart, res Result, reason string, stalled bool) error {
	st := ch.status
	st.Hash, st.Message = ch.hash(), res.Error
	if res.Status != "" {
		st.Namespace, st.Release, st.Revision, st.Chart, st.AppVersion = ch.namespace(), res.Status, res.Revision, res.Chart, res.AppVersion
	}
	ready := metav1.Condition{Type: conditionReady, Status: metav1.ConditionTrue, Reason: reason, Message: res.Error, ObservedGeneration: ch.object.GetGeneration()}
	if res.Error != "" {
		ready.Status = metav1.ConditionFalse
	} else if ignored := ch.ignored(); len(ignored) > 0 {
		st.Message = "deployed; these fields mean nothing here: " + strings.Join(ignored, ", ")
		ready.Message = st.Message
	}
	meta.SetStatusCondition(&st.Conditions, ready)
	meta.RemoveStatusCondition(&st.Conditions, conditionStalled)
	if stalled {
		meta.SetStatusCondition(&st.Conditions, metav1.Condition{Type: conditionStalled, Status: metav1.ConditionTrue, Reason: reason, ObservedGeneration: ch.object.GetGeneration(),
			Message: "tried again when the object changes, or its annotation " + annotationRetry})
	}
	return c.patch(ctx, ch.object, map[string]any{"status": st}, "status")
}
