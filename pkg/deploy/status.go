// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
)

// FileStatus is what the cluster knows of a file in the manifests directories.
type FileStatus struct {
	File     string `json:"file"`
	Revision int64  `json:"revision"` // counts the file's changes, from 1
	State    State  `json:"state"`
	Removed  bool   `json:"removed,omitempty"` // the file is gone; State says whether its objects are
	Objects  int    `json:"objects"`           // that are applied
	// Problems are errors, Remarks what is no error but not as one may think.
	Problems  []Problem `json:"problems,omitempty"`
	Remarks   []string  `json:"remarks,omitempty"`
	ChangedBy string    `json:"changedBy"` // the node in whose directory it was changed last
	ChangedAt time.Time `json:"changedAt"`
	// AppliedAt is when the leader last had something new to say; nil: not yet.
	AppliedAt *time.Time `json:"appliedAt,omitempty"`
}

// List gives the status of all files by name, those that were removed included.
func List(ctx context.Context, client kubernetes.Interface) ([]FileStatus, error) {
	secrets, err := client.CoreV1().Secrets(recordNamespace).List(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("type", recordType).String()})
	if err != nil {
		return nil, err
	}
	all := []FileStatus{}
	var errs []error
	for i := range secrets.Items {
		r, err := parseRecord(&secrets.Items[i])
		if err != nil {
			errs = append(errs, err)
			continue
		}
		res := r.result()
		st := FileStatus{File: r.file, Revision: r.revision, State: res.State, Removed: r.deleted, Objects: res.Objects, Problems: res.Problems,
			Remarks: res.Remarks, ChangedBy: r.by, ChangedAt: r.at}
		if !res.At.IsZero() {
			st.AppliedAt = &res.At
		}
		all = append(all, st)
	}
	slices.SortFunc(all, func(a, b FileStatus) int { return cmp.Compare(a.File, b.File) })
	return all, errors.Join(errs...)
}
