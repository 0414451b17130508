// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// figure is a line of the table.
type figure struct{ name, text, unit string }

// figures are the lines of the table, in its order.
func figures() []figure {
	return slices.Concat([]figure{
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
	}, usage("idle"), []figure{
		{"pods running", contextName("pods") + ": until all run", "s"},
	}, usage("pods"), []figure{
		{"files", "programs: files", ""},
		{"size", "programs: size", "MB"},
		{"xz", "programs: size as xz", "MB"},
		{"join agent", "agent joins: node Ready", "s"},
		{"join agent cpu", "agent joins: CPU until then", "s"},
		{"join voter", "server joins: voter in the datastore", "s"},
		{"join server", "server joins: voter and node Ready", "s"},
		{"join server cpu", "server joins: CPU until then", "s"},
		{"failover " + inUse, "fail-over: the server in use loses its power", "s"},
		{"failover " + leading, "fail-over: the leader of etcd loses its power", "s"},
		{"failover " + inUseLeading, "fail-over: one that is both loses its power", "s"},
		{"failover " + cutOff, "fail-over: one that is both is cut off", "s"},
	}, usage("agent"), usage("server"), usage("servers"), networkFigures(), serviceFigures(), virtualFigures(), dnsFigures(), policyFigures())
}

// usage are the lines of what something uses while it is idle.
func usage(what string) []figure {
	name := contextName(what) + ": "
	return []figure{
		{what + " pss", name + "PSS", "MiB"},
		{what + " anon", name + "anonymous memory", "MiB"},
		{what + " processes", name + "processes", ""},
		{what + " cpu", name + "CPU per minute", "s"},
		{what + " written", name + "written per minute, by process", "MB"},
		{what + " device", name + "written per minute, at the disk", "MB"},
		{what + " fsyncs", name + "fsyncs per minute", ""},
		{what + " flushes", name + "disk flushes per minute", ""},
	}
}

// contextName is what the report calls something whose use is measured.
func contextName(what string) string {
	names := map[string]string{
		"idle": "no pods", "pods": "20 pods", "agent": "agent", "server": "each of three servers", "servers": "three servers together",
	}
	if name, ok := names[what]; ok {
		return name
	}
	return what
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
	What   string             // is measured: idle, pods, or a machine of a cluster
	Memory []Memory           `json:",omitempty"`
	Syncs  map[string]float64 `json:",omitempty"` // calls a minute by process and system call
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
	for _, f := range figures() {
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

// reading takes what something uses while it is idle.
func (r *recorder) reading(what string, u reading) {
	r.add(what+" pss", u.memory[0].PSS)
	r.add(what+" anon", u.memory[0].Anonymous)
	r.add(what+" processes", float64(u.memory[0].Processes))
	r.add(what+" cpu", u.cpu)
	r.add(what+" written", u.written)
	r.add(what+" device", u.device)
	r.add(what+" flushes", math.Round(u.flushes))
	if u.syncs != nil {
		r.add(what+" fsyncs", math.Round(u.fsyncs()))
	}
}

// behind takes what stands behind a reading.
func (r *recorder) behind(what string, u reading) {
	r.details = append(r.details, Detail{Side: r.side, Run: r.run, What: what, Memory: u.memory})
	if len(u.syncs) > 0 {
		r.details = append(r.details, Detail{Side: r.side, Run: r.run, What: what, Syncs: u.syncs})
	}
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
	for _, f := range figures() {
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
	name := contextName(d.What)
	if d.Syncs != nil {
		var parts []string
		for _, call := range slices.Sorted(maps.Keys(d.Syncs)) {
			parts = append(parts, fmt.Sprintf("%s %.0f", call, d.Syncs[call]))
		}
		fmt.Fprintf(w, "\n%s run %d, %s: %s\n", d.Side, d.Run, name, strings.Join(parts, ", "))
		return
	}
	fmt.Fprintf(w, "\n%s run %d, %s: processes, PSS, anonymous (MiB), CPU per minute (s)\n", d.Side, d.Run, name)
	for _, m := range d.Memory {
		fmt.Fprintf(w, "  %-28s %3d %7.1f %7.1f %7.2f\n", m.Name, m.Processes, m.PSS, m.Anonymous, m.CPU)
	}
}
