// SPDX-License-Identifier: Apache-2.0

package history

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

func put(key string, value, version, start, end int64, outcome Outcome) Op {
	return Op{Client: "w", Kind: Put, Key: key, State: State{value, version}, Start: start, End: end, Outcome: outcome}
}

func get(key string, value, version, start, end int64) Op {
	return Op{Client: "r", Kind: Get, Key: key, State: State{value, version}, Start: start, End: end, Outcome: OK}
}

func list(start, end int64, states States) Op {
	return Op{Client: "r", Kind: List, States: states, Start: start, End: end, Outcome: OK}
}

func TestCheck(t *testing.T) {
	for name, c := range map[string]struct {
		h    History
		want string // of the error; "" for a history that is as it should be
	}{
		"nothing": {},
		"written and read back": {h: History{
			put("a", 1, 10, 1, 2, OK), get("a", 1, 10, 3, 4), put("a", 2, 11, 5, 6, OK), put("b", 1, 12, 7, 8, OK), list(9, 10, States{"a": {2, 11}, "b": {1, 12}}),
		}},
		"read before the first write": {h: History{get("a", 0, 0, 1, 2), put("a", 1, 10, 3, 4, OK), get("a", 1, 10, 5, 6)}},
		"read beside a write: old":    {h: History{put("a", 1, 10, 1, 2, OK), put("a", 2, 11, 5, 10, OK), get("a", 1, 10, 6, 9), get("a", 2, 11, 11, 12)}},
		"read beside a write: new":    {h: History{put("a", 1, 10, 1, 2, OK), put("a", 2, 11, 5, 10, OK), get("a", 2, 11, 6, 9), get("a", 2, 11, 11, 12)}},
		"read beside a write: new, then old": {
			h:    History{put("a", 1, 10, 1, 2, OK), put("a", 2, 11, 5, 20, OK), get("a", 2, 11, 6, 9), get("a", 1, 10, 10, 12), get("a", 2, 11, 21, 22)},
			want: "r read 1 at",
		},
		"two reads at the same time, one old": {h: History{
			put("a", 1, 10, 1, 2, OK), put("a", 2, 11, 5, 20, OK), get("a", 2, 11, 6, 12), get("a", 1, 10, 10, 12), get("a", 2, 11, 21, 22),
		}},
		"acknowledged write lost": {
			h:    History{put("a", 1, 10, 1, 2, OK), put("a", 2, 11, 3, 4, OK), get("a", 1, 10, 5, 6)},
			want: "r read 1 at",
		},
		"acknowledged write lost, and a later one done": {
			h:    History{put("a", 1, 10, 1, 2, OK), put("a", 2, 11, 3, 4, OK), get("a", 1, 10, 5, 6), put("a", 3, 12, 7, 8, OK), get("a", 3, 12, 9, 10)},
			want: "before it began: w put 2",
		},
		"created key lost": {
			h:    History{put("a", 1, 10, 1, 2, OK), get("a", 0, 0, 3, 4)},
			want: "r read 0 at",
		},
		"created key missing in a list": {
			h:    History{put("a", 1, 10, 1, 2, OK), put("b", 1, 11, 3, 4, OK), list(5, 6, States{"b": {1, 11}})},
			want: "key a: r listed 0",
		},
		"created key that only a get knows missing in an earlier list": {
			h:    History{get("a", 1, 10, 3, 4), list(5, 6, nil), put("a", 1, 10, 1, 2, OK)},
			want: "key a: r listed 0",
		},
		"unknown write that happened":       {h: History{put("a", 1, 10, 1, 2, OK), put("a", 2, 0, 3, 4, Unknown), get("a", 2, 11, 5, 6)}},
		"unknown write that did not happen": {h: History{put("a", 1, 10, 1, 2, OK), put("a", 2, 0, 3, 4, Unknown), get("a", 1, 10, 5, 6)}},
		"unknown write that happened late":  {h: History{put("a", 1, 10, 1, 2, OK), put("a", 2, 0, 3, 4, Unknown), get("a", 1, 10, 5, 6), get("a", 2, 11, 7, 8)}},
		"unknown write that happened and was undone": {
			h:    History{put("a", 1, 10, 1, 2, OK), put("a", 2, 0, 3, 4, Unknown), get("a", 2, 11, 5, 6), get("a", 1, 10, 7, 8)},
			want: "before it began: r read 2",
		},
		"unknown write after which another was acknowledged": {
			h:    History{put("a", 1, 0, 3, 4, Unknown), put("a", 2, 11, 5, 6, OK), get("a", 1, 10, 7, 8)},
			want: "before it began: w put 2",
		},
		"failed write that happened": {
			h:    History{put("a", 1, 10, 1, 2, OK), put("a", 2, 0, 3, 4, Failed), get("a", 2, 11, 5, 6)},
			want: "that write has failed",
		},
		"value from nowhere": {
			h:    History{put("a", 1, 10, 1, 2, OK), get("a", 7, 11, 5, 6)},
			want: "nobody wrote",
		},
		"key from nowhere": {
			h:    History{list(1, 2, States{"z": {1, 2}})},
			want: "key z: r listed 1",
		},
		"value from the future": {
			h:    History{get("a", 1, 10, 1, 2), put("a", 1, 10, 3, 4, OK), get("a", 1, 10, 5, 6)},
			want: "only afterwards",
		},
		"not read back": {
			h:    History{put("a", 1, 10, 1, 2, OK), get("a", 1, 10, 3, 4), put("a", 2, 11, 5, 6, OK)},
			want: "not read after its last write",
		},
		"never read": {
			h:    History{put("a", 1, 10, 1, 2, OK)},
			want: "not read after its last write",
		},
		"a failed read proves nothing": {
			h:    History{put("a", 1, 10, 1, 2, OK), {Client: "r", Kind: Get, Key: "a", State: State{1, 10}, Start: 3, End: 4, Outcome: Unknown}},
			want: "not read after its last write",
		},
		"a failed read is no violation": {
			h: History{put("a", 1, 10, 1, 2, OK), get("a", 1, 10, 3, 4), {Client: "r", Kind: Get, Key: "a", Start: 3, End: 4, Outcome: Failed}},
		},
		"another version on the next read": {
			h:    History{put("a", 1, 10, 1, 2, OK), get("a", 1, 12, 3, 4)},
			want: "with version 12",
		},
		"version that went back": {
			h:    History{put("a", 1, 10, 1, 2, OK), put("a", 2, 9, 3, 4, OK), get("a", 2, 9, 5, 6)},
			want: "with version 9",
		},
		"two writers": {
			h:    History{put("a", 1, 10, 1, 2, OK), {Client: "x", Kind: Put, Key: "a", State: State{2, 11}, Start: 3, End: 4, Outcome: OK}, get("a", 2, 11, 5, 6)},
			want: "not a history of one writer",
		},
		"a writer with two attempts at a time": {
			h:    History{put("a", 1, 10, 1, 4, OK), put("a", 2, 11, 3, 5, OK), get("a", 2, 11, 6, 7)},
			want: "not a history of one writer",
		},
		"the same number twice": {
			h:    History{put("a", 1, 10, 1, 2, OK), put("a", 1, 11, 3, 4, OK), get("a", 1, 11, 6, 7)},
			want: "not a history of one writer",
		},
		"invalid operation": {
			h:    History{{Client: "r", Kind: Get, Key: "a", Start: 4, End: 3, Outcome: OK}},
			want: "lasts from",
		},
	} {
		err := c.h.Check()
		if (err != nil) != (c.want != "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestManyViolations(t *testing.T) {
	var h History
	for i := range int64(50) {
		h = append(h, put(fmt.Sprint("k", i), 1, i+1, i+1, i+2, OK))
	}
	h = append(h, list(100, 101, nil))
	if err := h.Check(); err == nil || !strings.Contains(err.Error(), "40 more") {
		t.Error(err)
	}
}

// linearizable tries all orders of a short history of one key: the definition, to compare Check with. A write that is not
// acknowledged has no end, and may be missing.
func linearizable(h History, done []bool, value int64) bool {
	end := int64(math.MaxInt64) // of the first operation to end among those that are left
	left := false
	for i, op := range h {
		if !done[i] && op.Outcome == OK {
			left = true
			end = min(end, op.End)
		}
	}
	if !left {
		return true
	}
	for i, op := range h {
		if done[i] || op.Start > end || op.Outcome == Failed {
			continue
		}
		next := value
		switch op.Kind {
		case Put:
			if op.Value <= value { // its condition is not fulfilled
				continue
			}
			next = op.Value
		case Get:
			if op.Value != value {
				continue
			}
		}
		done[i] = true
		ok := linearizable(h, done, next)
		done[i] = false
		if ok {
			return true
		}
	}
	return false
}

// randomHistory is a short one of one key, often a wrong one.
func randomHistory(r *rand.Rand) History {
	var h History
	now := int64(1)
	writes := 1 + r.Int64N(4)
	for v := int64(1); v <= writes; v++ {
		start := now + r.Int64N(4)
		end := start + r.Int64N(6)
		now = end + 1
		h = append(h, put("k", v, 0, start, end, []Outcome{OK, OK, Unknown, Failed}[r.IntN(4)]))
	}
	for range r.IntN(5) {
		start := 1 + r.Int64N(now+3)
		h = append(h, get("k", r.Int64N(writes+1), 0, start, start+r.Int64N(5)))
	}
	return h
}

// compare asks both, with every possible last read added, since Check wants one.
func compare(t *testing.T, h History) (good, bad int) {
	t.Helper()
	end := int64(0)
	for _, op := range h {
		end = max(end, op.End)
	}
	for v := range int64(8) {
		full := append(h[:len(h):len(h)], get("k", v, 0, end+1, end+2))
		want := linearizable(full, make([]bool, len(full)), 0)
		if err := full.Check(); (err == nil) != want {
			t.Errorf("Check says %v, linearizable: %t, history: %v", err, want, full)
		}
		if want {
			good++
		} else {
			bad++
		}
	}
	return good, bad
}

// TestCheckIsLinearizability compares Check with the definition.
func TestCheckIsLinearizability(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	good, bad := 0, 0
	for range 20000 {
		g, b := compare(t, randomHistory(r))
		good, bad = good+g, bad+b
		if t.Failed() {
			break
		}
	}
	if good < bad/20 {
		t.Errorf("%d histories were right and %d wrong: that is no comparison", good, bad)
	}
}

// FuzzCheck is the same for histories that nobody thought of.
func FuzzCheck(f *testing.F) {
	f.Add(uint64(1), uint64(2))
	f.Fuzz(func(t *testing.T, a, b uint64) { compare(t, randomHistory(rand.New(rand.NewPCG(a, b)))) })
}

// TestRealStore: clients of a store that is right, with answers that get lost, leave a history that is right; and losing any
// one acknowledged write from the end of it is found.
func TestRealStore(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		h := simulate(r, 60)
		if err := h.Check(); err != nil {
			t.Fatalf("%v: %v", err, h)
		}
		final := &h[len(h)-1]
		for key, s := range final.States {
			final.States[key] = State{s.Value - 1, 0}
			if h.Check() == nil {
				t.Fatalf("the loss of %d of key %s is not found: %v", s.Value, key, h)
			}
			final.States[key] = s
		}
	}
}

// simulate lets two writers and a reader work on a store in random steps.
func simulate(r *rand.Rand, steps int) History {
	var h History
	store := States{}
	version, now := int64(0), int64(0)
	tick := func() int64 { now += 1 + r.Int64N(3); return now }
	attempt := map[string]int64{}
	for range steps {
		key := []string{"a", "b"}[r.IntN(2)]
		start := tick()
		if r.IntN(3) == 0 {
			h = append(h, get(key, store[key].Value, store[key].Version, start, tick()))
			continue
		}
		attempt[key]++
		op := put(key, attempt[key], 0, start, tick(), []Outcome{OK, Unknown, Failed}[r.IntN(3)])
		if op.Outcome == OK || op.Outcome == Unknown && r.IntN(2) == 0 {
			version++
			store[key] = State{op.Value, version}
			if op.Outcome == OK {
				op.Version = version
			}
		}
		h = append(h, op)
	}
	for _, key := range []string{"a", "b"} { // the last write of each is an acknowledged one
		attempt[key]++
		version++
		store[key] = State{attempt[key], version}
		h = append(h, put(key, attempt[key], version, tick(), tick(), OK))
	}
	return append(h, list(tick(), tick(), store))
}

func TestGap(t *testing.T) {
	const second = int64(time.Second)
	ack := func(seconds ...float64) History {
		var h History
		for i, s := range seconds {
			end := int64(s * float64(second))
			h = append(h, put("k", int64(i+1), 0, end-1, end, OK))
		}
		return h
	}
	for name, c := range map[string]struct {
		h    History
		want time.Duration
		bad  bool
	}{
		"interruption that outlasts it":  {h: ack(9, 9.5, 10.1, 10.5, 11, 40), want: 29 * time.Second},
		"interruption at once":           {h: ack(9, 9.5, 12, 12.5, 18), want: 5500 * time.Millisecond},
		"interruption a little later":    {h: ack(9, 9.5, 10.1, 13.1, 13.5, 16.4), want: 3 * time.Second},
		"the longest one is before":      {h: ack(1, 9.9, 10.1, 11.2, 15.1, 16), want: 3900 * time.Millisecond},
		"the longest one is long after":  {h: ack(9.9, 10.1, 12.1, 15.5, 15.6, 99), want: 3400 * time.Millisecond},
		"no write before":                {h: ack(11, 12), bad: true},
		"no write after":                 {h: ack(1, 2), want: math.MaxInt64, bad: true},
		"nothing":                        {bad: true},
		"writes that fail do not count":  {h: append(ack(9, 13), put("x", 1, 0, 11*second, 12*second, Failed)), want: 4 * time.Second},
		"writes may be in another order": {h: append(ack(14, 9), ack(12, 15.5)...), want: 3 * time.Second},
	} {
		got, err := c.h.Gap(time.Unix(10, 0), 5*time.Second)
		if got != c.want || (err != nil) != c.bad {
			t.Errorf("%s: %s, %v; want %s", name, got, err, c.want)
		}
	}
}

func TestSlowestAndAcknowledged(t *testing.T) {
	h := History{
		put("b", 1, 1, 40, 41, OK), put("a", 1, 2, 10, 12, OK), put("a", 2, 0, 13, 14, Failed), put("a", 3, 0, 15, 16, Unknown), put("a", 4, 4, 17, 20, OK),
		put("a", 5, 0, 21, 99, Failed), get("a", 4, 4, 100, 200),
	}
	if got, want := h.Slowest(), (Retries{Client: "w", Key: "a", Attempts: 3, Took: 7}); got != want {
		t.Errorf("slowest: %+v, want %+v", got, want)
	}
	if got := h.Acknowledged(time.Unix(0, 12)); got != 2 {
		t.Errorf("%d writes acknowledged after 12", got)
	}
	if got, ok := h.FirstAfter(time.Unix(0, 12)); got != 8 || !ok {
		t.Errorf("first write after 12: %d, %t", got, ok)
	}
	if got, ok := h.FirstAfter(time.Unix(0, 50)); ok {
		t.Errorf("first write after 50: %d", got)
	}
	if got := h.Summary()["put failed"]; got != 2 {
		t.Errorf("summary: %v", h.Summary())
	}
}
