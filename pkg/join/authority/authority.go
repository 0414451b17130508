// SPDX-License-Identifier: Apache-2.0

// Package authority is the side of a cluster that admits machines, in the [controlplane] process: the approver of their certificate
// signing requests, the join API's handlers, the registry of servers, and the removal of servers that are gone. What it protects:
//
//   - A name belongs to one machine. Two that are alive never share one, not even when both ask in the same second; a machine
//     that was set up anew gets its old name back as soon as the old one is certainly silent.
//   - A token for agents makes agents: no server's name, no certificate that the API server's clients would take for it.
//   - The cluster's keys go to a server that proves itself by a certificate, and to nobody else.
//
// See docs/decisions/joining.md.
package authority

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// component is the value of the attribute "component" in log lines, and the source of events.
const component = "join"

// maxEventText is what the API takes.
const maxEventText = 1024

// recordEvent writes an Event about an object. An Event is a courtesy to people: without it the work goes on.
func recordEvent(ctx context.Context, client kubernetes.Interface, log *slog.Logger, about corev1.ObjectReference, kind, reason, message string) {
	namespace := about.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault // where events about things without a namespace are
	}
	now := metav1.Now()
	_, err := client.CoreV1().Events(namespace).Create(ctx, &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: namespace, GenerateName: strings.ToLower(about.Name) + "."},
		InvolvedObject: about,
		Type:           kind,
		Reason:         reason,
		Message:        message[:min(len(message), maxEventText)],
		Source:         corev1.EventSource{Component: "kedge-" + component},
		FirstTimestamp: now,
		LastTimestamp:  now,
		Count:          1,
	}, metav1.CreateOptions{})
	if err != nil && ctx.Err() == nil {
		log.Debug("event not recorded", "reason", reason, "message", message, "error", err)
	}
}

// ago is a time as people read it best: how long it is past, and when it was.
func ago(t, now time.Time) string {
	d := now.Sub(t).Round(time.Second)
	when := t.UTC().Format(time.RFC3339)
	if d < 0 {
		return fmt.Sprintf("at %s, which is %v ahead of this server's clock", when, -d)
	}
	return fmt.Sprintf("%v ago, at %s", d, when)
}

// lister is a typed client of one resource.
type lister[L runtime.Object] interface {
	List(ctx context.Context, o metav1.ListOptions) (L, error)
	Watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error)
}

// listWatcher is what an informer asks: for the object of a name, or for all if name is empty.
func listWatcher[L runtime.Object](client kubernetes.Interface, resource lister[L], name string) cache.ListerWatcher {
	only := func(o metav1.ListOptions) metav1.ListOptions {
		if name != "" {
			o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, name).String()
		}
		return o
	}
	return cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return resource.List(ctx, only(o))
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return resource.Watch(ctx, only(o))
		},
	}, client)
}
