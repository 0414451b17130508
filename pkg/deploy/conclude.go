// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// loud is after how many tries an error is worth an event: what waits for a namespace or a new kind succeeds within one or two.
const loud = 3

// conclude writes down what came of a file.
func (a *applier) conclude(ctx context.Context, w *work) {
	res := &w.result
	res.At = time.Now().UTC().Truncate(time.Second)
	switch {
	case len(res.Problems) > 0 && w.waits == len(res.Problems):
		res.State = Waiting
	case len(res.Problems) > 0:
		res.State = Failed
	case w.deleted:
		res.State = Removed
	default:
		res.State = Applied
	}
	slices.SortFunc(w.conclude, func(x, y reference) int { return cmp.Compare(x.String(), y.String()) })
	change := map[string]any{}
	if !slices.Equal(w.conclude, w.had) {
		change[keyInventory] = w.conclude
	}
	before := w.record.result()
	said := before
	said.At = res.At
	if !equal(said, *res) {
		change[keyStatus] = *res
	}
	if len(change) > 0 {
		if err := a.patch(ctx, w.record, change); err != nil && !apierrors.IsNotFound(err) && ctx.Err() == nil {
			a.log.Warn("status of a manifest", "file", w.file, "error", err)
			w.again = true
		}
	}
	w.bad = len(res.Problems) > 0
	if w.again {
		w.due = time.Now().Add(w.retry.next())
	} else {
		w.retry = retry{}
	}
	a.tell(w, before)
}

// tell logs, and makes an event of, what is news about a file.
func (a *applier) tell(w *work, before result) {
	res := w.result
	switch {
	case len(res.Problems) > 0:
		if w.again && w.retry.tries != loud || !w.again && before.Revision == res.Revision && slices.Equal(before.Problems, res.Problems) {
			return
		}
		for _, p := range res.Problems {
			a.log.Warn("manifest", "file", w.file, "problem", p.String())
		}
		message := fmt.Sprintf("%s: %s", w.file, res.Problems[0])
		if n := len(res.Problems) - 1; n > 0 {
			message += fmt.Sprintf(" (and %d more: kedge manifests %s)", n, w.file)
		}
		a.event(w.record, corev1.EventTypeWarning, "Failed", message)
	case before.Revision != res.Revision || before.State != res.State:
		a.log.Info("manifest "+string(res.State), "file", w.file, "revision", res.Revision, "objects", res.Objects)
		a.event(w.record, corev1.EventTypeNormal, map[State]string{Applied: "Applied", Removed: "Removed"}[res.State],
			fmt.Sprintf("%s, revision %d, %d objects", w.file, res.Revision, res.Objects))
	}
}

func equal(a, b result) bool {
	return a.Revision == b.Revision && a.State == b.State && a.Objects == b.Objects && slices.Equal(a.Problems, b.Problems) && slices.Equal(a.Remarks, b.Remarks)
}

// patch writes the leader's part of a record.
func (a *applier) patch(ctx context.Context, r record, parts map[string]any) error {
	data := map[string][]byte{}
	for key, value := range parts {
		b, err := json.Marshal(value)
		if err != nil {
			return err
		}
		data[key] = b
	}
	b, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": r.secret.UID}, "data": data})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	_, err = a.cfg.Client.CoreV1().Secrets(r.secret.Namespace).Patch(ctx, r.secret.Name, types.MergePatchType, b, metav1.PatchOptions{FieldManager: fieldManager})
	return err
}
