// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
)

func TestTimeouts(t *testing.T) {
	for sync, want := range map[time.Duration][2]time.Duration{
		0:                      {100 * time.Millisecond, time.Second},
		time.Millisecond:       {100 * time.Millisecond, time.Second},
		50 * time.Millisecond:  {100 * time.Millisecond, time.Second},
		80 * time.Millisecond:  {160 * time.Millisecond, 1600 * time.Millisecond},
		200 * time.Millisecond: {300 * time.Millisecond, 4 * time.Second},
		3 * time.Second:        {300 * time.Millisecond, 5 * time.Second},
	} {
		if heartbeat, election := (Disk{Sync: sync}).timeouts(); heartbeat != want[0] || election != want[1] {
			t.Errorf("%s: %s, %s", sync, heartbeat, election)
		}
	}
}

func TestQuota(t *testing.T) {
	const gib = 1 << 30
	for name, tt := range map[string]struct {
		disk Disk
		want int64
	}{
		"unknown":                {Disk{}, 0},
		"64 GB":                  {Disk{total: 60 * gib, free: 50 * gib}, 6 * gib},
		"large":                  {Disk{total: 1000 * gib, free: 500 * gib}, quotaMax},
		"small":                  {Disk{total: 4 * gib, free: 3 * gib}, quotaMin},
		"nearly full":            {Disk{total: 60 * gib, free: 1 * gib, database: gib / 2}, gib/2 + gib/10*8},
		"full":                   {Disk{total: 60 * gib, free: 0, database: gib}, gib + roomForWrites},
		"never below what it is": {Disk{total: 10 * gib, free: 5 * gib, database: 3 * gib}, 3*gib + roomForWrites},
	} {
		if got := tt.disk.quota(); got != tt.want {
			t.Errorf("%s: %s, want %s", name, mebibytes(got), mebibytes(tt.want))
		}
	}
}

// What was measured is measured once, kept beside the data, and never fails a start.
func TestKnowDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "etcd")
	first, err := knowDisk(t.Context(), dir)
	if err != nil || first.Sync <= 0 || first.total <= 0 || first.free <= 0 || first.database != 0 {
		t.Fatalf("%+v, %v", first, err)
	}
	if err := writeFile(DiskFile(dir), Disk{Sync: time.Second}); err != nil {
		t.Fatal(err)
	}
	if again, err := knowDisk(t.Context(), dir); err != nil || again.Sync != time.Second {
		t.Errorf("%+v, %v", again, err)
	}
	for _, damaged := range []string{"", "{", `{"syncNanoseconds":-1}`} {
		if err := os.WriteFile(DiskFile(dir), []byte(damaged), 0o600); err != nil {
			t.Fatal(err)
		}
		if again, err := knowDisk(t.Context(), dir); err != nil || again.Sync <= 0 || again.Sync == time.Second {
			t.Errorf("%q: %+v, %v", damaged, again, err)
		}
	}
}

func histogram(counts ...uint64) *dto.Histogram {
	bounds := []float64{0.001, 0.01, 0.1, math.Inf(1)}
	h := &dto.Histogram{SampleCount: new(counts[len(counts)-1])}
	for i, c := range counts {
		h.Bucket = append(h.Bucket, &dto.Bucket{UpperBound: new(bounds[i]), CumulativeCount: new(c)})
	}
	return h
}

func TestPercentileBetween(t *testing.T) {
	for name, tt := range map[string]struct {
		before, now *dto.Histogram
		want        time.Duration
		ok          bool
	}{
		"none":        {nil, nil, 0, false},
		"few":         {nil, histogram(999, 999, 999, 999), 0, false},
		"fast":        {nil, histogram(1990, 2000, 2000, 2000), time.Millisecond, true},
		"one percent": {nil, histogram(0, 1980, 2000, 2000), 10 * time.Millisecond, true},
		"since then":  {histogram(5000, 5000, 5000, 5000), histogram(5000, 5500, 7000, 7000), 100 * time.Millisecond, true},
		"beyond":      {nil, histogram(0, 0, 0, 2000), electionMax, true},
	} {
		if got, ok := percentileBetween(tt.before, tt.now); got != tt.want || ok != tt.ok {
			t.Errorf("%s: %s, %v", name, got, ok)
		}
	}
}

func TestPercentile99(t *testing.T) {
	var d []time.Duration
	for i := range 200 {
		d = append(d, time.Duration(200-i))
	}
	if got := percentile99(d); got != 198 {
		t.Errorf("got %d", got)
	}
	if got := percentile99(d[:1]); got != 200 {
		t.Errorf("got %d", got)
	}
}
