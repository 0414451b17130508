// SPDX-License-Identifier: Apache-2.0

package uninstall

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// workload is pods with volumes of several kinds, services, a policy and a host port.
const workload = `
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  containers:
  - name: server
    image: kedge.test/server:1
    ports: [{containerPort: 8080, hostPort: 8088}]
    volumeMounts:
    - {name: disk, mountPath: /disk}
    - {name: memory, mountPath: /memory}
    - {name: host, mountPath: /host}
    - {name: host, mountPath: /sub, subPath: part}
  volumes:
  - {name: disk, emptyDir: {}}
  - {name: memory, emptyDir: {medium: Memory}}
  - {name: host, hostPath: {path: /srv/data}}
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  containers:
  - name: client
    image: kedge.test/busybox:1
    command: [sh, -c, "echo written > /local/by-pod; exec sleep 100000"]
    volumeMounts: [{name: local, mountPath: /local}]
  volumes: [{name: local, persistentVolumeClaim: {claimName: local}}]
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: local}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  storageClassName: local
  local: {path: /srv/local}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: test, operator: In, values: ["yes"]}]}]}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: local}
spec: {accessModes: [ReadWriteOnce], storageClassName: local, resources: {requests: {storage: 1Gi}}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 8000, targetPort: 8080}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web}
spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {}}]}]}
`

// TestNothingIsLeft compares listings of the machine from before the installation and after uninstalling, which is interrupted, held up
// by a file system that is not Kedge's, and finished.
func TestNothingIsLeft(t *testing.T) {
	bed := testbed.New(t)
	m := newMachine(t, bed, "m1")
	m.run("mkdir -p /srv/data/part /srv/local /srv/disk && echo kept > /srv/data/file && echo kept > /srv/disk/file")
	m.run("touch /srv/local/by-pod; echo written > /srv/local/by-pod") // what the pod will write, for the listings
	if out := m.run(source + " uninstall"); !strings.Contains(out, "nothing to do") {
		t.Errorf("on a clean machine: %s", out)
	}
	before := m.listing()
	m.install("")
	m.apply(workload)
	m.kubectl("wait", "--for=condition=Ready", "--timeout=90s", "pod/web", "pod/client")

	// Somebody mounts things below volumes: their data must survive. What is only in memory would be lost if it was unmounted.
	volume := m.run("ls -d /var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir/disk")
	m.run("cd " + volume + " && mkdir foreign bound && mount -t tmpfs tmpfs foreign && echo kept > foreign/file && mount --bind /srv/disk bound")

	var items []struct{ Kind, Name string }
	dry := m.run("kedge uninstall --dry-run -o json")
	if err := json.Unmarshal([]byte(dry), &items); err != nil {
		t.Fatal(err)
	}
	found := map[string]int{}
	for _, i := range items {
		found[i.Kind]++
	}
	for _, kind := range []string{"process", "mount", "link", "rules", "address", "cgroup", "file", "netns"} {
		if found[kind] == 0 {
			t.Errorf("--dry-run finds no %s: %v", kind, found)
		}
	}
	m.kubectl("get", "pod", "web") // and has changed nothing

	// The first run is killed as soon as it has begun to unmount.
	p, err := m.Spawn(cluster.Within(t, minute), "/tmp/first.log", source, "uninstall")
	if err != nil {
		t.Fatal(err)
	}
	cluster.Eventually(t, "the first run to be at work", func(ctx context.Context) error {
		out, err := m.Shell(ctx, "cat /tmp/first.log")
		if err == nil && !strings.Contains(out, "mounts removed") {
			err = fmt.Errorf("it says %q", out)
		}
		return err
	})
	if err := p.Signal(cluster.Within(t, minute), "KILL"); err != nil {
		t.Logf("the first run was too fast to be killed: %v", err)
	}

	out := m.fails(1, source+" uninstall")
	if !strings.Contains(out, volume+"/foreign") {
		t.Errorf("the run that was held up: %s", out)
	}
	out = m.fails(1, source+" uninstall --check")
	if !strings.Contains(out, volume+"/foreign") || strings.Contains(out, "rules") || strings.Contains(out, "process") || strings.Contains(out, "cgroup") {
		t.Errorf("left: %s", out)
	}
	if got := m.run("cat " + volume + "/foreign/file /srv/disk/file /srv/data/file /srv/local/by-pod"); got != "kept\nkept\nkept\nwritten" {
		t.Errorf("data of others: %q", got)
	}
	m.run("umount " + volume + "/foreign")
	t.Log(m.run(source + " uninstall"))
	if out := m.run(source + " uninstall --check"); !strings.Contains(out, "nothing of Kedge") {
		t.Errorf("the check: %s", out)
	}
	m.sameAs(before)
}

// TestOneOfThree: a server leaves its cluster, and the others go on.
func TestOneOfThree(t *testing.T) {
	bed := testbed.New(t)
	ctx := cluster.Within(t, 10*minute)
	c, err := cluster.New(ctx, bed, cluster.Spec{Servers: 3})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	s1, s3 := c.Servers[0], c.Servers[2]
	// Without the others it must not just go away: with it, the datastore would lose a member that nobody took leave of.
	if err := errors.Join(bed.Partition(ctx, s1.Machine, s3.Machine), bed.Partition(ctx, c.Servers[1].Machine, s3.Machine)); err != nil {
		t.Fatal(err)
	}
	_, err = s3.Exec(ctx, cluster.Program, "uninstall")
	var exit *testbed.ExitError
	if !errors.As(err, &exit) || exit.Code != 1 || !strings.Contains(exit.Stderr, "--force") || !strings.Contains(exit.Stderr, "nothing was removed") {
		t.Errorf("without the other servers: %v", err)
	}
	if err := bed.Heal(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitServing(ctx); err != nil {
		t.Fatal(err)
	}
	out, err := s3.Exec(ctx, cluster.Program, "uninstall")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(out)
	if _, err := s3.Exec(ctx, cluster.Program, "uninstall", "--check"); err != nil {
		t.Error(err)
	}
	cluster.Eventually(t, "the cluster to go on with two servers", func(ctx context.Context) error {
		nodes, err := s1.Nodes(ctx)
		if _, there := nodes[s3.Name()]; err == nil && there {
			err = errors.New("its node is still there")
		}
		return errors.Join(err, s1.NodesReady(ctx, s1.Name(), c.Servers[1].Name()), s1.Voters(ctx, s1.Name(), c.Servers[1].Name()))
	})
}
