// SPDX-License-Identifier: Apache-2.0

package history

import (
	"bytes"
	"io"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestRecorder(t *testing.T) {
	var b bytes.Buffer
	r := NewRecorder(&b)
	var clients sync.WaitGroup
	for _, client := range []string{"w0", "w1", "w2"} {
		clients.Go(func() {
			for n := range int64(100) {
				start := r.Now()
				r.Add(Op{Client: client, Kind: Put, Key: client, State: State{Value: n + 1, Version: n + 5}, Start: start, End: r.Now(), Outcome: OK})
			}
		})
	}
	clients.Wait()
	start := r.Now()
	r.Add(Op{Client: "r", Kind: List, States: States{"w0": {Value: 100, Version: 104}, "w1": {Value: 100}, "w2": {Value: 100}}, Start: start, End: r.Now(), Outcome: OK})
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	h, err := Read(&b)
	if err != nil {
		t.Fatal(err)
	}
	if len(h) != 301 || h[300].States["w0"] != (State{100, 104}) {
		t.Errorf("%d operations, the last one %+v", len(h), h[len(h)-1])
	}
	if err := h.Check(); err != nil {
		t.Error(err)
	}
	if d := time.Since(time.Unix(0, h[0].Start)); d < 0 || d > time.Minute {
		t.Errorf("the first operation began %s ago", d)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

// A history that could not be written completely is no proof, so the recorder remembers it.
func TestRecorderErrors(t *testing.T) {
	good := Op{Client: "w", Kind: Put, Key: "k", State: State{Value: 1}, Start: 1, End: 2, Outcome: OK}
	bad := good
	bad.Outcome = "perhaps"
	for name, c := range map[string]struct {
		w  io.Writer
		op Op
	}{
		"disk full": {brokenWriter{}, good},
		"invalid":   {io.Discard, bad},
	} {
		r := NewRecorder(c.w)
		r.Add(c.op)
		if r.Err() == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestRead(t *testing.T) {
	const good = `{"client":"w","kind":"put","key":"k","value":1,"start":1,"end":2,"outcome":"ok"}`
	for name, c := range map[string]struct{ in, want string }{
		"nothing":          {"", ""},
		"one":              {good + "\n", ""},
		"cut off":          {good + "\n" + good[:20], "operation 2"},
		"no JSON":          {"put k 1", "operation 1"},
		"unknown field":    {strings.Replace(good, "client", "clients", 1), "clients"},
		"unknown outcome":  {strings.Replace(good, "ok", "fine", 1), "outcome"},
		"unknown kind":     {strings.Replace(good, "put", "post", 1), "kind"},
		"put without key":  {strings.Replace(good, `"k"`, `""`, 1), "key"},
		"put of nothing":   {strings.Replace(good, `"value":1`, `"value":0`, 1), "value"},
		"ends before":      {strings.Replace(good, `"start":1`, `"start":3`, 1), "lasts"},
		"without begin":    {strings.Replace(good, `"start":1`, `"start":0`, 1), "lasts"},
		"list with a key":  {strings.Replace(good, `"put"`, `"list"`, 1), "key"},
		"a second garbage": {good + good + "}", "operation 3"},
	} {
		_, err := Read(strings.NewReader(c.in))
		if (err != nil) != (c.want != "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// FuzzRead: what is read is valid, and the same after it was written again.
func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"client":"w","kind":"put","key":"k","value":1,"version":7,"start":1,"end":2,"outcome":"unknown","error":"timeout"}` + "\n" +
		`{"client":"r","kind":"list","states":{"k":{"value":1}},"start":1,"end":2,"outcome":"ok"}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		h, err := Read(bytes.NewReader(in))
		if err != nil {
			return
		}
		var b bytes.Buffer
		r := NewRecorder(&b)
		for _, op := range h {
			r.Add(op)
		}
		if err := r.Err(); err != nil {
			t.Fatal(err)
		}
		again, err := Read(&b)
		if err != nil {
			t.Fatal(err)
		}
		for i := range h {
			if len(h[i].States) == 0 {
				h[i].States = nil // an empty list of keys is left out
			}
		}
		if !reflect.DeepEqual(h, again) {
			t.Errorf("%+v became %+v", h, again)
		}
		_ = h.Check() // must not panic
	})
}
