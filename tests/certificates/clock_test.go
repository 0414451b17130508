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
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// clockPatience is what a server may take to be ready in a virtual machine, where computing is 20 times slower.
const clockPatience = 15 * time.Minute

// TestShiftedClock has a server in a virtual machine that is off for two years: with a clock of its own, which says so when it boots again.
// Machines of namespaces share the host's clock: there TestTwoYearsOff and TestAlone shift the certificates instead.
func TestShiftedClock(t *testing.T) {
	if os.Getenv("KEDGE_TEST_CLOCK") != "1" {
		t.Skip("a server in a virtual machine takes six minutes on an idle host and many on a busy one: set KEDGE_TEST_CLOCK=1")
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
	vm, err := bed.VM(cluster.Within(t, 5*minute), "v1", testbed.Share(files, "/opt/kedge"), testbed.VMMemory(3072))
	if errors.Is(err, testbed.ErrNoVM) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	do := func(line string) string {
		t.Helper()
		out, err := vm.Shell(cluster.Within(t, 4*minute), line)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		return strings.TrimSpace(out)
	}
	run := func() {
		t.Helper()
		began := time.Now()
		do("setsid kedge server >>/var/log/kedge.log 2>&1 </dev/null & echo $! >/run/server.pid")
		cluster.EventuallyWithin(t, clockPatience, "the server to be ready", func(ctx context.Context) error {
			if out, err := vm.Shell(ctx, "kedge status"); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
		t.Logf("%s: ready after %s", do("date -u"), time.Since(began).Round(time.Second))
	}
	// A pod that needs no more than what Kedge brings, and that has to run anew after the boot.
	podRuns := func() (id string) {
		t.Helper()
		cluster.EventuallyWithin(t, clockPatience, "the pod to run", func(ctx context.Context) error {
			id, err = vm.Shell(ctx, `kedge kubectl get pods -l app=kept -o jsonpath='{range .items[*]}{.status.phase} {.status.conditions[?(@.type=="Ready")].status} {.status.containerStatuses[0].containerID}{"\n"}{end}'`)
			if id = strings.TrimSpace(id); err == nil && (!strings.HasPrefix(id, "Running True containerd://") || strings.Contains(id, "\n")) {
				err = fmt.Errorf("it is %q", id)
			}
			return err
		})
		return id
	}

	do("ln -s /opt/kedge/kedge /usr/local/bin/kedge")
	run()
	do("kedge kubectl create deployment kept --image=kedge.io/pause:1.0")
	pod := podRuns()
	do("kill $(cat /run/server.pid); while kill -0 $(cat /run/server.pid) 2>/dev/null; do sleep 0.2; done; sync")
	clock := time.Now().AddDate(2, 0, 0)
	if err := vm.Restart(cluster.Within(t, 3*minute), clock); err != nil {
		t.Fatal(err)
	}
	if year := do("date -u +%Y"); year != clock.UTC().Format("2006") {
		t.Fatalf("the clock says %s", year)
	}
	if out, err := vm.Shell(cluster.Within(t, minute), "kedge certificate check"); err == nil || strings.Count(out, "expired") < 9 {
		t.Errorf("two years on not everything has expired: %v: %s", err, out)
	}
	run()
	if after := podRuns(); after == pod {
		t.Errorf("the pod is said to be %s, as before it was off", after)
	}
	t.Log(do("kedge certificate check"))
	if got := do("kedge kubectl get --raw /api/v1/nodes/v1/proxy/healthz"); got != "ok" {
		t.Errorf("the kubelet: %q", got)
	}
	if got := do("kedge kubectl --kubeconfig=/dev/null --server=https://127.0.0.1:6443 --certificate-authority=/var/lib/kedge/pki/server-ca.crt --token=$(kedge kubectl create token default) auth whoami -o jsonpath='{.status.userInfo.username}'"); got != "system:serviceaccount:default:default" {
		t.Errorf("a new token of a service account is that of %q", got)
	}
	if got := do("kedge kubectl get nodes --no-headers"); !strings.Contains(got, " Ready ") {
		t.Errorf("nodes: %s", got)
	}
}
