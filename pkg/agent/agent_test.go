// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/pkg/supervise"
)

func TestNotReady(t *testing.T) {
	for want, components := range map[string][]supervise.Component{
		"":                             {{Name: "a", State: supervise.Ready, Reason: "mode x"}},
		"b waiting: for a":             {{Name: "a", State: supervise.Ready}, {Name: "b", State: supervise.Waiting, Reason: "for a"}},
		"a stopped; b failed: no disk": {{Name: "a", State: supervise.Stopped}, {Name: "b", State: supervise.Failed, Reason: "no disk"}},
	} {
		if got := notReady([]supervise.ProcessStatus{{Components: components}}); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestOneServerAtATime(t *testing.T) {
	dir := t.TempDir()
	unlock, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(dir); err == nil || !strings.Contains(err.Error(), "another kedge is running on this machine (pid "+strconv.Itoa(os.Getpid())+")") {
		t.Errorf("second lock: %v", err)
	}
	unlock()
	unlock, err = Lock(dir)
	if err != nil {
		t.Fatalf("after the first is gone: %v", err)
	}
	unlock()
}

func TestStatusWithoutServer(t *testing.T) {
	if _, err := GetStatus(t.Context(), t.TempDir()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("got %v", err)
	}
}
