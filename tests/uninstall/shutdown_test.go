// SPDX-License-Identifier: Apache-2.0

package uninstall

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

// orderly are pods that tell in /srv/log when they were asked to end, one that needs names until the last moment, and one that does not
// listen.
const orderly = `
apiVersion: v1
kind: Pod
metadata: {name: polite}
spec:
  containers:
  - name: c
    image: kedge.test/busybox:1
    command: [sh, -c, "trap 'nslookup kubernetes.default.svc.cluster.local > /log/name; sleep 1; date +%s > /log/polite; exit 0' TERM; while :; do sleep 0.1; done"]
    lifecycle: {preStop: {exec: {command: [sh, -c, "echo hook > /log/hook"]}}}
    volumeMounts: [{name: log, mountPath: /log}]
  volumes: [{name: log, hostPath: {path: /srv/log, type: DirectoryOrCreate}}]
---
apiVersion: v1
kind: Pod
metadata: {name: critical, namespace: kube-system}
spec:
  priorityClassName: system-node-critical
  containers:
  - name: c
    image: kedge.test/busybox:1
    command: [sh, -c, "trap 'date +%s > /log/critical; exit 0' TERM; while :; do sleep 0.1; done"]
    volumeMounts: [{name: log, mountPath: /log}]
  volumes: [{name: log, hostPath: {path: /srv/log, type: DirectoryOrCreate}}]
---
apiVersion: v1
kind: Pod
metadata: {name: stubborn}
spec:
  terminationGracePeriodSeconds: 3
  containers:
  - {name: c, image: "kedge.test/busybox:1", command: [sleep, "100000"]}
`

// pods are running, with how often they were started.
func (m *machine) pods() (string, error) {
	out, err := m.Kubectl(cluster.Within(m.t, minute), "get", "pods", "-A", "-o",
		`jsonpath={range .items[*]}{.metadata.name}={.status.phase}/{.status.containerStatuses[0].ready}/{.status.containerStatuses[0].restartCount} {end}`)
	return strings.TrimSpace(out), err
}

func (m *machine) podsBecome(want string) {
	m.t.Helper()
	cluster.EventuallyWithin(m.t, 3*minute, "the pods to be "+want, func(context.Context) error {
		got, err := m.pods()
		if err == nil && got != want {
			err = fmt.Errorf("they are %s", got)
		}
		return err
	})
}

// times is what pods gives when all run, and were started again n times. They are sorted by namespace.
func times(n int) string {
	return fmt.Sprintf("polite=Running/true/%[1]d stubborn=Running/true/%[1]d critical=Running/true/%[1]d", n)
}

// stopped waits until the machine is off, and says how long that took.
func (m *machine) stopped(since time.Time) time.Duration {
	m.t.Helper()
	cluster.EventuallyWithin(m.t, 3*minute, "the machine to be off", func(ctx context.Context) error {
		state, err := m.State(ctx)
		if err == nil && state != "dead" {
			err = errors.New("it is " + state)
		}
		return err
	})
	return time.Since(since)
}

func (m *machine) reboot(command string) time.Duration {
	m.t.Helper()
	start := time.Now()
	_, _ = m.Shell(cluster.Within(m.t, minute), command) // may lose its connection to systemd
	took := m.stopped(start)
	cluster.Do(m.t, m.Boot)
	m.booted()
	return took
}

// ended checks what the pods wrote when they ended. The cluster DNS is Kedge's.
func (m *machine) ended(names bool) {
	m.t.Helper()
	got := strings.Fields(m.run("cat /srv/log/hook /srv/log/polite /srv/log/critical"))
	if len(got) != 3 || got[0] != "hook" || got[1] >= got[2] {
		m.t.Errorf("the hook, the end of the pod, and that of the critical one after it: %q", got)
	}
	if name := m.run("cat /srv/log/name"); names && !strings.Contains(name, "10.43.0.1") {
		m.t.Errorf("a name that was looked up while ending: %s", name)
	}
	m.run("rm -f /srv/log/*")
}

// TestShutdown: pods end in order before the machine does, and start again after the boot, whoever stops it.
func TestShutdown(t *testing.T) {
	m := newMachine(t, testbed.New(t), "m1")
	m.install("")
	m.apply(orderly)
	m.podsBecome(times(0))

	took := m.reboot("systemctl reboot")
	t.Logf("reboot, until the machine is off: %s", took)
	if took > minute {
		t.Errorf("the machine took %s to stop", took)
	}
	m.ended(true)
	m.ready()
	m.podsBecome(times(1))

	// Without Kedge, which somebody stopped: the pods run on, and end with the machine all the same.
	m.run("systemctl stop kedge")
	if m.run("pgrep -c sleep") == "0" {
		t.Error("stopping the service has ended the pods")
	}
	took = m.reboot("systemctl reboot")
	t.Logf("reboot without Kedge: %s", took)
	if took > minute {
		t.Errorf("the machine took %s to stop", took)
	}
	m.ended(false)
	m.ready()
	m.podsBecome(times(2))

	// By hand, without a reboot.
	out := m.run("kedge stop --pods --timeout 20s")
	t.Log(out)
	m.ended(true)
	if out := m.run("pgrep -a 'kedge|shim|sleep' || true; grep kubelet /proc/mounts || true"); out != "" {
		t.Errorf("after kedge stop --pods: %s", out)
	}
	m.run("systemctl start kedge")
	m.ready()
	m.podsBecome(times(3))
}
