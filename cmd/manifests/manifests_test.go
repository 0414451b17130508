// SPDX-License-Identifier: Apache-2.0

package manifests

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"

	"github.com/kedge-io/kedge/pkg/deploy"
)

func TestWrite(t *testing.T) {
	now := time.Date(2026, 11, 28, 4, 0, 0, 0, time.UTC)
	all := []deploy.FileStatus{
		{File: "gone.yaml", Revision: 2, State: deploy.Removed, Removed: true, ChangedBy: "s2", ChangedAt: now.Add(-time.Hour)},
		{File: "kept.yaml", Revision: 3, State: deploy.Removed, Removed: true, ChangedBy: "s2", ChangedAt: now.Add(-time.Minute), Remarks: []string{"Namespace a is kept: b"}},
		{File: "left.yaml", Revision: 3, State: deploy.Failed, Removed: true, ChangedBy: "s2", ChangedAt: now.Add(-time.Minute), Problems: []deploy.Problem{{Object: "ConfigMap a/b", Error: "delete it: no\nwebhook"}}},
		{File: "web.yaml", Revision: 1, State: deploy.Applied, Objects: 12, ChangedBy: "s1", ChangedAt: now.Add(-90 * time.Second)},
	}
	list, err := choose(all, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := write(&out, list, now); err != nil {
		t.Fatal(err)
	}
	want := `FILE        REVISION   STATE              OBJECTS   CHANGED   ON
kept.yaml   3          removed            0         60s ago   s2
left.yaml   3          removing, failed   0         60s ago   s2
web.yaml    1          applied            12        90s ago   s1

kept.yaml
  remark: Namespace a is kept: b

left.yaml
  ConfigMap a/b: delete it: no
    webhook
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if list, err := choose(all, []string{"gone.yaml"}, false); len(list) != 1 || err != nil {
		t.Errorf("a file by name: %v %v", list, err)
	}
	if list, err := choose(all, nil, true); len(list) != 4 || err != nil {
		t.Errorf("all: %v %v", list, err)
	}
	for name, want := range map[string]string{"x.yaml": "knows no file x.yaml", "-o": "flags come first"} {
		if _, err := choose(all, []string{name}, false); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	out.Reset()
	if err := write(&out, nil, now); err != nil || !strings.Contains(out.String(), "/var/lib/kedge/manifests") {
		t.Errorf("%v %s", err, &out)
	}
}

func TestCommand(t *testing.T) {
	for want, args := range map[string][]string{
		`unknown output format "yaml"`:                 {"-o", "yaml"},
		"elsewhere give an administrator's kubeconfig": {"--kubeconfig", "/nowhere/kubeconfig"},
	} {
		app := &cli.App{Commands: []*cli.Command{Command()}, ExitErrHandler: func(*cli.Context, error) {}}
		if err := app.RunContext(t.Context(), append([]string{"kedge", "manifests"}, args...)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v", args, err)
		}
	}
}
