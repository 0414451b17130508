// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// TestCluster: four machines with systemd and no way to anything but each other become a highly available cluster with an agent, are
// upgraded under their pods, and come back after a reboot and after a power cut.
func TestCluster(t *testing.T) {
	bed := testbed.New(t)
	images, err := cluster.Images(cluster.Within(t, 3*minute), bed, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var servers []*cluster.Server
	var names []string
	for _, name := range []string{"s1", "s2", "s3"} {
		servers, names = append(servers, machine(t, bed, name, images, testbed.Systemd())), append(names, name)
	}
	agent := machine(t, bed, "a1", images, testbed.Systemd())
	agent.Role = cluster.AgentRole
	all := append(slices.Clone(servers), agent)
	for _, s := range all {
		booted(t, s)
	}
	first := servers[0]
	whole := func(ctx context.Context) error {
		var errs []error
		for _, s := range servers {
			errs = append(errs, s.NodesReady(ctx, append(names, "a1")...), s.Voters(ctx, names...))
		}
		return errors.Join(errs...)
	}

	before := listing(t, first)
	out := install(t, first, stick, "--dry-run")
	contains(t, out, "/etc/systemd/system/kedge.service", "nothing was changed")
	if diff := cmp.Diff(before, listing(t, first)); diff != "" {
		t.Errorf("a dry run changed something: %s", diff)
	}

	out = install(t, first, stick)
	contains(t, out, "checksums are right, and signed with the key that it brings along", "ready after", "kedge token create")
	token, err := first.Token(cluster.Within(t, minute), cluster.ServerRole)
	if err != nil {
		t.Fatal(err)
	}
	joined := make(chan error)
	go func() { // as it is printed, by whom nothing is to be added
		line := regexp.MustCompile(`(?m)^(KEDGE_URL=\S+ KEDGE_TOKEN=\S+) sh install\.sh$`).FindStringSubmatch(shell(t, first, "kedge token create"))
		if line == nil {
			joined <- errors.New("kedge token create prints no command for install.sh")
			return
		}
		out, err := agent.Shell(cluster.Within(t, 4*minute), line[1]+" sh "+stick+"/install.sh 2>&1")
		if err != nil {
			err = fmt.Errorf("a1: %w: %s", err, out)
		}
		joined <- err
	}()
	for _, s := range servers[1:] { // at the same time: one waits for the other
		go func() {
			out, err := tryInstall(t, s, stick, "KEDGE_URL="+first.URL(), "KEDGE_TOKEN="+token, "server")
			if err != nil {
				err = fmt.Errorf("%s: %w: %s", s.Name(), err, out)
			}
			joined <- err
		}()
	}
	for range all[1:] {
		if err := <-joined; err != nil {
			t.Fatal(err)
		}
	}
	cluster.Eventually(t, "three servers, each a node and a voter, and an agent", whole)
	for _, s := range all[1:] {
		noSecrets(t, s)
	}

	pid := shell(t, first, "systemctl show -p MainPID --value kedge")
	before = listing(t, first)
	contains(t, install(t, first, stick), "nothing to do")
	if now := shell(t, first, "systemctl show -p MainPID --value kedge"); now != pid {
		t.Errorf("the second run restarted the service: pid %s, was %s", now, pid)
	}
	for _, dir := range []string{"/etc/", "/usr/"} {
		if diff := cmp.Diff(part(before, dir), part(listing(t, first), dir)); diff != "" {
			t.Errorf("the second run changed %s: %s", dir, diff)
		}
	}

	session := first.Session(t)
	session.Apply(web)
	session.Kubectl("rollout", "status", "daemonset/web", "--timeout=55s")
	t.Run("upgrade", func(t *testing.T) {
		for _, s := range all {
			upgrade(t, session, s)
		}
		cluster.Eventually(t, "the whole cluster", whole)
	})
	t.Run("reboot", func(t *testing.T) {
		s := servers[2]
		_, _ = s.Exec(cluster.Within(t, 10*time.Second), "systemctl", "reboot") // it may be gone before it answers
		cluster.Eventually(t, "the machine to go down", func(ctx context.Context) error {
			if state, err := s.State(ctx); err != nil || state != "dead" {
				return fmt.Errorf("%s %w", state, err)
			}
			return nil
		})
		comesBack(t, session, s)
		cluster.Eventually(t, "the whole cluster", whole)
	})
	t.Run("power cut", func(t *testing.T) {
		cluster.Do(t, servers[1].PowerCut)
		comesBack(t, session, servers[1])
		cluster.Eventually(t, "the whole cluster", whole)
	})
}

// A node that shuts down ends its pods for good; a DaemonSet's are made anew.
const web = `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: server
        image: kedge.test/server:1
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
`

// podOn gives address, container and restarts of the pod that runs on a node.
func podOn(session *cluster.Session, s *cluster.Server) (string, error) {
	out, err := session.Try("get", "pods", "-l", "app=web", "--field-selector", "status.phase=Running,spec.nodeName="+s.Name(), "-o",
		`jsonpath={.items[*].status.podIP} {.items[*].status.containerStatuses[0].containerID} {.items[*].status.containerStatuses[0].restartCount}`)
	if err == nil && len(strings.Fields(out)) != 3 {
		err = fmt.Errorf("not one pod runs on %s: %q", s.Name(), out)
	}
	return out, err
}

func part(listing, dir string) string {
	var lines []string
	for line := range strings.Lines(listing) {
		if strings.HasPrefix(line, dir) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

// noSecrets: the token is in one file of root's and nowhere else.
func noSecrets(t *testing.T, s *cluster.Server) {
	t.Helper()
	if got := shell(t, s, "stat -c '%a %U' /etc/kedge/token"); got != "600 root" {
		t.Errorf("the token's file: %s", got)
	}
	if out := shell(t, s, "[ -s /etc/kedge/token ] && ! grep -l -F -f /etc/kedge/token /proc/[0-9]*/cmdline /proc/[0-9]*/environ /etc/systemd/system/kedge.service 2>/dev/null"); out != "" {
		t.Errorf("the token is in %s", out)
	}
	if out := shell(t, s, "journalctl --no-pager -o export | grep -c -F -f /etc/kedge/token || true"); out != "0" {
		t.Errorf("the token is in the journal, %s times", out)
	}
}

// upgrade installs the newer release on a server while its pod is asked all the time.
func upgrade(t *testing.T, session *cluster.Session, s *cluster.Server) {
	t.Helper()
	before, err := podOn(session, s)
	if err != nil {
		t.Fatal(err)
	}
	ip, _, _ := strings.Cut(before, " ")
	probe, err := s.Spawn(cluster.Within(t, minute), "/var/log/probe.log", "sh", "-c",
		"while :; do curl -sS -o /dev/null -m 2 http://"+ip+":8080/ && echo -n . || echo failed; sleep 0.1; done")
	if err != nil {
		t.Fatal(err)
	}
	out := install(t, s, newer)
	contains(t, out, "signed with /etc/kedge/release.pub", "ready after", shared.versions[1])
	if err := errors.Join(probe.Signal(cluster.Within(t, minute), "TERM"), probe.Wait(cluster.Within(t, minute))); err != nil {
		t.Fatal(err)
	}
	if log := shell(t, s, "cat /var/log/probe.log"); strings.Contains(log, "failed") || len(log) < 10 {
		t.Errorf("%s: requests to the pod during the upgrade: %s", s.Name(), log)
	}
	for program, want := range map[string]string{"kedge": shared.versions[1], "kedge.previous": shared.versions[0]} {
		if got := shell(t, s, program+" version"); !strings.HasPrefix(got, "kedge "+want+" ") {
			t.Errorf("%s on %s: %s", program, s.Name(), got)
		}
	}
	contains(t, shell(t, s, "kedge status"), "Kedge "+shared.versions[1]+" on "+string(s.Role)+" "+s.Name()+": ready")
	if after, err := podOn(session, s); err != nil || after != before {
		t.Errorf("the pod of %s did not survive: %s, was %s; %v", s.Name(), after, before, err)
	}
	// The options of the first installation are still there.
	if s.Name() != "s1" {
		contains(t, shell(t, s, "systemctl cat kedge"), "ExecStart=/usr/local/bin/kedge "+string(s.Role)+" --server https://", " --token-file /etc/kedge/token")
	}
}

// comesBack boots a machine that is off; nobody does anything else to it.
func comesBack(t *testing.T, session *cluster.Session, s *cluster.Server) {
	t.Helper()
	cluster.Do(t, s.Boot)
	cluster.Eventually(t, s.Name()+" to be ready", func(ctx context.Context) error {
		st, err := s.Status(ctx)
		if err != nil {
			return err
		}
		return st.Problems()
	})
	session.Eventually("its pod to answer", func() error {
		pod, err := podOn(session, s)
		if err == nil {
			ip, _, _ := strings.Cut(pod, " ")
			_, err = s.Exec(session.Within(10*time.Second), "curl", "-sSf", "-m", "2", "-o", "/dev/null", "http://"+ip+":8080/healthz")
		}
		return err
	})
}

// TestOpenRC installs for the OpenRC of Debian, which starts nothing else in its machine.
func TestOpenRC(t *testing.T) {
	bed := testbed.New(t)
	s := machine(t, bed, "o1", nil)
	debs := filepath.Join(t.TempDir(), "debs")
	if out, err := run("../../scripts/debs", goarch, debs, "openrc"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// What is in the machine already comes with the same packages; its links to /usr stay.
	archive := filepath.Join(t.TempDir(), "openrc.tar")
	if out, err := run("sh", "-c", `cd "$1"/root && find . \( -name 'librc.so*' -o -name 'libeinfo.so*' -o -path './lib/rc*' -o -path './etc/*' -o -path './sbin/*' -o -path './bin/rc*' \) ! -type d | tar -cf "$2" -T -`,
		"sh", debs, archive); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := s.ExecInput(cluster.Within(t, minute), f, "tar", "--keep-directory-symlink", "-C", "/", "-xf", "-"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Shell(cluster.Within(t, minute), "mkdir -p /etc/runlevels/sysinit /etc/runlevels/boot /etc/runlevels/default; openrc sysinit; openrc boot; openrc default"); err != nil {
		t.Fatal(err)
	}

	contains(t, install(t, s, stick, "server", "--node-label", "where=cellar", "--token", "a-token-of-ones-own"), "/etc/init.d/kedge", "ready after")
	contains(t, shell(t, s, "rc-service kedge status; rc-update show default"), "started", "kedge")
	contains(t, shell(t, s, "tr '\\0' ' ' </proc/$(cat /run/openrc/options/kedge/child_pid)/cmdline"), "kedge server --node-label where=cellar --token-file /etc/kedge/token")
	cluster.Eventually(t, "the node", func(ctx context.Context) error { return s.NodesReady(ctx, "o1") })
	contains(t, install(t, s, stick), "nothing to do")
	kubectl := func(args ...string) string {
		t.Helper()
		out, err := s.Kubectl(cluster.Within(t, minute), append([]string{"-n", "default"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	cluster.Do(t, func(ctx context.Context) error { return s.Apply(ctx, "default", still) })
	kubectl("rollout", "status", "daemonset/still", "--timeout=55s")
	const container = `jsonpath={.items[*].status.containerStatuses[0].containerID} {.items[*].status.containerStatuses[0].restartCount}`
	before := kubectl("get", "pods", "-l", "app=still", "-o", container)
	contains(t, install(t, s, newer), "ready after", shared.versions[1])
	contains(t, shell(t, s, "kedge status"), "Kedge "+shared.versions[1])
	contains(t, shell(t, s, "kedge upgrade --rollback"), "succeeded")
	contains(t, shell(t, s, "kedge status; rc-service kedge status"), "Kedge "+shared.versions[0], "started")
	if after := kubectl("get", "pods", "-l", "app=still", "-o", container); after != before {
		t.Errorf("the pod's container is %s, and was %s", after, before)
	}

	// It is started again when it dies, and stops when it is told to.
	shell(t, s, "kill -9 $(cat /run/openrc/options/kedge/child_pid)")
	cluster.Eventually(t, "OpenRC to start it again", func(ctx context.Context) error {
		st, err := s.Status(ctx)
		if err != nil {
			return err
		}
		return st.Problems()
	})
	out, err := tryInstall(t, s, newer, "server", "--cluster-domain", "contradiction")
	if err == nil {
		t.Errorf("an option that contradicts the cluster was accepted: %s", out)
	}
	contains(t, out, "Kedge ended", "contradicts the cluster")
	shell(t, s, "rc-service kedge stop")
	if out := shell(t, s, "pgrep -af '^/usr/local/bin/kedge server' || true"); out != "" {
		t.Errorf("it runs on: %s", out)
	}

	// The machine goes down with Kedge's service, which ends its pods, and comes up again.
	install(t, s, newer, "server")
	kubectl("rollout", "status", "daemonset/still", "--timeout=55s")
	contains(t, shell(t, s, "openrc shutdown 2>&1"), "pod default/still-", " ended after ")
	if out := shell(t, s, "pgrep -af 'kedge|shim|/pause' | grep -v pgrep || true"); out != "" {
		t.Errorf("after the shutdown: %s", out)
	}
	shell(t, s, "openrc default")
	cluster.Eventually(t, "the node after the boot", func(ctx context.Context) error { return s.NodesReady(ctx, "o1") })
	contains(t, shell(t, s, "kedge uninstall 2>&1"), "a look for what may be left found nothing")
	if out := shell(t, s, "ls /usr/local/bin /etc/runlevels/default; pgrep -a supervise || true"); strings.Contains(out, "kedge") {
		t.Errorf("left: %s", out)
	}
}

const still = `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: still, namespace: default}
spec:
  selector: {matchLabels: {app: still}}
  template:
    metadata: {labels: {app: still}}
    spec:
      containers: [{name: c, image: "kedge.io/pause:1.0", imagePullPolicy: Never}]
`
