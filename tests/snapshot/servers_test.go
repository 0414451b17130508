// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

// TestServers: of three servers two have lost their power, and the data of the third is damaged. It is restored, and the two take part again by
// their ordinary start, at the same moment. Then all three burn, and a fourth machine takes over.
func TestServers(t *testing.T) {
	c := cluster.ForTest(t, cluster.Spec{Servers: 3})
	s1, s2, s3 := machine{c.Servers[0], t}, machine{c.Servers[1], t}, machine{c.Servers[2], t}
	service := startService(t, c.Bed.Gateway())
	for _, m := range []machine{s1, s2, s3} {
		m.useBucket(service, 1)
	}
	begin := time.Now()
	if err := c.Start(cluster.Within(t, 4*minute)); err != nil {
		t.Fatal(err)
	}
	t.Logf("three servers in %s", time.Since(begin).Round(time.Second))
	oneBucket(t, s1, s2, s3)
	key := s1.snapshot("recovery-key")
	if other := s3.snapshot("recovery-key"); other != key {
		t.Fatalf("s1 has the recovery key\n%s\ns3\n%s", key, other)
	}
	s2.mark("before")
	s1.snapshot("save", "--name", "good")
	after := s2.mark("after")
	if out := s2.snapshot("list", "--cluster"); !strings.Contains(out, "good") {
		t.Errorf("s2 knows of\n%s", out)
	}

	cluster.Do(t, s1.Stop)
	s1.refuses("other servers of the cluster are running", "restore", "good")
	cluster.Do(t, s2.PowerCut, s3.PowerCut)
	if _, err := s1.Shell(cluster.Within(t, minute), "truncate -s 5000 "+cluster.DataDir+"/etcd/member/snap/db"); err != nil {
		t.Fatal(err)
	}
	s1.refuses("--force", "restore", "good") // who else is in the cluster cannot be read
	if out := s1.snapshot("restore", "--force", "good"); !strings.Contains(out, "s2, s3") {
		t.Errorf("it says %s", out)
	}
	begin = time.Now()
	cluster.Do(t, s1.Restart)
	s1.leads(begin)
	cluster.Do(t, s1.WaitReady)
	if got := s1.marks("before", "after"); got != "before" {
		t.Errorf("after the restore there is %s", got)
	}
	if now := s1.revision(s1.kubectl("create", "configmap", "now", "-o", "jsonpath={.metadata.resourceVersion}")); now <= after {
		t.Errorf("revision %d after %d", now, after)
	}
	// Together they are a majority of the former cluster, and must not become one again.
	begin = time.Now()
	cluster.Do(t, s2.Boot, s3.Boot, s2.Run, s3.Run)
	cluster.Eventually(t, "s2 and s3 to be voters again", func(ctx context.Context) error { return s1.Voters(ctx, "s1", "s2", "s3") })
	t.Logf("s2 and s3 take part again after %s", time.Since(begin).Round(time.Second))
	cluster.Do(t, c.WaitServing)
	if got := s3.marks("before", "after"); got != "before" {
		t.Errorf("on s3 there is %s", got)
	}
	newHardware(t, c, s2, key)
}

// leads waits until a new Deployment's pod runs on a server that was restored. The lease of the leader of before, which may be another
// server, is not waited for: that would take 40 seconds from when the API answers.
func (m machine) leads(begin time.Time) {
	m.t.Helper()
	cluster.Eventually(m.t, "the API to take a Deployment", func(ctx context.Context) error {
		_, err := m.Kubectl(ctx, "create", "deployment", "new-"+m.Name(), "--image=kedge.test/server:1")
		return err
	})
	answers := time.Now()
	m.kubectl("patch", "deployment", "new-"+m.Name(), "--type=merge", "-p", `{"spec": {"template": {"spec": {"nodeName": "`+m.Name()+`"}}}}`)
	cluster.Eventually(m.t, "its pod to run on "+m.Name(), func(ctx context.Context) error {
		out, err := m.Kubectl(ctx, "get", "pods", "-l", "app=new-"+m.Name(), "--field-selector", "status.phase=Running,spec.nodeName="+m.Name(), "-o", "name")
		if err == nil && out == "" {
			err = errors.New("not yet")
		}
		return err
	})
	took := time.Since(answers)
	m.t.Logf("on %s a new pod runs %s after the start of Kedge, %s after the API took its Deployment", m.Name(), time.Since(begin).Round(100*time.Millisecond), took.Round(100*time.Millisecond))
	if took > 30*time.Second {
		m.t.Error("that is too long: somebody's lease was waited for")
	}
}

// newHardware: a snapshot and the recovery key are enough for a machine of another name and address.
func newHardware(t *testing.T, c *cluster.Cluster, from machine, key string) {
	t.Helper()
	from.mark("last")
	from.snapshot("save", "--name", "last")
	file, err := from.ReadFile(dir + "last.kedge")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range c.Servers {
		cluster.Do(t, s.PowerCut)
	}
	added, err := c.AddServer(cluster.Within(t, minute))
	if err != nil {
		t.Fatal(err)
	}
	s4 := machine{added, t}
	if err := errors.Join(s4.WriteFile("/root/last.kedge", file, 0o600), s4.WriteFile("/root/key", []byte(key), 0o600)); err != nil {
		t.Fatal(err)
	}
	s4.refuses("the recovery key is needed", "restore", "/root/last.kedge")
	if got := s4.files(); got != "" {
		t.Errorf("what was refused leaves %s", got)
	}
	s4.snapshot("restore", "--recovery-key", "/root/key", "--forget-others", "/root/last.kedge")
	begin := time.Now()
	cluster.Do(t, s4.Run)
	s4.leads(begin)
	cluster.Do(t, s4.WaitReady)
	t.Logf("on new hardware in %s", time.Since(begin).Round(time.Second))
	if got := s4.marks("before", "after", "last"); got != "before last" {
		t.Errorf("on new hardware there is %s", got)
	}
	cluster.Eventually(t, "the old servers to be forgotten", func(ctx context.Context) error {
		nodes, err := s4.Nodes(ctx)
		if err != nil {
			return err
		}
		servers, err := s4.Kubectl(ctx, "-n", "kube-system", "get", "configmap", "kedge-servers", "-o", "jsonpath={.data}")
		if err == nil && (len(nodes) != 1 || strings.Contains(servers, `"s1"`)) {
			err = fmt.Errorf("%d nodes, servers %s", len(nodes), servers)
		}
		if err == nil && strings.Contains(s4.files(), "restore") {
			err = fmt.Errorf("files %s", s4.files())
		}
		return err
	})
	if err := s4.Voters(cluster.Within(t, minute), "s4"); err != nil {
		t.Error(err)
	}
	if ip := s4.kubectl("get", "endpointslices", "kubernetes", "-o", "jsonpath={.endpoints[*].addresses[*]}"); !strings.Contains(ip, s4.IP()) {
		t.Errorf("the API is at %s", ip)
	}
	if got := s4.snapshot("recovery-key"); !strings.Contains(got, key[strings.Index(key, "AGE-SECRET"):]) {
		t.Errorf("the recovery key is another one now: %s", got)
	}
}
