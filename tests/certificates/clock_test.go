// SPDX-License-Identifier: Apache-2.0

package certificates

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// TestShiftedClock has a server in a virtual machine whose clock is set two years on while it is off. The machines of namespaces share
// the host's clock: there TestTwoYearsOff shifts the certificates instead.
func TestShiftedClock(t *testing.T) {
	if os.Getenv("KEDGE_TEST_CLOCK") != "1" {
		t.Skip("a server in a virtual machine without hardware help takes many minutes: set KEDGE_TEST_CLOCK=1")
	}
	bed := testbed.New(t)
	bin, err := cluster.Binary()
	if err != nil {
		t.Fatal(err)
	}
	files := t.TempDir()
	program, err := os.ReadFile(bin)
	if err == nil {
		err = os.WriteFile(filepath.Join(files, "kedge"), program, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	vm, err := bed.VM(cluster.Within(t, 5*minute), "v1", testbed.Share(files, "/opt/kedge"), testbed.VMMemory(4096))
	if errors.Is(err, testbed.ErrNoVM) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	do := func(line string) string {
		t.Helper()
		out, err := vm.Shell(cluster.Within(t, 3*minute), line)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	do("ln -s /opt/kedge/kedge /usr/local/bin/kedge")
	run := func() {
		t.Helper()
		do("setsid kedge server >>/var/log/kedge.log 2>&1 </dev/null & echo $! >/run/server.pid")
		cluster.EventuallyWithin(t, 30*minute, "the server to be ready", func(ctx context.Context) error {
			if out, err := vm.Shell(ctx, "kedge status"); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
	run()
	do("kedge kubectl create configmap kept --from-literal=a=b")
	for _, shift := range []string{"2 years", "26 months"} {
		do("kill $(cat /run/server.pid); while kill -0 $(cat /run/server.pid) 2>/dev/null; do sleep 0.2; done")
		do("date -s '+" + shift + "'")
		if out, err := vm.Shell(cluster.Within(t, minute), "kedge certificate check"); err == nil || !strings.Contains(out, "expired") {
			t.Errorf("%s on, nothing has expired: %v: %s", shift, err, out)
		}
		run()
		t.Logf("%s later: %s", shift, do("date; kedge certificate check"))
		if got := do("kedge kubectl get configmap kept -o jsonpath={.data.a}"); got != "b" {
			t.Errorf("data: %q", got)
		}
		if got := do("kedge kubectl get --raw /api/v1/nodes/v1/proxy/healthz"); got != "ok" {
			t.Errorf("the kubelet: %q", got)
		}
	}
}
