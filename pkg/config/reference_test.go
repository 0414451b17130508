// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/tests/golden"
)

const (
	referencePath = "../../docs/reference.md"
	begin         = "<!-- begin of the generated part -->\n"
	end           = "<!-- end of the generated part -->\n"
)

// The options in docs/reference.md are generated from their declarations.
func TestReference(t *testing.T) {
	page, err := os.ReadFile(referencePath)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := bytes.Cut(page, []byte(begin))
	_, after, ok2 := bytes.Cut(rest, []byte(end))
	if !ok || !ok2 {
		t.Fatalf("%s has lost the comments around the generated part", referencePath)
	}
	golden.Compare(t, referencePath, string(bytes.Join([][]byte{before, []byte(begin), optionTables(), []byte(end), after}, nil)))
}

func optionTables() []byte {
	var b bytes.Buffer
	category := ""
	for _, o := range options() {
		if o.hidden {
			continue
		}
		if o.category != category {
			category = o.category
			fmt.Fprintf(&b, "\n### %s\n\n| Option | Default | |\n|---|---|---|\n", category)
		}
		name := "`--" + o.name + "`"
		if o.alias != "" {
			name += ", `-" + o.alias + "`"
		}
		if o.flagOnly {
			name += " (not in a file)"
		}
		if o.servers {
			name += " (servers)"
		}
		def := o.defText
		if o.def != "" {
			def = "`" + o.def + "`"
		}
		usage := o.usage
		if o.isList() {
			usage += " (list)"
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", name, def, strings.ReplaceAll(usage, "|", "\\|"))
	}
	b.WriteString("\n")
	return b.Bytes()
}

// Every declaration is complete and consistent with itself.
func TestOptions(t *testing.T) {
	seen := map[string]bool{}
	for _, o := range options() {
		if seen[o.name] || o.name != strings.ToLower(o.name) {
			t.Errorf("name %q", o.name)
		}
		seen[o.name] = true
		if o.usage == "" || o.category == "" || o.set == nil {
			t.Errorf("%s: incomplete", o.name)
		}
		if hint := optionHint(o.name); hint != "" {
			t.Errorf("%s exists, but has the hint %q", o.name, hint)
		}
		if o.def != "" {
			if err := o.set(&Config{}, []value{{o.def, "default"}}); err != nil {
				t.Errorf("%s: default: %v", o.name, err)
			}
		}
	}
}
