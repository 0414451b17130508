// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
)

const (
	// keptTries is how often a namespace or kind that is not empty is looked at again, which takes about ten minutes.
	keptTries = 10
	// pageSize of a look into a namespace.
	pageSize = 500
)

// errKept says why something is not deleted.
type errKept struct{ why string }

func (e errKept) Error() string { return e.why }

// prune deletes what a file has no more: only what it made, and nothing while it is not clear what the file has.
func (a *applier) prune(ctx context.Context, w *work) {
	var gone []reference
	for _, r := range w.conclude {
		if !w.wants[r] {
			gone = append(gone, r)
		}
	}
	if w.unclear {
		return // wants has all of them
	}
	slices.SortStableFunc(gone, func(x, y reference) int { return cmp.Compare(rank(y.Kind), rank(x.Kind)) })
	for _, r := range gone {
		var kept errKept
		err := a.pruneObject(ctx, w.file, r)
		switch {
		case errors.As(err, &kept):
			w.result.Remarks = append(w.result.Remarks, fmt.Sprintf("%s is kept: %s", r, kept.why))
			if w.retry.tries < keptTries {
				w.again = true
				continue // it stays in the inventory
			}
		case err != nil:
			w.result.Problems = append(w.result.Problems, Problem{Object: r.String(), Error: "delete it: " + err.Error()})
			w.again = true
			continue
		}
		w.conclude = slices.DeleteFunc(w.conclude, func(x reference) bool { return x == r })
	}
}

func (a *applier) pruneObject(ctx context.Context, file string, r reference) error {
	if other := a.owner(r, file); other != "" {
		return nil // it has moved
	}
	client, err := a.resource(schema.GroupVersionKind{Group: r.Group, Kind: r.Kind}, r.Namespace)
	if meta.IsNoMatchError(err) {
		return nil // its kind is gone, and with it all of them
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	live, err := client.Get(ctx, r.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && (live.GetDeletionTimestamp() != nil || live.GetAnnotations()[annotationManifest] == "") {
		return nil // not there, or not made by a file
	}
	if err != nil {
		return err
	}
	switch {
	case r.Group == "" && r.Kind == "Namespace":
		err = a.emptyNamespace(ctx, r.Name)
	case r.Group == "apiextensions.k8s.io" && r.Kind == "CustomResourceDefinition":
		err = a.emptyKind(ctx, live)
	}
	if err != nil {
		return err
	}
	a.log.Info("deleting what its manifest has no more", "file", file, "object", r.String())
	uid, background := live.GetUID(), metav1.DeletePropagationBackground
	err = client.Delete(ctx, r.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}, PropagationPolicy: &background})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// emptyNamespace refuses a namespace in which others have put something: deleting it would delete that.
func (a *applier) emptyNamespace(ctx context.Context, name string) error {
	lists, err := a.disco.ServerPreferredResources()
	if err != nil && len(lists) == 0 {
		return err
	}
	if discovery.IsGroupDiscoveryFailedError(err) {
		return errKept{fmt.Sprintf("whether it is empty is not known: %v", err)}
	}
	for _, l := range discovery.FilteredBy(discovery.SupportsAllVerbs{Verbs: []string{"list", "delete"}}, lists) {
		gv, err := schema.ParseGroupVersion(l.GroupVersion)
		if err != nil {
			return err
		}
		for _, res := range l.APIResources {
			if !res.Namespaced || res.Name == "events" || res.Name == "endpoints" || res.Name == "endpointslices" {
				continue
			}
			others, err := a.others(ctx, gv.WithResource(res.Name), name)
			if err != nil {
				return err
			}
			if len(others) > 0 {
				return errKept{fmt.Sprintf("it has objects that are not of its manifest: %s %s; delete the namespace yourself if they are not needed", res.Name, strings.Join(others, ", "))}
			}
		}
	}
	return nil
}

// others are the first objects of a kind that somebody would miss: not those that Kubernetes puts into each namespace, that
// follow others, or that are being deleted already.
func (a *applier) others(ctx context.Context, gvr schema.GroupVersionResource, namespace string) ([]string, error) {
	list, err := a.metadata.Resource(gvr).Namespace(namespace).List(ctx, metav1.ListOptions{Limit: pageSize})
	if apierrors.IsNotFound(err) || apierrors.IsMethodNotSupported(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for %s in the namespace %s: %w", gvr.Resource, namespace, err)
	}
	var names []string
	for _, o := range list.Items {
		byDefault := gvr.Group == "" && (gvr.Resource == "configmaps" && o.Name == "kube-root-ca.crt" || gvr.Resource == "serviceaccounts" && o.Name == "default")
		if byDefault || len(o.OwnerReferences) > 0 || o.DeletionTimestamp != nil {
			continue
		}
		if names = append(names, o.Name); len(names) == 3 {
			break
		}
	}
	if list.Continue != "" && len(names) == 0 {
		names = append(names, fmt.Sprintf("(more than %d)", pageSize))
	}
	return names, nil
}

// emptyKind refuses a CustomResourceDefinition of which there are objects: deleting it would delete them.
func (a *applier) emptyKind(ctx context.Context, crd *unstructured.Unstructured) error {
	group, _, _ := unstructured.NestedString(crd.Object, "spec", "group")
	plural, _, _ := unstructured.NestedString(crd.Object, "spec", "names", "plural")
	versions, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
	for _, v := range versions {
		version, ok := v.(map[string]any)
		if served, _, _ := unstructured.NestedBool(version, "served"); !ok || !served {
			continue
		}
		name, _, _ := unstructured.NestedString(version, "name")
		others, err := a.others(ctx, schema.GroupVersionResource{Group: group, Version: name, Resource: plural}, metav1.NamespaceAll)
		if err != nil {
			return err
		}
		if len(others) > 0 {
			return errKept{fmt.Sprintf("there are objects of this kind: %s; delete it yourself if they are not needed", strings.Join(others, ", "))}
		}
		return nil
	}
	return nil
}
