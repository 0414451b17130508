// SPDX-License-Identifier: Apache-2.0

// Package lifecycle tests that a node survives what happens to machines: processes that are killed, restarts, power cuts,
// full disks; and that running pods do not notice what need not concern them.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

var shared = cluster.Shared{Name: "lifecycle"} //policy:allow variable one server for the package

func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }

const minute = time.Minute

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// pod is a running pod that a test watches.
type pod struct {
	s    *cluster.Session
	name string
	id   string // of its container
	ip   string
}

const identity = `jsonpath={.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount} {.status.podIP}`

// runningPod starts the test server in a pod, with a Service in front.
func runningPod(s *cluster.Session, name string) pod {
	s.Apply(cluster.ServerPod, name, "", "")
	s.Kubectl("expose", "pod", name, "--port=80", "--target-port=8080")
	s.Ready(name)
	p := pod{s: s, name: name}
	fields := strings.Fields(s.Kubectl("get", "pod", name, "-o", identity))
	p.id, p.ip = fields[0], fields[2]
	return p
}

// answers asks the pod from the node, which needs no API server.
func (p pod) answers(ctx context.Context) error {
	out, err := p.s.Exec(ctx, "curl", "-sS", "-m", "3", "http://"+p.ip+":8080/")
	if err == nil && !strings.HasPrefix(out, p.name+" ") {
		err = fmt.Errorf("%q", out)
	}
	return err
}

// untouched tells whether the pod still has the container it had.
func (p pod) untouched() error {
	got, err := p.s.Try("get", "pod", p.name, "-o", identity)
	if want := p.id + " 0 " + p.ip; err == nil && got != want {
		err = fmt.Errorf("the pod's container changed: %q, was %q", got, want)
	}
	return err
}

// works proves that a node does all of its work: a new pod starts, finds a Service by name and reaches it.
func works(s *cluster.Session, service string) error {
	name := "probe-" + time.Now().Format("150405")
	out, err := s.Try("run", name, "-i", "--quiet", "--rm", "--restart=Never", "--image=kedge.test/busybox:1", "--pod-running-timeout=50s", "--",
		"timeout", "20", "sh", "-c", "until wget -q -O- http://"+service+"/; do sleep 0.5; done")
	if err == nil && !strings.HasPrefix(out, service+" ") {
		err = fmt.Errorf("the Service %s answers %q", service, out)
	}
	return err
}

func mustWork(t *testing.T, s *cluster.Session, service string) {
	t.Helper()
	if err := works(s, service); err != nil {
		t.Error(err)
	}
}

// statusBecomes waits until kedge status is as cond wants it.
func statusBecomes(s *cluster.Session, what string, cond func(*cluster.Status) error) {
	s.EventuallyWithin(90*time.Second, what, func() error {
		st, err := s.Status(s.Within(10 * time.Second))
		if err != nil {
			return err
		}
		return cond(st)
	})
}

func allReady(st *cluster.Status) error {
	var bad []string
	for _, p := range st.Processes {
		for _, c := range p.Components {
			if c.State != "ready" {
				bad = append(bad, fmt.Sprintf("%s is %s (%s)", c.Name, c.State, c.Reason))
			}
		}
	}
	if len(bad) > 0 || !st.Ready {
		return errors.New("not ready: " + strings.Join(bad, ", "))
	}
	return nil
}

// start makes a server of its own for a test that needs another machine than the shared one.
func start(t *testing.T, o cluster.Options) *cluster.Session {
	t.Helper()
	s := prepare(t, o)
	ctx := within(t, 3*minute)
	if err := errors.Join(s.Run(ctx), s.WaitReady(ctx)); err != nil {
		t.Fatal(err)
	}
	return s.Session(t)
}

func prepare(t *testing.T, o cluster.Options) *cluster.Server {
	t.Helper()
	bed := testbed.New(t)
	ctx := within(t, 3*minute)
	var err error
	if o.Images, err = cluster.Images(ctx, bed, t.TempDir()); err != nil {
		t.Fatal(err)
	}
	s, err := cluster.Prepare(ctx, bed, "m1", o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
