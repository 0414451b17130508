// SPDX-License-Identifier: Apache-2.0

package history

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"
)

// maxShown limits how many violations an error names. One lost write is seen by every later read.
const maxShown = 10

// Check returns nil if the history is as the model allows and every key with an acknowledged write was read back after its
// last one. The error names what was seen and what should have been.
func (h History) Check() error {
	var errs []error
	byKey := map[string]*register{}
	of := func(key string) *register {
		if byKey[key] == nil {
			byKey[key] = &register{}
		}
		return byKey[key]
	}
	for _, op := range h {
		if err := op.Validate(); err != nil {
			return fmt.Errorf("an operation of %s on %q: %w", op.Client, op.Key, err)
		}
		if op.Key != "" {
			of(op.Key)
		}
		if op.Kind == Put {
			of(op.Key).writes = append(of(op.Key).writes, op)
		}
		for key := range op.States {
			of(key)
		}
	}
	// All keys are known only now, and a key that is missing in a list was read, too.
	for _, op := range h {
		if op.Outcome != OK {
			continue
		}
		switch op.Kind {
		case Get:
			of(op.Key).reads = append(of(op.Key).reads, op)
		case List:
			for key, r := range byKey {
				one := op
				one.Key, one.State, one.States = key, op.States[key], nil
				r.reads = append(r.reads, one)
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(byKey)) {
		for _, err := range byKey[key].check() {
			errs = append(errs, fmt.Errorf("key %s: %w", key, err))
		}
	}
	if n := len(errs); n > maxShown {
		errs = append(errs[:maxShown], fmt.Errorf("and %d more violations", n-maxShown))
	}
	return errors.Join(errs...)
}

// register is what happened to one key.
type register struct {
	writes []Op // of any outcome
	reads  []Op // acknowledged
}

// check looks for reads that have no place in the order of the writes. Why these conditions are all: let each write take
// effect as early as the others and the reads of smaller values allow. That is before its own end and before the end of
// every read of it exactly if no condition below is hurt; and each read fits between the write of its value and the next.
func (r *register) check() []error {
	if err := r.wellFormed(); err != nil {
		return []error{err}
	}
	slices.SortFunc(r.reads, func(a, b Op) int { return cmp.Compare(a.Start, b.Start) })
	errs := r.versions()
	for _, read := range r.reads {
		if err := r.written(read); err != nil {
			errs = append(errs, err)
		}
	}
	errs = append(errs, r.stale()...)
	if err := r.readBack(); err != nil {
		errs = append(errs, err)
	}
	return errs
}

// wellFormed checks what the model takes for granted: one writer, who makes one attempt after the other, with increasing numbers.
func (r *register) wellFormed() error {
	slices.SortFunc(r.writes, func(a, b Op) int { return cmp.Compare(a.Value, b.Value) })
	for i, w := range r.writes {
		if i == 0 {
			continue
		}
		prev := r.writes[i-1]
		if prev.Client != w.Client || prev.Value == w.Value || prev.End > w.Start {
			return fmt.Errorf("not a history of one writer: %s and %s", prev, w)
		}
	}
	return nil
}

// written tells whether somebody could have written what was read.
func (r *register) written(read Op) error {
	if read.Value == 0 {
		return nil
	}
	i, found := slices.BinarySearchFunc(r.writes, read.Value, func(w Op, v int64) int { return cmp.Compare(w.Value, v) })
	switch {
	case !found:
		return fmt.Errorf("%s, which nobody wrote", read)
	case r.writes[i].Outcome == Failed:
		return fmt.Errorf("%s, but that write has failed: %s", read, r.writes[i])
	case r.writes[i].Start > read.End:
		return fmt.Errorf("%s, but it was written only afterwards: %s", read, r.writes[i])
	}
	return nil
}

// stale finds reads of something older than what was acknowledged, or read, before they began.
func (r *register) stale() []error {
	var known []Op // what says that the key had at least that value from its end on
	for _, w := range r.writes {
		if w.Outcome == OK {
			known = append(known, w)
		}
	}
	known = append(known, r.reads...)
	slices.SortFunc(known, func(a, b Op) int { return cmp.Compare(a.End, b.End) })
	var errs []error
	var newest Op
	next := 0
	for _, read := range r.reads { // by their begin
		for ; next < len(known) && known[next].End < read.Start; next++ {
			if known[next].Value > newest.Value {
				newest = known[next]
			}
		}
		if read.Value < newest.Value {
			errs = append(errs, fmt.Errorf("%s, but before it began: %s", read, newest))
		}
	}
	return errs
}

// versions checks that a value has one version, and a newer value a newer version.
func (r *register) versions() []error {
	var errs []error
	seen := map[int64]Op{}
	for _, op := range slices.Concat(r.writes, r.reads) {
		if op.Outcome != OK || op.Version == 0 || op.Value == 0 {
			continue
		}
		if first, ok := seen[op.Value]; ok && first.Version != op.Version {
			errs = append(errs, fmt.Errorf("%s with version %d, but with version %d: %s", op, op.Version, first.Version, first))
			continue
		}
		seen[op.Value] = op
	}
	var last Op
	for _, v := range slices.Sorted(maps.Keys(seen)) {
		if op := seen[v]; op.Version <= last.Version {
			errs = append(errs, fmt.Errorf("%s with version %d, but with version %d: %s", op, op.Version, last.Version, last))
		}
		last = seen[v]
	}
	return errs
}

// readBack checks that the last acknowledged write could have been missed.
func (r *register) readBack() error {
	var last Op
	for _, w := range r.writes {
		if w.Outcome == OK && w.End > last.End {
			last = w
		}
	}
	if last.End == 0 || len(r.reads) > 0 && r.reads[len(r.reads)-1].Start > last.End {
		return nil
	}
	return fmt.Errorf("it was not read after its last write: %s", last)
}

// String describes an operation on one key.
func (o Op) String() string {
	verb := map[Kind]string{Put: "put", Get: "read", List: "listed"}[o.Kind]
	s := fmt.Sprintf("%s %s %d at %s", o.Client, verb, o.Value, clock(o.Start))
	if d := time.Duration(o.End - o.Start); d >= time.Millisecond {
		s += fmt.Sprintf(" (%s)", d.Round(time.Millisecond))
	}
	if o.Outcome != OK {
		s += fmt.Sprintf(", %s: %s", o.Outcome, o.Error)
	}
	return s
}

func clock(t int64) string { return time.Unix(0, t).UTC().Format("15:04:05.000") }

// Gap is the longest time without an acknowledged write that overlaps the time from begin to begin+d: how long the store was
// out for writers because of what happened at begin. It is an error if there was none before, or none afterwards.
func (h History) Gap(begin time.Time, d time.Duration) (time.Duration, error) {
	var acks []int64
	for _, op := range h {
		if op.Kind == Put && op.Outcome == OK {
			acks = append(acks, op.End)
		}
	}
	slices.Sort(acks)
	from, to := begin.UnixNano(), begin.Add(d).UnixNano()
	switch {
	case len(acks) == 0 || acks[0] > from:
		return 0, fmt.Errorf("no write was acknowledged before %s", clock(from))
	case acks[len(acks)-1] < from:
		return math.MaxInt64, fmt.Errorf("no write was acknowledged after %s", clock(from))
	}
	var longest int64
	for i := 1; i < len(acks); i++ {
		if acks[i] >= from && acks[i-1] <= to {
			longest = max(longest, acks[i]-acks[i-1])
		}
	}
	return time.Duration(longest), nil
}

// FirstAfter is how long after a time the first write was acknowledged that began after it; false if none was.
func (h History) FirstAfter(event time.Time) (time.Duration, bool) {
	first := int64(math.MaxInt64)
	for _, op := range h {
		if op.Kind == Put && op.Outcome == OK && op.Start > event.UnixNano() {
			first = min(first, op.End)
		}
	}
	if first == math.MaxInt64 {
		return 0, false
	}
	return time.Duration(first - event.UnixNano()), true
}

// Acknowledged counts the writes that began after a time and were acknowledged.
func (h History) Acknowledged(after time.Time) int {
	n := 0
	for _, op := range h {
		if op.Kind == Put && op.Outcome == OK && op.Start > after.UnixNano() {
			n++
		}
	}
	return n
}

// Retries is what a client needed to get one write acknowledged.
type Retries struct {
	Client, Key string
	Attempts    int
	Took        time.Duration // from the begin of the first attempt to the end of the one that was acknowledged
}

// Slowest is the write that took longest to be acknowledged, with all its attempts: attempts of a client on a key up to the
// one that was acknowledged belong together.
func (h History) Slowest() Retries {
	writes := slices.DeleteFunc(slices.Clone(h), func(o Op) bool { return o.Kind != Put })
	slices.SortFunc(writes, func(a, b Op) int { return cmp.Compare(a.Start, b.Start) })
	type first struct {
		start    int64
		attempts int
	}
	open := map[string]first{}
	var slowest Retries
	for _, w := range writes {
		f, ok := open[w.Key]
		if !ok {
			f.start = w.Start
		}
		f.attempts++
		open[w.Key] = f
		if w.Outcome != OK {
			continue
		}
		delete(open, w.Key)
		if took := time.Duration(w.End - f.start); took > slowest.Took {
			slowest = Retries{Client: w.Client, Key: w.Key, Attempts: f.attempts, Took: took}
		}
	}
	return slowest
}

// Summary counts operations by kind, outcome and error.
func (h History) Summary() map[string]int {
	n := map[string]int{}
	for _, op := range h {
		what := fmt.Sprintf("%s %s", op.Kind, op.Outcome)
		if op.Error != "" {
			what += ": " + op.Error
		}
		n[what]++
	}
	return n
}
