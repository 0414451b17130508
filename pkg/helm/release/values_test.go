// SPDX-License-Identifier: Apache-2.0

package release

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kedge-io/kedge/pkg/helm"
)

func TestValues(t *testing.T) {
	got, err := values(helm.Spec{
		ValuesContent: "a: 1\nb: {c: x, d: [1, 2]}\n# end\n",
		Values:        map[string]any{"b": map[string]any{"c": "y", "e": true}},
		Set:           map[string]any{"b.c": "z,1", "n": float64(3), "t": "true", "s": "1.5", "l[0]": "x"},
	})
	want := map[string]any{"a": float64(1), "b": map[string]any{"c": "z,1", "d": []any{float64(1), float64(2)}, "e": true},
		"n": int64(3), "t": true, "s": "1.5", "l": []any{"x"}}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v (-want +got)\n%s", err, diff)
	}
	if got, err := values(helm.Spec{ValuesContent: "# nothing\n"}); len(got) != 0 || err != nil {
		t.Errorf("%v %v", got, err)
	}
	for _, bad := range []helm.Spec{{ValuesContent: "a: ["}, {ValuesContent: "- a"}, {Set: map[string]any{"a[": "x"}}} {
		if _, err := values(bad); err == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
}
