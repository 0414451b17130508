// SPDX-License-Identifier: Apache-2.0

package release

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"helm.sh/helm/v4/pkg/strvals"
	"sigs.k8s.io/yaml"

	"github.com/kedge-io/kedge/pkg/helm"
)

// values puts together what the chart is configured with.
func values(s helm.Spec) (map[string]any, error) {
	all := map[string]any{}
	if err := yaml.Unmarshal([]byte(s.ValuesContent), &all); err != nil {
		return nil, fmt.Errorf("valuesContent: %w", err)
	}
	if all == nil { // there was nothing but comments
		all = map[string]any{}
	}
	merge(all, s.Values)
	for _, key := range slices.Sorted(maps.Keys(s.Set)) {
		if err := set(all, key, s.Set[key]); err != nil {
			return nil, fmt.Errorf("set: %s: %w", key, err)
		}
	}
	return all, nil
}

// merge puts what is in from into to, and replaces what both have unless it is a map.
func merge(to, from map[string]any) {
	for key, value := range from {
		a, ok1 := to[key].(map[string]any)
		b, ok2 := value.(map[string]any)
		if ok1 && ok2 {
			merge(a, b)
		} else {
			to[key] = value
		}
	}
}

// set is helm's --set for what looks like a number, true, false or null, and --set-string for other texts, as k3s has it.
func set(all map[string]any, key string, value any) error {
	text := fmt.Sprint(value)
	if f, ok := value.(float64); ok {
		text = strconv.FormatFloat(f, 'f', -1, 64)
	}
	if strings.Count(key, "[") != strings.Count(key, "]") { // the library takes it for the end, and says nothing
		return errors.New("a bracket is not closed")
	}
	pair := key + "=" + strings.ReplaceAll(text, ",", `\,`)
	_, err := strconv.ParseInt(text, 10, 64)
	if err == nil || slices.Contains([]string{"true", "false", "null"}, text) {
		return strvals.ParseInto(pair, all)
	}
	return strvals.ParseIntoString(pair, all)
}
