// SPDX-License-Identifier: Apache-2.0

// Package uninstall tests that Kedge goes away as a whole, and nothing else with it; and that pods get their time when a machine stops.
package uninstall

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

const minute = time.Minute

// source is where machines see the program under test. The installed one is a copy.
const source = "/opt/kedge"

// machine has systemd, and Kedge when install has been called.
type machine struct {
	*cluster.Server
	t      *testing.T
	images []string
}

func newMachine(t *testing.T, bed *testbed.Bed, name string) *machine {
	t.Helper()
	ctx := cluster.Within(t, 5*minute)
	bin, err := cluster.Binary()
	if err != nil {
		t.Fatal(err)
	}
	images, err := cluster.Images(ctx, bed, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m, err := bed.Machine(ctx, name, testbed.Systemd(), testbed.Bind(bin, source))
	if err != nil {
		t.Fatal(err)
	}
	node := &machine{Server: &cluster.Server{Node: &cluster.Node{Machine: m, Role: cluster.ServerRole}}, t: t, images: images}
	node.booted()
	return node
}

// booted waits until systemd has started everything, and the addresses are there: those of IPv6 are tried first.
func (m *machine) booted() {
	m.t.Helper()
	cluster.Eventually(m.t, "systemd to have booted", func(ctx context.Context) error {
		out, err := m.Shell(ctx, "systemctl is-system-running || true")
		if s := strings.TrimSpace(out); err == nil && s != "running" && s != "degraded" {
			err = fmt.Errorf("it says %q", s)
		}
		return err
	})
	cluster.Eventually(m.t, "the addresses to be valid", func(ctx context.Context) error {
		out, err := m.Shell(ctx, "ip -6 address show tentative")
		if err == nil && strings.TrimSpace(out) != "" {
			err = errors.New(out)
		}
		return err
	})
}

// install does what install.sh does, and starts the service.
func (m *machine) install(flags string) {
	m.t.Helper()
	unit, err := os.ReadFile("../../scripts/kedge.service")
	if err != nil {
		m.t.Fatal(err)
	}
	text := strings.Replace(string(unit), "ExecStart=/usr/local/bin/kedge server", "ExecStart=/usr/local/bin/kedge server "+flags, 1)
	files := map[string][]byte{"/etc/systemd/system/kedge.service": []byte(text), "/etc/kedge/config.yaml": []byte("node-label: [test=yes]\n")}
	for _, archive := range m.images {
		b, err := os.ReadFile(archive)
		if err != nil {
			m.t.Fatal(err)
		}
		files["/var/lib/kedge/images/"+filepath.Base(archive)] = b
	}
	for name, b := range files {
		if err := m.WriteFile(name, b, 0o600); err != nil {
			m.t.Fatal(err)
		}
	}
	m.run("cp " + source + " /usr/local/bin/kedge && cp " + source + " /usr/local/bin/kedge.previous && " +
		"ln -s kedge /usr/local/bin/kubectl && ln -s /usr/local/bin/kedge /usr/local/bin/ctr && systemctl daemon-reload && systemctl enable --now kedge")
	m.ready()
}

// ready waits until the node is, and accepts pods.
func (m *machine) ready() {
	m.t.Helper()
	cluster.EventuallyWithin(m.t, 3*minute, "the node to be ready", func(ctx context.Context) error {
		if err := m.NodesReady(ctx, m.Name()); err != nil {
			return err
		}
		_, err := m.Kubectl(ctx, "-n", "default", "get", "serviceaccount", "default")
		return err
	})
}

// run runs a line of shell, which has to succeed.
func (m *machine) run(line string) string {
	m.t.Helper()
	out, err := m.Shell(cluster.Within(m.t, 5*minute), line)
	if err != nil {
		m.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// fails runs a line of shell, which has to fail with a status.
func (m *machine) fails(status int, line string) string {
	m.t.Helper()
	out, err := m.Shell(cluster.Within(m.t, 5*minute), line)
	var exit *testbed.ExitError
	if !errors.As(err, &exit) || exit.Code != status {
		m.t.Fatalf("%s: %v, want exit status %d", line, err, status)
	}
	return out + exit.Stderr
}

func (m *machine) apply(yaml string) {
	m.t.Helper()
	if _, err := m.ExecInput(cluster.Within(m.t, minute), strings.NewReader(yaml), "kedge", "kubectl", "apply", "-f", "-"); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) kubectl(args ...string) string {
	m.t.Helper()
	out, err := m.Kubectl(cluster.Within(m.t, 2*minute), args...)
	if err != nil {
		m.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// files lists what is on disk and in the file systems in memory: type, mode, owner, size or target, and a hash. Left out is what the running
// system writes for itself.
const files = `find / \( -path /proc -o -path /sys -o -path /dev -o -path /tmp -o -path /run/systemd -o -path /run/log -o -path /var/log/journal -o -path /run/udev \
	-o -path /run/user -o -path /run/utmp -o -path /var/log/wtmp -o -path /var/log/btmp -o -path /var/log/lastlog -o -path /run/initctl -o -path /var/lib/systemd \
	-o -path /var/tmp/systemd-private\* -o -path /opt/kedge -o -path /run/dbus -o -path /etc/machine-id \) -prune -o -printf '%p %y %m %U:%G %l\n' | sort
find /etc /usr/local /var/lib /opt /srv /root -type f ! -path /opt/kedge ! -path '/var/lib/systemd/*' -print0 2>/dev/null | sort -z | xargs -0 -r sha256sum
find /dev -maxdepth 2 ! -path '/dev/pts/*' | sort`

// listing is all that an installation might change.
func (m *machine) listing() map[string]string {
	m.t.Helper()
	ctx := cluster.Within(m.t, 2*minute)
	pid, err := m.PID(ctx)
	if err != nil {
		m.t.Fatal(err)
	}
	list := map[string]string{
		"files":     m.run(files),
		"mounts":    m.run(`awk '{print $5, $(NF-2)}' /proc/self/mountinfo | sort`),
		"cgroups":   m.run(`find /sys/fs/cgroup -type d | grep -v -e '\.scope' -e user.slice -e '/init' | sort`),
		"processes": m.run(`ps -eo args= | grep -v -e '^ps ' -e '^sh -c' -e '^grep ' -e '^sort' -e '(sd-pam)' -e 'systemd --user' -e '^\[' | sort`),
		"units":     m.run(`systemctl list-units --all --plain --no-legend --type=service,mount,slice,socket,timer | awk '{print $1, $3}' | grep -v -e '^user' -e '^run-user' | sort`),
	}
	for what, line := range map[string]string{
		"rules":      "nft list ruleset",
		"links":      "ip -o link | sed 's/@.*//; s/^[0-9]*: //'",
		"addresses":  "ip -o addr | awk '{print $2, $3, $4}'",
		"routes":     "ip route show table all; ip -6 route show table all | grep -v '^multicast\\|^ff00'; ip rule; ip -6 rule",
		"neighbours": "ip neigh show nud permanent; bridge fdb 2>/dev/null",
		"ipvs":       "cat /proc/$PPID/net/ip_vs 2>/dev/null || true",
		"sets":       "ipset list -n 2>/dev/null || true",
	} {
		cmd := exec.CommandContext(ctx, "nsenter", "-t", strconv.Itoa(pid), "-n", "sh", "-c", line)
		cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
		out, err := cmd.Output()
		if err != nil {
			m.t.Fatalf("%s: %v", line, err)
		}
		list[what] = string(out)
	}
	return list
}

// sameAs compares with an earlier listing.
func (m *machine) sameAs(before map[string]string) {
	m.t.Helper()
	after := m.listing()
	for what := range before {
		was, is := lines(before[what]), lines(after[what])
		for line := range is {
			if !was[line] {
				m.t.Errorf("%s, left behind: %s", what, line)
			}
		}
		for line := range was {
			if !is[line] {
				m.t.Errorf("%s, missing: %s", what, line)
			}
		}
	}
}

func lines(text string) map[string]bool {
	set := map[string]bool{}
	for line := range strings.Lines(text) {
		set[strings.TrimSpace(line)] = true
	}
	return set
}
