// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// figures are the lines of the table, in its order.
var figures = []struct{ name, text, unit string }{
	{"fresh readyz", "start, fresh data: /readyz", "s"},
	{"fresh node", "start, fresh data: node Ready", "s"},
	{"fresh accepted", "start, fresh data: first pod accepted", "s"},
	{"fresh pod", "start, fresh data: first pod Running", "s"},
	{"fresh cpu", "start, fresh data: CPU until then", "s"},
	{"again readyz", "restart: /readyz", "s"},
	{"again node", "restart: node Ready", "s"},
	{"again accepted", "restart: new pod accepted", "s"},
	{"again pod", "restart: new pod Running", "s"},
	{"again cpu", "restart: CPU until then", "s"},
	{"stop", "stop", "s"},
	{"idle pss", "no pods: PSS", "MiB"},
	{"idle anon", "no pods: anonymous memory", "MiB"},
	{"idle processes", "no pods: processes", ""},
	{"idle cpu", "no pods: CPU per minute", "s"},
	{"idle written", "no pods: written per minute, by process", "MB"},
	{"idle device", "no pods: written per minute, at the disk", "MB"},
	{"idle fsyncs", "no pods: fsyncs per minute", ""},
	{"idle flushes", "no pods: disk flushes per minute", ""},
	{"pods running", "20 pods: until all run", "s"},
	{"pods pss", "20 pods: PSS", "MiB"},
	{"pods anon", "20 pods: anonymous memory", "MiB"},
	{"pods processes", "20 pods: processes", ""},
	{"pods cpu", "20 pods: CPU per minute", "s"},
	{"pods written", "20 pods: written per minute, by process", "MB"},
	{"pods device", "20 pods: written per minute, at the disk", "MB"},
	{"pods fsyncs", "20 pods: fsyncs per minute", ""},
	{"pods flushes", "20 pods: disk flushes per minute", ""},
	{"files", "programs: files", ""},
	{"size", "programs: size", "MB"},
	{"xz", "programs: size as xz", "MB"},
}

// Sample is one measured value.
type Sample struct {
	Side   string
	Run    int
	Figure string
	Value  float64
	Unit   string
	Load   float64 // load average of the host at that moment
}

// Detail is what stands behind a sum.
type Detail struct {
	Side   string
	Run    int
	Pods   string         // idle or pods
	Memory []Memory       `json:",omitempty"`
	Syncs  map[string]int `json:",omitempty"` // calls by process and system call
}

type results struct {
	samples []Sample
	details []Detail
}

// recorder takes the values of one run of one side.
type recorder struct {
	*results
	side  string
	run   int
	parts []string
}

func (r *recorder) add(figure string, value float64) {
	s := Sample{Side: r.side, Run: r.run, Figure: figure, Value: value}
	for _, f := range figures {
		if f.name == figure {
			s.Unit = f.unit
		}
	}
	if l, err := load(); err == nil {
		s.Load = l
	}
	r.samples = append(r.samples, s)
	r.parts = append(r.parts, figure+" "+strings.TrimSpace(number2(value)+" "+s.Unit))
}

func (r *recorder) memory(pods string, m []Memory) {
	r.add(pods+" pss", m[0].PSS)
	r.add(pods+" anon", m[0].Anonymous)
	r.add(pods+" processes", float64(m[0].Processes))
	r.details = append(r.details, Detail{Side: r.side, Run: r.run, Pods: pods, Memory: m})
}

func (r *recorder) calls(pods string, calls map[string]int) {
	r.details = append(r.details, Detail{Side: r.side, Run: r.run, Pods: pods, Syncs: calls})
}

// line says what was recorded.
func (r *recorder) line() string { return strings.Join(r.parts, ", ") }

// number2 writes a number with as many digits as mean something.
func number2(v float64) string {
	digits := 2
	switch {
	case v == float64(int64(v)):
		digits = 0
	case v >= 100:
		digits = 0
	case v >= 10:
		digits = 1
	}
	return strconv.FormatFloat(v, 'f', digits, 64)
}

// Row is a line of the table: of each side its median, least and greatest value.
type Row struct {
	Figure, Unit string
	Sides        map[string][3]float64
	Ratio        float64 `json:",omitempty"` // of the medians, Kedge to stock
}

func (res *results) rows() []Row {
	var rows []Row
	for _, f := range figures {
		row := Row{Figure: f.text, Unit: f.unit, Sides: map[string][3]float64{}}
		values := map[string][]float64{}
		for _, s := range res.samples {
			if s.Figure == f.name {
				values[s.Side] = append(values[s.Side], s.Value)
			}
		}
		for side, v := range values {
			slices.Sort(v)
			row.Sides[side] = [3]float64{median(v), v[0], v[len(v)-1]}
		}
		if stock, both := row.Sides["stock"]; both && stock[0] > 0 && values["kedge"] != nil {
			row.Ratio = row.Sides["kedge"][0] / stock[0]
		}
		if len(values) > 0 {
			rows = append(rows, row)
		}
	}
	return rows
}

// median of sorted values.
func median(v []float64) float64 {
	n := len(v)
	if n%2 == 1 {
		return v[n/2]
	}
	return (v[n/2-1] + v[n/2]) / 2
}

// write prints the table and what stands behind it, and writes everything to the output file.
func (res *results) write(w io.Writer, o options) error {
	if len(res.samples) == 0 {
		return nil
	}
	rows := res.rows()
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\nfigure\tstock\tkedge\tkedge/stock")
	for _, r := range rows {
		ratio := ""
		if r.Ratio > 0 {
			ratio = strconv.FormatFloat(r.Ratio, 'f', 2, 64)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", r.Figure, cell(r, "stock"), cell(r, "kedge"), ratio)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, d := range res.details {
		printDetail(w, d)
	}
	f, err := os.Create(o.output)
	if err != nil {
		return err
	}
	enc := json.NewEncoder(f)
	enc.SetIndent("", "  ")
	err = enc.Encode(struct {
		Time    time.Time
		Rows    []Row
		Samples []Sample
		Details []Detail
	}{time.Now().UTC(), rows, res.samples, res.details})
	return errors.Join(err, f.Close())
}

func cell(r Row, side string) string {
	v, ok := r.Sides[side]
	if !ok {
		return "-"
	}
	text := strings.TrimSpace(number2(v[0]) + " " + r.Unit)
	if v[1] != v[2] {
		text += " (" + number2(v[1]) + "-" + number2(v[2]) + ")"
	}
	return text
}

func printDetail(w io.Writer, d Detail) {
	name := map[string]string{"idle": "no pods", "pods": "20 pods"}[d.Pods]
	if d.Syncs != nil {
		var parts []string
		for _, call := range slices.Sorted(maps.Keys(d.Syncs)) {
			parts = append(parts, fmt.Sprintf("%s %d", call, d.Syncs[call]))
		}
		fmt.Fprintf(w, "\n%s run %d, %s: %s\n", d.Side, d.Run, name, strings.Join(parts, ", "))
		return
	}
	fmt.Fprintf(w, "\n%s run %d, %s: processes, PSS, anonymous (MiB)\n", d.Side, d.Run, name)
	for _, m := range d.Memory {
		fmt.Fprintf(w, "  %-28s %3d %7.1f %7.1f\n", m.Name, m.Processes, m.PSS, m.Anonymous)
	}
}
