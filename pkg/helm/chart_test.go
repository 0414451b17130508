// SPDX-License-Identifier: Apache-2.0

package helm

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/tools/record"
)

func object(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	o := &unstructured.Unstructured{}
	if err := json.Unmarshal([]byte(text), &o.Object); err != nil {
		t.Fatal(err)
	}
	o.SetAPIVersion("helm.kedge.io/v1")
	o.SetKind("HelmChart")
	o.SetNamespace("ns")
	if o.GetName() == "" {
		o.SetName("c")
	}
	return o
}

func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		`{"spec":{}}`:                             "spec: neither chart nor chartContent is given",
		`{"spec":{"chart":"a","timeout":"0s"}}`:   "spec.timeout: 0s is no time to wait",
		`{"spec":{"chart":"a","timeout":"soon"}}`: `spec: `,
		`{"spec":{"chart":"a"},"metadata":{"name":"` + strings.Repeat("x", 54) + `"}}`:      "the name has 54 characters",
		`{"spec":{"chart":"a","timeout":"1m","values":{"a":{"b":[1,null]}},"set":{"x":1}}}`: "",
	} {
		_, err := parse(object(t, text))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	hash := func(text string) string {
		c, err := parse(object(t, text))
		if err != nil {
			t.Fatal(err)
		}
		return c.hash()
	}
	if c, err := parse(object(t, `{"spec":{"chart":"a","authSecret":{"name":"s"}}}`)); err != nil || c.spec.AuthSecret.Name != "s" {
		t.Errorf("authSecret: %+v, %v", c.spec.AuthSecret, err)
	}
	base := `{"spec":{"chart":"a","values":{"x":1,"y":2}}}`
	if hash(base) != hash(`{"spec":{"values":{"y":2,"x":1},"chart":"a","jobImage":"z"},"metadata":{"labels":{"l":"1"}}}`) {
		t.Error("what does not decide about the release changes the hash")
	}
	for _, other := range []string{`{"spec":{"chart":"a","values":{"x":1,"y":3}}}`, `{"spec":{"chart":"a","values":{"x":1,"y":2},"targetNamespace":"t"}}`,
		`{"spec":{"chart":"a","values":{"x":1,"y":2}},"metadata":{"annotations":{"helm.kedge.io/retry":"1"}}}`} {
		if hash(base) == hash(other) {
			t.Errorf("%s has the hash of %s", other, base)
		}
	}
	c, err := parse(object(t, `{"spec":{"chart":"a","jobImage":"x","bootstrap":true,"backOffLimit":1}}`))
	if got := strings.Join(c.ignored(), " "); got != "backOffLimit jobImage" || err != nil {
		t.Errorf("ignored: %s %v", got, err)
	}
}

// TestReconcile: one release is worked on when there is a reason, and no more often.
func TestReconcile(t *testing.T) {
	resource := Resource()
	client := fake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{resource: "HelmChartList"}, object(t, `{"spec":{"chart":"a"}}`))
	var verbs []Verb
	var next Result
	var nextErr error
	c := &Controller{log: slog.New(slog.NewTextHandler(io.Discard, nil)), charts: client.Resource(resource), events: record.NewFakeRecorder(100),
		run: func(_ context.Context, r Request) (Result, error) {
			verbs = append(verbs, r.Verb)
			return next, nextErr
		}}
	key := types.NamespacedName{Namespace: "ns", Name: "c"}
	step := func(what string, works bool, wantAgain bool, ready metav1.ConditionStatus, stalled bool) {
		t.Helper()
		before := len(verbs)
		again, err := c.reconcile(t.Context(), key)
		if err != nil || again != wantAgain || (len(verbs) > before) != works {
			t.Errorf("%s: worked %v, again %v, %v", what, len(verbs) > before, again, err)
		}
		o, err := c.charts.Namespace("ns").Get(t.Context(), "c", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		ch, err := parse(o)
		if err != nil {
			t.Fatal(err)
		}
		cond := meta.FindStatusCondition(ch.status.Conditions, conditionReady)
		if cond == nil || cond.Status != ready || meta.IsStatusConditionTrue(ch.status.Conditions, conditionStalled) != stalled {
			t.Errorf("%s: %+v", what, ch.status.Conditions)
		}
	}
	change := func(version string) {
		t.Helper()
		_, err := c.charts.Namespace("ns").Patch(t.Context(), "c", types.MergePatchType, []byte(`{"spec":{"version":"`+version+`"}}`), metav1.PatchOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	next = Result{Error: "no such host"}
	step("no network", true, true, metav1.ConditionFalse, false)
	step("again", true, true, metav1.ConditionFalse, false)
	next = Result{Error: "not ready", Touched: true, Status: "failed", Revision: 1}
	step("a first installation that does not become ready", true, true, metav1.ConditionFalse, false)
	next = Result{Status: "deployed", Revision: 2, Chart: "a-1"}
	step("installed", true, false, metav1.ConditionTrue, false)
	step("nothing to do", false, false, metav1.ConditionTrue, false)
	change("2")
	next = Result{Error: "not ready", Touched: true, RolledBack: true, Status: "deployed", Revision: 4}
	step("rolled back", true, false, metav1.ConditionFalse, true)
	step("given up", false, false, metav1.ConditionFalse, true)
	change("3")
	nextErr = errors.New("killed")
	step("the process was killed", true, true, metav1.ConditionFalse, false)
	nextErr, next = nil, Result{Status: "deployed", Revision: 5}
	step("the next one", true, false, metav1.ConditionTrue, false)
	if _, err := c.charts.Namespace("ns").Patch(t.Context(), "c", types.MergePatchType, []byte(`{"spec":{"targetNamespace":"elsewhere"}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	step("moved", false, false, metav1.ConditionFalse, true)
}
