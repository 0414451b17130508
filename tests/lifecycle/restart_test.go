// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// TestKilledChildren kills one process after the other: each time the node recovers by itself.
func TestKilledChildren(t *testing.T) {
	s := shared.Server(t).Session(t)
	web := runningPod(s, "web")
	for _, name := range []string{"etcd", "controlplane", "containerd", "node"} {
		t.Run(name, func(t *testing.T) {
			process := func(st *cluster.Status) (pid, restarts int, exit string) {
				for _, p := range st.Processes {
					if p.Name == name {
						return p.PID, p.Restarts, p.LastExit
					}
				}
				return 0, 0, ""
			}
			before, err := s.Status(within(t, minute))
			if err != nil {
				t.Fatal(err)
			}
			pid, restarts, _ := process(before)
			if pid == 0 {
				t.Fatalf("no process %s in the status: %+v", name, before)
			}
			if _, err := s.Exec(within(t, minute), "kill", "-9", fmt.Sprint(pid)); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Status(within(t, 5*time.Second)); err != nil {
				t.Errorf("kedge status right after the kill: %v", err)
			}
			statusBecomes(s, name+" to be restarted and all to be ready", func(st *cluster.Status) error {
				if now, n, exit := process(st); now == pid || n != restarts+1 || !strings.Contains(exit, "kill") {
					return fmt.Errorf("pid %d, %d restarts, last exit %q", now, n, exit)
				}
				return allReady(st)
			})
			s.Eventually("the pod to be untouched", web.untouched)
			mustWork(t, s, "web")
			if err := web.answers(within(t, minute)); err != nil {
				t.Errorf("the pod that ran before: %v", err)
			}
		})
	}
}

// TestStopAndTakeOver: SIGTERM stops the server within seconds, pods run on, and the next server takes them over.
func TestStopAndTakeOver(t *testing.T) {
	s := shared.Server(t).Session(t)
	web := runningPod(s, "web")
	began := time.Now()
	if err := s.Stop(within(t, minute)); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d > 15*time.Second {
		t.Errorf("the server took %s to stop", d)
	}
	if out, err := s.Shell(within(t, minute), "pgrep -af '^kedge \\[' || true"); err != nil || out != "" {
		t.Errorf("children of the server live on: %q, %v", out, err)
	}
	if err := web.answers(within(t, minute)); err != nil {
		t.Errorf("the pod, while the server is stopped: %v", err)
	}
	restart(t, s)
	if err := web.untouched(); err != nil {
		t.Error(err)
	}
	mustWork(t, s, "web")
}

// TestKilledServer: when the supervisor dies its children die with it, and the pods do not.
func TestKilledServer(t *testing.T) {
	s := shared.Server(t).Session(t)
	web := runningPod(s, "web")
	p := s.Process()
	if err := errors.Join(p.Signal(within(t, minute), "KILL"), p.Wait(within(t, 10*time.Second))); err != nil {
		t.Fatal(err)
	}
	s.Eventually("its children to be gone", func() error {
		out, err := s.Shell(s.Within(10*time.Second), "pgrep -af '^kedge \\[' || true")
		if err == nil && out != "" {
			err = errors.New(out)
		}
		return err
	})
	if err := web.answers(within(t, minute)); err != nil {
		t.Errorf("the pod, while the server is dead: %v", err)
	}
	restart(t, s)
	if err := web.untouched(); err != nil {
		t.Error(err)
	}
	mustWork(t, s, "web")
}

func restart(t *testing.T, s *cluster.Session) {
	t.Helper()
	ctx := within(t, 2*minute)
	if err := errors.Join(s.Run(ctx), s.WaitReady(ctx)); err != nil {
		t.Fatal(err)
	}
	statusBecomes(s, "all to be ready", allReady)
}

// TestSecondServer: another server on the same machine is refused with the reason, and the first does not notice.
func TestSecondServer(t *testing.T) {
	s := shared.Server(t).Session(t)
	began := time.Now()
	_, err := s.Exec(within(t, 30*time.Second), cluster.Program, "server")
	var exit *testbed.ExitError
	if !errors.As(err, &exit) || exit.Code < 1 {
		t.Fatalf("a second server: %v", err)
	}
	if text := exit.Stderr + exit.Stdout; !strings.Contains(text, "is running on this machine") {
		t.Errorf("it does not say why: %s", text)
	}
	if d := time.Since(began); d > 15*time.Second {
		t.Errorf("it took %s to say so", d)
	}
	st, err := s.Status(within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	if err := allReady(st); err != nil {
		t.Errorf("the first server: %v", err)
	}
	for _, p := range st.Processes {
		if p.PID == 0 {
			t.Errorf("%s of the first server is gone", p.Name)
		}
	}
}

// TestPowerCut: the machine loses power while it works, and comes back with all data and all pods.
func TestPowerCut(t *testing.T) {
	s := shared.Server(t).Session(t)
	s.Kubectl("create", "deployment", "web", "--image=kedge.test/server:1", "--replicas=2")
	s.Kubectl("expose", "deployment", "web", "--port=80", "--target-port=8080")
	s.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	for i := range 20 { // the last write is acknowledged right before the cut
		s.Kubectl("create", "configmap", fmt.Sprintf("data-%d", i), fmt.Sprintf("--from-literal=n=%d", i))
	}
	if err := errors.Join(s.PowerCut(within(t, minute)), s.Boot(within(t, minute))); err != nil {
		t.Fatal(err)
	}
	restart(t, s)
	for i := range 20 {
		if got := s.Kubectl("get", "configmap", fmt.Sprintf("data-%d", i), "-o", "jsonpath={.data.n}"); got != fmt.Sprint(i) {
			t.Errorf("ConfigMap %d is %q after the power cut", i, got)
		}
	}
	s.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	s.Eventually("both pods to answer through the Service", func() error {
		ip := s.Kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
		names := map[string]bool{}
		for range 10 {
			out, err := s.Exec(s.Within(10*time.Second), "curl", "-sS", "-m", "3", "http://"+ip+"/")
			if err != nil {
				return err
			}
			names[strings.Fields(out)[0]] = true
		}
		if len(names) != 2 {
			return fmt.Errorf("answers from %v", names)
		}
		return nil
	})
	if out, err := s.Try("run", "probe", "-i", "--quiet", "--rm", "--restart=Never", "--image=kedge.test/busybox:1", "--",
		"timeout", "20", "sh", "-c", "until wget -q -O- http://web/; do sleep 0.5; done"); err != nil || !strings.HasPrefix(out, "web-") {
		t.Errorf("a new pod: %q, %v", out, err)
	}
}

// TestHungMachine: everything stands still for longer than leases last, then runs on.
func TestHungMachine(t *testing.T) {
	s := shared.Server(t).Session(t)
	web := runningPod(s, "web")
	if err := s.Freeze(within(t, minute)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(45 * time.Second) // this is how long it hangs; nothing is waited for
	if err := s.Thaw(context.Background()); err != nil {
		t.Fatal(err)
	}
	statusBecomes(s, "all to be ready", allReady)
	s.Eventually("the node to be Ready and the pod untouched", func() error {
		ctx := s.Within(30 * time.Second)
		return errors.Join(s.WaitReady(ctx), web.untouched())
	})
	mustWork(t, s, "web")
}
