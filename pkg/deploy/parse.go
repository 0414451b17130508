// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	"sigs.k8s.io/yaml"
)

// document is one object of a file, or why there is none. Documents count from 1, as lines do; the items of a List share theirs.
type document struct {
	number, line int
	object       *unstructured.Unstructured
	err          error
}

// where says which part of a file is meant, for a person with an editor.
func (d document) where() string { return fmt.Sprintf("document %d (line %d)", d.number, d.line) }

// errEmpty is for a file without a byte in it: half-written, or what a power failure left of it. It does not mean that its objects are to go.
var errEmpty = errors.New("the file is empty; what it had before stays as it is: write it again, or remove it")

// parseFile takes a file apart. What is wrong with one document is in it; the others are as they are.
func parseFile(name string, content []byte) ([]document, error) {
	if len(bytes.TrimSpace(content)) == 0 {
		return nil, errEmpty
	}
	if !utf8.Valid(content) {
		return nil, errors.New("this is no text in UTF-8; YAML and JSON are")
	}
	var docs []document
	parts := splitYAML(content)
	if filepath.Ext(name) == ".json" {
		parts = splitJSON(content)
	}
	for i, part := range parts {
		part.number = i + 1
		docs = append(docs, part.objects()...)
	}
	return docs, nil
}

// part is the text of one document.
type part struct {
	number, line int
	text         []byte
	err          error
}

// splitYAML cuts at lines that begin with "---", as YAML does, and leaves out what has nothing but comments and directives. It does not
// read the documents: an error in one must not hide the next.
func splitYAML(content []byte) []part {
	var parts []part
	current, line := part{line: 1}, 0
	flush := func() {
		if !blank(current.text) {
			// The line of the first word, not that of the comment above it.
			for l := range bytes.Lines(current.text) {
				if !blank(l) {
					break
				}
				current.line++
			}
			parts = append(parts, current)
		}
	}
	for text := range bytes.Lines(content) {
		line++
		rest, ok := bytes.CutPrefix(text, []byte("---"))
		if !ok || len(rest) > 0 && !bytes.ContainsRune([]byte(" \t\r\n"), rune(rest[0])) {
			current.text = append(current.text, text...)
			continue
		}
		flush()
		current = part{line: line, text: slices.Clone(rest)}
	}
	flush()
	return parts
}

// blank says whether a text has nothing but comments, directives and markers.
func blank(text []byte) bool {
	for line := range bytes.Lines(text) {
		trimmed := bytes.TrimSpace(line)
		if len(trimmed) > 0 && trimmed[0] != '#' && line[0] != '%' && string(trimmed) != "..." {
			return false
		}
	}
	return true
}

// splitJSON reads one value after the other. After one that is no JSON there is nothing to hold on to.
func splitJSON(content []byte) []part {
	var parts []part
	dec := json.NewDecoder(bytes.NewReader(content))
	for {
		var raw json.RawMessage
		err := dec.Decode(&raw)
		if errors.Is(err, io.EOF) {
			return parts
		}
		end := int(dec.InputOffset())
		line := 1 + bytes.Count(content[:max(0, end-len(raw))], []byte("\n"))
		if err != nil {
			return append(parts, part{line: line, err: err})
		}
		parts = append(parts, part{line: line, text: raw})
	}
}

// objects reads a document.
func (p part) objects() []document {
	fail := func(err error) []document { return []document{{number: p.number, line: p.line, err: err}} }
	if p.err != nil {
		return fail(p.err)
	}
	text, err := yaml.YAMLToJSONStrict(p.text)
	if err != nil {
		return fail(errors.New(strings.TrimPrefix(err.Error(), "error converting YAML to JSON: ")))
	}
	var value any
	if err := utiljson.Unmarshal(text, &value); err != nil {
		return fail(err)
	}
	if value == nil {
		return nil // "null", or "--- # nothing"
	}
	object, ok := value.(map[string]any)
	if !ok {
		return fail(errors.New("this is no object: apiVersion, kind and metadata are missing"))
	}
	var docs []document
	for _, o := range flatten(object, 0) {
		d := document{number: p.number, line: p.line}
		if d.err = check(o); d.err == nil {
			d.object = &unstructured.Unstructured{Object: o}
		}
		docs = append(docs, d)
	}
	return docs
}

// maxNesting of Lists in Lists. Nobody writes more than one.
const maxNesting = 4

// flatten gives the items of a List, and any other object itself.
func flatten(object map[string]any, depth int) []map[string]any {
	kind, _ := object["kind"].(string)
	items, ok := object["items"].([]any)
	if !ok || !strings.HasSuffix(kind, "List") || depth == maxNesting {
		return []map[string]any{object}
	}
	var all []map[string]any
	for _, item := range items {
		if o, ok := item.(map[string]any); ok {
			all = append(all, flatten(o, depth+1)...)
		} else {
			all = append(all, nil)
		}
	}
	return all
}

// check refuses what could not be applied, or not be found again.
func check(o map[string]any) error {
	text := func(fields ...string) string {
		s, _, _ := unstructured.NestedString(o, fields...) // of another type: as good as missing
		return s
	}
	kind := text("kind")
	switch {
	case o == nil:
		return errors.New("this item of a List is no object")
	case text("apiVersion") == "":
		return errors.New("apiVersion is missing")
	case kind == "":
		return errors.New("kind is missing")
	case text("metadata", "name") == "" && text("metadata", "generateName") != "":
		return fmt.Errorf("%s: an object here needs a name of its own: with generateName each start would make another", kind)
	case text("metadata", "name") == "":
		return fmt.Errorf("%s: metadata.name is missing", kind)
	}
	if ns, there, err := unstructured.NestedFieldNoCopy(o, "metadata", "namespace"); there && err == nil {
		if _, ok := ns.(string); !ok {
			return fmt.Errorf("%s %s: metadata.namespace is no text", kind, text("metadata", "name"))
		}
	}
	for _, field := range []string{"labels", "annotations"} {
		if _, _, err := unstructured.NestedStringMap(o, "metadata", field); err != nil {
			return fmt.Errorf("%s %s: metadata.%s has something that is no text: put numbers, true and false into quotes", kind, text("metadata", "name"), field)
		}
	}
	return nil
}
