// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
)

const (
	// requestsPerSecond to the API at the most, as many at once.
	requestsPerSecond = 100
	// keepRemoved is for how long the cluster knows that a file was removed, for servers that are off.
	keepRemoved = 400 * 24 * time.Hour
)

// applier is one run of Apply.
type applier struct {
	*Deployer
	objects  dynamic.Interface
	metadata metadata.Interface
	disco    discovery.DiscoveryInterface
	// mapper knows the kinds that the cluster has; only while it is needed.
	mapper *restmapper.DeferredDiscoveryRESTMapper
	files  map[string]*progress
}

// progress is how far this run is with a file.
type progress struct {
	seen  int64              // revision
	wants map[reference]bool // what the file has, and what it had if that cannot be said
	due   time.Time          // of the next try; zero: none
	retry retry
	bad   bool
}

// Apply brings what the records say into the cluster until ctx ends. It may be called again afterwards, and looks at everything then.
func (d *Deployer) Apply(ctx context.Context) error {
	config := rest.CopyConfig(d.cfg.REST)
	config.QPS, config.Burst = requestsPerSecond, requestsPerSecond
	a := &applier{Deployer: d, files: map[string]*progress{}}
	var err [3]error
	a.objects, err[0] = dynamic.NewForConfig(config)
	a.metadata, err[1] = metadata.NewForConfig(config)
	a.disco, err[2] = discovery.NewDiscoveryClientForConfig(config)
	if err := errors.Join(err[:]...); err != nil {
		return err
	}
	changed, stop := d.listen()
	defer stop()
	defer d.report(ofApply, "")
	if !d.ready(ctx) {
		return nil
	}
	a.dropOld(ctx)
	due := time.NewTimer(0)
	defer due.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			due.Reset(settle)
		case <-due.C:
			if next := a.round(ctx); !next.IsZero() {
				due.Reset(time.Until(next))
			}
		}
	}
}

// dropOld forgets files that were removed long ago.
func (a *applier) dropOld(ctx context.Context) {
	for _, r := range a.records() {
		if !r.deleted || time.Since(r.at) < keepRemoved || r.at.IsZero() || r.result().State != Removed {
			continue
		}
		err := a.cfg.Client.CoreV1().Secrets(r.secret.Namespace).Delete(ctx, r.secret.Name, metav1.DeleteOptions{
			Preconditions: &metav1.Preconditions{UID: &r.secret.UID, ResourceVersion: &r.secret.ResourceVersion}})
		if err != nil {
			a.log.Debug("record of a removed manifest", "file", r.file, "error", err)
		}
	}
}

// work is what a round does about one file.
type work struct {
	record
	*progress
	docs     []document
	result   result
	unclear  bool // what objects the file has is not known: nothing is deleted
	waits    int  // how many problems are kinds that the cluster does not have yet
	again    bool // trying again may help
	had      []reference
	conclude []reference // what the inventory is afterwards
}

// round looks at every file that has changed or is due, and says when the next one is due; zero: when something changes.
func (a *applier) round(ctx context.Context) time.Time {
	records := a.records()
	maps.DeleteFunc(a.files, func(name string, _ *progress) bool { _, ok := records[name]; return !ok })
	var todo []*work
	now := time.Now()
	news := slices.ContainsFunc(slices.Collect(maps.Keys(records)), func(name string) bool {
		return a.files[name] == nil || a.files[name].seen != records[name].revision
	})
	for _, name := range slices.Sorted(maps.Keys(records)) {
		p := a.files[name]
		if p == nil {
			p = &progress{}
			a.files[name] = p
		}
		if p.seen != records[name].revision {
			p.retry, p.due = retry{}, now
		}
		// What one file waits for may be in the other that has changed.
		if !p.due.IsZero() && (news || !p.due.After(now)) {
			todo = append(todo, &work{record: records[name], progress: p})
		}
	}
	// Everything is read first, then applied, then deleted: an object may have moved from one file to another.
	for _, w := range todo {
		a.prepare(w)
	}
	for _, w := range todo {
		a.applyFile(ctx, w)
	}
	for _, w := range todo {
		a.prune(ctx, w)
	}
	for _, w := range todo {
		a.conclude(ctx, w)
	}
	a.mapper = nil // kinds come and go, and it is large
	return a.next(records)
}

// next is when the first file is due, and reports.
func (a *applier) next(records map[string]record) time.Time {
	var next time.Time
	bad, files := 0, 0
	for name, p := range a.files {
		if !p.due.IsZero() && (next.IsZero() || p.due.Before(next)) {
			next = p.due
		}
		if r := records[name]; !r.deleted {
			files++
		}
		if p.bad {
			bad++
		}
	}
	switch {
	case bad > 0:
		a.report(ofApply, fmt.Sprintf("%d of %d files have errors: kedge manifests", bad, files))
	case files > 0:
		a.report(ofApply, fmt.Sprintf("%d files applied", files))
	default:
		a.report(ofApply, "")
	}
	return next
}

// problem notes what is wrong with a document, or with the file.
func (w *work) problem(d document, err error) {
	p := Problem{Error: err.Error()}
	if d.number > 0 {
		p.Where = d.where()
	}
	if d.object != nil {
		p.Object = refer(d.object).String()
	}
	w.result.Problems = append(w.result.Problems, p)
}

func refer(o *unstructured.Unstructured) reference {
	gvk := o.GroupVersionKind()
	return reference{gvk.Group, gvk.Kind, o.GetNamespace(), o.GetName()}
}

// prepare reads a file and finds out what objects it has.
func (a *applier) prepare(w *work) {
	w.seen, w.due = w.revision, time.Time{}
	w.result = result{Revision: w.revision}
	var err error
	if w.had, err = w.inventory(); err != nil {
		w.problem(document{}, err)
		w.unclear = true
	}
	wants := map[reference]bool{}
	content, err := w.content()
	if err == nil && !w.deleted {
		w.docs, err = parseFile(w.file, content)
	}
	if err != nil {
		w.problem(document{}, err)
		w.unclear = true
	}
	for i := range w.docs {
		d := &w.docs[i]
		if d.err != nil {
			w.problem(*d, d.err)
			w.unclear = true
			continue
		}
		if a.translate(d.object) {
			w.result.Remarks = append(w.result.Remarks, fmt.Sprintf("%s: taken as %s", refer(d.object), chartVersion))
		}
		if err := a.locate(d); err != nil {
			d.err = err
			w.again = true
			if meta.IsNoMatchError(err) {
				w.waits++
			} else {
				w.unclear = true
			}
			w.problem(*d, waiting(d.object, err))
			// Whether it is in a namespace is not known yet.
			r := refer(d.object)
			wants[r] = true
			r.Namespace = cmp.Or(r.Namespace, metav1.NamespaceDefault)
			wants[r] = true
			r.Namespace = ""
			wants[r] = true
			continue
		}
		if r := refer(d.object); wants[r] {
			d.err = errors.New("the file has this object twice; the first one counts")
			w.problem(*d, d.err)
		} else {
			wants[r] = true
		}
	}
	if w.unclear {
		for _, r := range w.had {
			wants[r] = true
		}
	}
	w.wants = wants
	slices.SortStableFunc(w.docs, func(x, y document) int { return cmp.Compare(x.rank(), y.rank()) })
}

func waiting(o *unstructured.Unstructured, err error) error {
	if !meta.IsNoMatchError(err) {
		return err
	}
	gvk := o.GroupVersionKind()
	return fmt.Errorf("the cluster has no kind %s in %s: it is applied when there is one; what brings it, an operator or a CustomResourceDefinition, is missing or not ready, or the name is mistyped",
		gvk.Kind, gvk.GroupVersion())
}

// k3s's HelmCharts, and those that Kedge has.
const (
	foreignCharts = "helm.cattle.io"
	chartVersion  = "helm.kedge.io/v1"
)

// translate makes a HelmChart of k3s one of Kedge's, which has the same fields, unless the cluster has that kind itself.
func (a *applier) translate(o *unstructured.Unstructured) bool {
	gvk := o.GroupVersionKind()
	if gvk.Group != foreignCharts || gvk.Kind != "HelmChart" {
		return false
	}
	if _, err := a.mapping(gvk); !meta.IsNoMatchError(err) {
		return false
	}
	if _, err := a.mapping(schema.FromAPIVersionAndKind(chartVersion, gvk.Kind)); err != nil {
		return false // --disable helm, or not there yet
	}
	o.SetAPIVersion(chartVersion)
	return true
}

// locate finds the resource of an object, and gives it the namespace that it is going to have.
func (a *applier) locate(d *document) error {
	m, err := a.mapping(d.object.GroupVersionKind())
	if err != nil {
		return err
	}
	switch {
	case m.Scope.Name() != meta.RESTScopeNameNamespace:
		d.object.SetNamespace("")
	case d.object.GetNamespace() == "":
		d.object.SetNamespace(metav1.NamespaceDefault)
	}
	return nil
}

func (a *applier) mapping(gvk schema.GroupVersionKind) (*meta.RESTMapping, error) {
	if a.mapper == nil {
		a.mapper = restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(a.disco))
	}
	if gvk.Version == "" {
		return a.mapper.RESTMapping(gvk.GroupKind())
	}
	return a.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
}

// resource is where an object is read and written.
func (a *applier) resource(gvk schema.GroupVersionKind, namespace string) (dynamic.ResourceInterface, error) {
	m, err := a.mapping(gvk)
	if err != nil {
		return nil, err
	}
	if m.Scope.Name() == meta.RESTScopeNameNamespace {
		return a.objects.Resource(m.Resource).Namespace(namespace), nil
	}
	return a.objects.Resource(m.Resource), nil
}

// owner is another file that has an object, the first by name.
func (a *applier) owner(r reference, but string) string {
	for _, name := range slices.Sorted(maps.Keys(a.files)) {
		if name != but && a.files[name].wants[r] {
			return name
		}
	}
	return ""
}

// applyFile applies what a file has.
func (a *applier) applyFile(ctx context.Context, w *work) {
	w.conclude = union(w.had, w.docs)
	if len(w.conclude) > len(w.had) {
		// Before anything is made: what this process makes before it is killed shall be found.
		if err := a.patch(ctx, w.record, map[string]any{keyInventory: w.conclude}); err != nil {
			w.problem(document{}, fmt.Errorf("note what the file has: %w", err))
			w.again, w.unclear = true, true
			return
		}
	}
	for _, d := range w.docs {
		if d.err != nil {
			continue
		}
		r := refer(d.object)
		if other := a.owner(r, w.file); other != "" && other < w.file {
			w.problem(d, fmt.Errorf("%s has this object, too, and counts; remove it from one of them", other))
			w.again = true
			continue
		}
		if err := a.applyObject(ctx, w.file, d.object); err != nil {
			w.problem(d, err)
			w.again = true
			continue
		}
		w.result.Objects++
	}
}

// union adds the objects of documents to a list.
func union(list []reference, docs []document) []reference {
	all := slices.Clone(list)
	for _, d := range docs {
		if d.err == nil && !slices.Contains(all, refer(d.object)) {
			all = append(all, refer(d.object))
		}
	}
	return all
}

// applyObject makes or changes an object. It is marked as the file's if it was not there before.
func (a *applier) applyObject(ctx context.Context, file string, o *unstructured.Unstructured) error {
	client, err := a.resource(o.GroupVersionKind(), o.GetNamespace())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	live, err := client.Get(ctx, o.GetName(), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		live = nil
	case err != nil:
		return err
	case live.GetDeletionTimestamp() != nil:
		return errors.New("it is being deleted; it is made again afterwards")
	}
	made := live == nil || live.GetAnnotations()[annotationManifest] != ""
	got, err := client.Apply(ctx, o.GetName(), mark(o, file, made), metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	if err != nil {
		return err
	}
	if live == nil && foreign(got) { // somebody was faster
		_, err = client.Apply(ctx, o.GetName(), mark(o, file, false), metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	}
	return err
}

// mark says in an object which file it is of, if the file made it.
func mark(o *unstructured.Unstructured, file string, made bool) *unstructured.Unstructured {
	o = o.DeepCopy()
	unstructured.RemoveNestedField(o.Object, "metadata", "managedFields") // of an object that was copied from a cluster
	for _, field := range []string{"resourceVersion", "uid", "creationTimestamp", "generation", "selfLink"} {
		unstructured.RemoveNestedField(o.Object, "metadata", field)
	}
	annotations := o.GetAnnotations()
	delete(annotations, annotationManifest)
	if made {
		if annotations == nil {
			annotations = map[string]string{}
		}
		annotations[annotationManifest] = file
	}
	o.SetAnnotations(annotations)
	return o
}

// foreign says whether somebody else has written to an object.
func foreign(o *unstructured.Unstructured) bool {
	return slices.ContainsFunc(o.GetManagedFields(), func(m metav1.ManagedFieldsEntry) bool { return m.Manager != fieldManager })
}

// rank is the place of a kind in the order of things: what others need comes first, what stands in others' way last.
func (d document) rank() int {
	if d.object == nil {
		return 0
	}
	return rank(d.object.GetKind())
}

func rank(kind string) int {
	order := []string{"Namespace", "CustomResourceDefinition", "PriorityClass", "StorageClass", "RuntimeClass", "ServiceAccount", "ClusterRole",
		"ClusterRoleBinding", "Role", "RoleBinding", "ResourceQuota", "LimitRange", "NetworkPolicy", "Secret", "ConfigMap", "PersistentVolume",
		"PersistentVolumeClaim", "Service"}
	if i := slices.Index(order, kind); i >= 0 {
		return i
	}
	return len(order) + max(0, 1+slices.Index([]string{"APIService", "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"}, kind))
}
