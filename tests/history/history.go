// SPDX-License-Identifier: Apache-2.0

// Package history decides from what clients wrote and read whether a store kept its promises. Clients record every
// operation, also the failed ones, with the times of their begin and end; [History.Check] compares them with a model.
//
// The model is one register a key. A key has one writer, who numbers its attempts to write 1, 2, 3 … and writes only if the
// key is still as he knows it (with a resourceVersion, or by creating it), so attempts take effect in the order of their
// numbers, or never. Then a history is linearizable exactly if every read has a place in that order: see checkKey.
package history

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// Kind of an operation.
type Kind string

// Kinds of operations.
const (
	Put  Kind = "put"  // write Value to Key
	Get  Kind = "get"  // read Key
	List Kind = "list" // read all keys
)

// Outcome of an operation.
type Outcome string

// Outcomes of operations.
const (
	OK      Outcome = "ok"      // acknowledged
	Failed  Outcome = "failed"  // had no effect, and never will have
	Unknown Outcome = "unknown" // had its effect, or has it later, or never: no answer came, or one that does not say
)

// State is what a key has: the number of the attempt that wrote it, and the store's version of it (0: not known). The zero
// value is a key that does not exist.
type State struct {
	Value   int64 `json:"value"`
	Version int64 `json:"version,omitempty"`
}

// Op is an operation of a client, as it saw it. Times are nanoseconds since 1970 of one clock that does not step.
type Op struct {
	Client  string  `json:"client"`
	Kind    Kind    `json:"kind"`
	Key     string  `json:"key,omitempty"` // of Put and Get
	State           // that was written, or that Get found
	States  States  `json:"states,omitempty"` // that List found
	Start   int64   `json:"start"`
	End     int64   `json:"end"`
	Outcome Outcome `json:"outcome"`
	Error   string  `json:"error,omitempty"`
}

// States are the keys that exist.
type States map[string]State

// History is what all clients did, in no particular order.
type History []Op

// Validate refuses an operation that no client can have recorded.
func (o *Op) Validate() error {
	switch {
	case o.Outcome != OK && o.Outcome != Failed && o.Outcome != Unknown:
		return fmt.Errorf("outcome %q", o.Outcome)
	case o.Kind != Put && o.Kind != Get && o.Kind != List:
		return fmt.Errorf("kind %q", o.Kind)
	case (o.Key == "") != (o.Kind == List):
		return fmt.Errorf("kind %s with the key %q", o.Kind, o.Key)
	case o.Value < 0 || o.Kind == Put && o.Value == 0:
		return fmt.Errorf("value %d", o.Value)
	case o.Start <= 0 || o.End < o.Start:
		return fmt.Errorf("it lasts from %d to %d", o.Start, o.End)
	}
	return nil
}

// Read reads a history, one operation a line in JSON.
func Read(r io.Reader) (History, error) {
	var h History
	d := json.NewDecoder(bufio.NewReader(r))
	d.DisallowUnknownFields()
	for n := 1; ; n++ {
		var op Op
		err := d.Decode(&op)
		if errors.Is(err, io.EOF) {
			return h, nil
		}
		if err == nil {
			err = op.Validate()
		}
		if err != nil {
			return nil, fmt.Errorf("operation %d: %w", n, err)
		}
		h = append(h, op)
	}
}

// Recorder writes down operations of concurrent clients as they end.
type Recorder struct {
	base time.Time // with the monotonic reading that all times are made from

	mu  sync.Mutex
	enc *json.Encoder
	err error // the first one
}

// NewRecorder returns a Recorder that writes lines to w, each with one call of Write.
func NewRecorder(w io.Writer) *Recorder { return &Recorder{base: time.Now(), enc: json.NewEncoder(w)} }

// Now is the time for Op's Start and End.
func (r *Recorder) Now() int64 { return r.base.UnixNano() + int64(time.Since(r.base)) }

// Add records an operation that has ended. An operation of which only the begin is known must be added as well, as Unknown.
func (r *Recorder) Add(op Op) {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := op.Validate()
	if err == nil {
		err = r.enc.Encode(op)
	}
	if err != nil && r.err == nil {
		r.err = fmt.Errorf("record an operation: %w", err)
	}
}

// Err is the first error of Add. A history with a gap proves nothing.
func (r *Recorder) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}
