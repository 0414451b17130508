// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// fileValues are the values from configuration files, by option name.
type fileValues map[string][]value

// readFiles reads path and then path.d/*.yaml in lexical order. A missing path is an error only if mustExist.
func (f fileValues) readFiles(path string, mustExist bool) error {
	var errs []error
	data, err := os.ReadFile(path)
	switch {
	case err == nil:
		errs = append(errs, f.parse(path, data))
	case !errors.Is(err, fs.ErrNotExist) || mustExist:
		errs = append(errs, fmt.Errorf("configuration file: %w", err))
	}
	dir := path + ".d"
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, fmt.Errorf("directory of configuration files: %w", err))
	}
	for _, entry := range entries { // ReadDir sorts by name
		if ext := filepath.Ext(entry.Name()); entry.IsDir() || (ext != ".yaml" && ext != ".yml") {
			continue
		}
		part := filepath.Join(dir, entry.Name())
		data, err := os.ReadFile(part)
		if err != nil {
			errs = append(errs, fmt.Errorf("configuration file: %w", err))
			continue
		}
		errs = append(errs, f.parse(part, data))
	}
	return errors.Join(errs...)
}

// parse adds what one file says: a key replaces what earlier files said, a list key with "+" at its end adds to it.
func (f fileValues) parse(path string, data []byte) error {
	root, err := document(data)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if root == nil {
		return nil
	}
	if root.Kind != yaml.MappingNode {
		return fmt.Errorf("%s:%d: the file must consist of lines of the form key: value", path, root.Line)
	}
	var errs []error
	all := options()
	first := map[string]int{}
	for i := 0; i+1 < len(root.Content); i += 2 {
		key, node := root.Content[i], resolve(root.Content[i+1])
		at := func(err error) error { return fmt.Errorf("%s:%d: %s: %w", path, key.Line, key.Value, err) }
		if line, seen := first[key.Value]; seen {
			errs = append(errs, at(fmt.Errorf("already given in line %d", line)))
			continue
		}
		first[key.Value] = key.Line

		name, add := strings.CutSuffix(key.Value, "+")
		index := slices.IndexFunc(all, func(o *option) bool { return o.name == name })
		if index < 0 {
			errs = append(errs, fmt.Errorf("%s:%d: %w", path, key.Line,
				unknownName("key", key.Value, name, func(o *option) string { return o.name })))
			continue
		}
		o := all[index]
		if o.flagOnly {
			errs = append(errs, at(fmt.Errorf("cannot be given in a file; use --%s or %s", o.name, o.env())))
			continue
		}
		if add && !o.isList() {
			errs = append(errs, at(errors.New("only lists can be added to with a + at the end of the key")))
			continue
		}
		values, err := o.nodeValues(path, node)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if add {
			values = append(slices.Clip(f[name]), values...)
		}
		f[name] = values
	}
	return errors.Join(errs...)
}

// document gives the root node of the only YAML document, nil if there is none.
func document(data []byte) (*yaml.Node, error) {
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	var doc, second yaml.Node
	switch err := decoder.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, nil
	case err != nil:
		return nil, err
	}
	if err := decoder.Decode(&second); err == nil {
		return nil, fmt.Errorf("line %d begins a second YAML document; there must be only one", second.Line)
	} else if !errors.Is(err, io.EOF) {
		return nil, err
	}
	root := resolve(doc.Content[0])
	if root.Kind == yaml.ScalarNode && root.ShortTag() == "!!null" {
		return nil, nil
	}
	return root, nil
}

func resolve(node *yaml.Node) *yaml.Node {
	if node.Kind == yaml.AliasNode {
		return node.Alias
	}
	return node
}

// nodeValues reads the value of one key. Scalars keep the text that stands in the file: 0640 stays 0640.
func (o *option) nodeValues(path string, node *yaml.Node) ([]value, error) {
	at := func(node *yaml.Node) string { return fmt.Sprintf("%s:%d: %s", path, node.Line, o.name) }
	if node.Kind == yaml.SequenceNode && o.isList() {
		values := []value{} // not nil: an empty list replaces too
		var errs []error
		for _, item := range node.Content {
			item = resolve(item)
			text, err := o.scalarText(item)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", at(item), err))
				continue
			}
			values = append(values, o.split(text, at(item))...)
		}
		return values, errors.Join(errs...)
	}
	text, err := o.scalarText(node)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", at(node), err)
	}
	return o.split(text, at(node)), nil
}

func (o *option) scalarText(node *yaml.Node) (string, error) {
	accepted := map[kind]string{
		scalar:   "a single value",
		boolean:  "true or false",
		list:     "a list of values, or one value",
		argument: "a list of key=value, or one key=value",
	}[o.kind]
	switch {
	case node.Kind == yaml.MappingNode:
		return "", fmt.Errorf("is a map; accepted: %s", accepted)
	case node.Kind != yaml.ScalarNode:
		return "", fmt.Errorf("is a list; accepted: %s", accepted)
	}
	switch tag := node.ShortTag(); {
	case tag == "!!null":
		return "", fmt.Errorf("has no value; accepted: %s", accepted)
	case o.kind == boolean && tag != "!!bool":
		return "", fmt.Errorf("%q is not a truth value; accepted: %s", node.Value, accepted)
	case o.kind != boolean && tag == "!!bool":
		return "", fmt.Errorf("%s is a truth value; accepted: %s (put it in quotes if you mean the text)", node.Value, accepted)
	}
	return node.Value, nil
}
