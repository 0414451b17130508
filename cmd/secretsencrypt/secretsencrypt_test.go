// SPDX-License-Identifier: Apache-2.0

package secretsencrypt

import (
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/pkg/encryption"
	"github.com/kedge-io/kedge/tests/golden"
)

// TestWrite: what an operator sees at rest, in the middle of a change, and when something is wrong.
func TestWrite(t *testing.T) {
	made := time.Date(2026, 11, 28, 3, 0, 0, 0, time.UTC)
	rest := report{
		Enabled:   true,
		Providers: []encryption.ViewedBy{{Name: "key1", ID: "2f29011a"}, {Name: encryption.Identity}},
		Servers:   []server{{Name: "m1", Address: "192.0.2.1:6443", Hash: "d9085cbe67ff", Current: true}},
		Objects:   encryption.Objects{By: map[string]int{"key1": 15}},
	}
	middle := report{
		Enabled:   true,
		State:     encryption.Progress{Action: encryption.Rotate, Stage: encryption.Write, Started: &made},
		Providers: []encryption.ViewedBy{{Name: "key2", ID: "95b8817e", Created: &made}, {Name: "key1", ID: "2f29011a"}, {Name: encryption.Identity}},
		Servers: []server{{Name: "m1", Address: "192.0.2.1:6443", Hash: "c8b2d0465c2c", Current: true},
			{Name: "m2", Address: "192.0.2.2:6443", Hash: "d9085cbe67ff"}, {Name: "m3", Address: "192.0.2.3:6443", Error: "connection refused"}},
		Objects: encryption.Objects{By: map[string]int{"key1": 5, "key2": 10, "key0": 1}},
	}
	off := report{Providers: []encryption.ViewedBy{{Name: encryption.Identity}}, Objects: encryption.Objects{By: map[string]int{}}}
	var text strings.Builder
	for _, r := range []report{rest, middle, off} {
		if err := write(&text, r); err != nil {
			t.Fatal(err)
		}
		text.WriteString("----\n")
	}
	golden.Compare(t, "testdata/status.txt", text.String())
}
