// SPDX-License-Identifier: Apache-2.0

package certificate

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"

	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/pki"
)

func TestWrite(t *testing.T) {
	end := time.Date(2027, 11, 28, 3, 0, 0, 0, time.UTC)
	list := []pki.CertStatus{
		{Name: pki.ServerCA, NotAfter: end.AddDate(9, 0, 0), DaysLeft: 3650, State: pki.StateOK},
		{Name: pki.APIServer, NotAfter: end, DaysLeft: 365, RenewAt: end.AddDate(0, -4, 0), State: pki.StateOK},
		{Name: pki.Admin, State: pki.StateBroken, Warning: "/x/admin.pem: no such file"},
	}
	var out bytes.Buffer
	if err := write(&out, list); err != nil {
		t.Fatal(err)
	}
	want := `CERTIFICATE   ENDS         DAYS LEFT   RENEWED BY ITSELF   STATE
server-ca     2036-11-28   3650        no                  ok
apiserver     2027-11-28   365         2027-07-28          ok
admin                                  no                  unusable

admin: /x/admin.pem: no such file
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestExitCode(t *testing.T) {
	for want, states := range map[int][]pki.State{
		0: {pki.StateOK, pki.StateOK}, 3: {pki.StateOK, pki.StateEnding}, 4: {pki.StateExpired, pki.StateEnding},
	} {
		var list []pki.CertStatus
		for _, s := range states {
			list = append(list, pki.CertStatus{State: s})
		}
		if got := exitCode(list); got != want {
			t.Errorf("%v: %d, want %d", states, got, want)
		}
	}
}

// run is the command with a run directory in which no Kedge runs.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	app := &cli.App{Writer: &out, ErrWriter: &out, Commands: []*cli.Command{Command()}, ExitErrHandler: func(*cli.Context, error) {}}
	err := app.RunContext(t.Context(), append([]string{"kedge", "certificate"}, args...))
	return out.String(), err
}

// TestCheckWithoutKedge: the files are enough.
func TestCheckWithoutKedge(t *testing.T) {
	dir := t.TempDir()
	args := []string{"check", "--run-dir", dir, "--data-dir", dir, "--kubelet-root-dir", dir, "--write-kubeconfig", filepath.Join(dir, "kubeconfig"), "-o", "json"}
	if _, err := run(t, args...); err == nil || !strings.Contains(err.Error(), "there are no certificates in") {
		t.Errorf("an empty machine: %v", err)
	}
	if _, err := pki.Ensure(t.Context(), pki.Config{Dir: filepath.Join(dir, "pki"), NodeName: "n1"}); err != nil {
		t.Fatal(err)
	}
	out, err := run(t, args...)
	var list []pki.CertStatus
	if err != nil || json.Unmarshal([]byte(out), &list) != nil || len(list) != 13 {
		t.Errorf("%v, %d certificates: %s", err, len(list), out)
	}
	if err := os.Remove(filepath.Join(dir, "pki", "apiserver.pem")); err != nil {
		t.Fatal(err)
	}
	var exit cli.ExitCoder
	if out, err := run(t, args...); !errors.As(err, &exit) || exit.ExitCode() != 4 {
		t.Errorf("one is missing: %v: %s", err, out)
	}
}

func TestLine(t *testing.T) {
	now := time.Date(2026, 11, 28, 3, 0, 0, 0, time.UTC)
	for _, test := range []struct {
		r       authority.Rotation
		waiting []string
		want    string
	}{
		{authority.Rotation{Phase: pki.PhaseTrust}, []string{"s1", "s2"}, "1 of 4, servers trust the new CAs one after the other; waits for s1, s2"},
		{authority.Rotation{Phase: pki.PhaseIssue}, nil, "2 of 4, servers issue from the new CAs one after the other"},
		{authority.Rotation{Phase: authority.PhaseRenew, DropAfter: now.Add(time.Hour)}, []string{"a1"}, "trusted until 2026-11-28T04:00:00Z; waits for a1"},
		{authority.Rotation{Phase: authority.PhaseRenew, DropAfter: now.Add(-time.Hour)}, []string{"a1"}, "waits for a1. Start them, remove them (kedge node remove), or --finish --force"},
		{authority.Rotation{Phase: authority.PhaseRenew, DropAfter: now.Add(-time.Hour)}, nil, "3 of 4, the overlap is over"},
		{authority.Rotation{Phase: pki.PhaseDone}, []string{"s1"}, "4 of 4, servers drop the old CAs one after the other; waits for s1"},
		{authority.Rotation{Phase: pki.PhaseDone, Finished: now}, nil, "finished on 2026-11-28T03:00:00Z"},
	} {
		r := report{Rotation: &test.r, Waiting: test.waiting}
		if got := r.line(now); !strings.HasSuffix(got, test.want) {
			t.Errorf("%q, want %q", got, test.want)
		}
	}
}
