// SPDX-License-Identifier: Apache-2.0

package check

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// TextOptions says how a report is written for people.
type TextOptions struct {
	Color bool // ANSI colours, for terminals
	Width int  // columns; 0 means 100
}

const (
	labelWidth = 5 // of the status
	nameWidth  = 18
)

// WriteText writes the report as a tree: groups, probes and, where they say more than the probe itself, its items.
func (r Report) WriteText(w io.Writer, o TextOptions) error {
	if o.Width == 0 {
		o.Width = 100
	}
	t := &textWriter{TextOptions: o}
	t.line(fmt.Sprintf("%s (%s)", r.Host, r.System))
	for _, g := range r.Groups {
		t.line("")
		t.line(t.paint("1", g.Name))
		for i, p := range g.Probes {
			t.node("", i == len(g.Probes)-1, Item{Name: p.Name, Result: p.Result})
		}
	}
	var counts []string
	for _, s := range slices.Backward(statuses()) {
		if n := r.Count[s]; n > 0 {
			counts = append(counts, fmt.Sprintf("%d %s", n, s))
		}
	}
	t.line("")
	t.wrap("", "", "Result: "+strings.Join(counts, ", ")+". "+r.verdict())
	_, err := io.WriteString(w, t.b.String())
	return err
}

func (r Report) verdict() string {
	switch r.Status {
	case Fail:
		return "Kedge cannot work properly on this machine until the failures are mended."
	case Warning, Unknown:
		return "Kedge can run on this machine."
	}
	return "This machine is ready for Kedge."
}

type textWriter struct {
	TextOptions
	b strings.Builder
}

// node writes one branch of the tree and everything below it.
func (t *textWriter) node(indent string, last bool, n Item) {
	branch, trunk := "├─ ", "│  "
	if last {
		branch, trunk = "└─ ", "   "
	}
	label := fmt.Sprintf("%-*s", labelWidth, t.label(n.Status))
	head := indent + branch + t.paint(color(n.Status), label) + " " + fmt.Sprintf("%-*s ", nameWidth, n.Name)
	below := indent + trunk + strings.Repeat(" ", labelWidth+1)
	// All items well: one line says it. Otherwise each gets its own, under the name of the probe.
	items := n.Items
	if n.Status == Pass && n.Finding != "" {
		items = nil
	}
	if len(n.Name) > nameWidth {
		t.line(strings.TrimRight(head, " ")) // a long name stands alone
		t.wrap(below, below, n.Finding)
	} else {
		t.wrap(head, below+strings.Repeat(" ", nameWidth+1), n.Finding)
	}
	if n.Status != Pass {
		for line := range strings.Lines(n.Remedy) {
			t.wrap(below+"> ", below+"  ", strings.TrimRight(line, "\n"))
		}
	}
	for i, item := range items {
		t.node(indent+trunk, i == len(items)-1, item)
	}
}

func (t *textWriter) label(s Status) string {
	switch s {
	case Warning:
		return "warn"
	case Fail:
		return "FAIL"
	case Unknown:
		return "?"
	}
	return string(s)
}

func color(s Status) string {
	switch s {
	case Pass:
		return "32"
	case Warning, Unknown:
		return "33"
	case Fail:
		return "1;31"
	}
	return "36"
}

func (t *textWriter) paint(code, s string) string {
	if !t.Color {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (t *textWriter) line(s string) { t.b.WriteString(s + "\n") }

// wrap writes text after first, broken at spaces so that the lines, which continue after rest, keep within the width.
// A command to type is never broken: people copy it.
func (t *textWriter) wrap(first, rest, text string) {
	room := max(t.Width-len([]rune(rest)), 30)
	prefix := first
	if strings.HasPrefix(text, "$ ") || text == "" {
		t.line(strings.TrimRight(prefix+text, " "))
		return
	}
	var line string
	flush := func() {
		t.line(strings.TrimRight(prefix+line, " "))
		prefix, line = rest, ""
	}
	for word := range strings.FieldsSeq(text) {
		if line != "" && len([]rune(line))+1+len([]rune(word)) > room {
			flush()
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	flush()
}
