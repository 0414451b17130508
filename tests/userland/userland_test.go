// SPDX-License-Identifier: Apache-2.0

// Package userland runs the staged programs where nothing else is: in a root directory that has only the stage and
// /proc, in network and mount namespaces of their own. It needs root and built assets.
package userland

import (
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/embed"
)

// bare is a root directory with a stage.
type bare struct {
	root string
	bin  string // of the stage, as seen from inside
}

func newBare(t *testing.T) bare {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	root := t.TempDir()
	for _, dir := range []string{"proc", "run", "tmp"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	proc := filepath.Join(root, "proc")
	if err := unix.Mount("proc", proc, "proc", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(proc, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	tree, err := embed.Stage(t.Context(), filepath.Join(root, "data"), slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	return bare{root: root, bin: strings.TrimPrefix(tree.Dir, root)}
}

// run executes a staged program in there and returns all that it prints.
func (b bare) run(t *testing.T, name, stdin string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(b.bin, name), args...)
	cmd.Dir, cmd.Env, cmd.Stdin = "/", []string{"LD_PRELOAD=/missing.so", "LD_LIBRARY_PATH=/missing"}, strings.NewReader(stdin)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: b.root}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// isolate moves this test's thread, and with it the programs it starts, into a new network namespace. The thread ends
// with the test.
func isolate(t *testing.T) {
	t.Helper()
	runtime.LockOSThread() // and never unlock it
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
}

func TestProgramsAlone(t *testing.T) {
	isolate(t)
	b := newBare(t)
	steps := []struct {
		line, stdin, want string // want is a regular expression for the output
	}{
		{line: "runc features", want: `"seccomp": \{\s*"enabled": true`},
		{line: "containerd-shim-runc-v2 -v", want: `Version:\s+v\d`},
		{line: "nft --version", want: `^nftables v`},
		{line: "iptables --version", want: `^iptables v\S+ \(nf_tables\)\n$`},
		{line: "ip6tables --version", want: `^ip6tables v\S+ \(nf_tables\)\n$`},
		{line: "iptables-legacy --version", want: `^iptables v\S+ \(legacy\)\n$`},
		{line: "conntrack --version", want: `^conntrack v`},
		{line: "conntrack -L", want: `0 flow entries`},
		// Protocols by name, although there is no /etc/protocols.
		{line: "nft -f -", stdin: "table ip k {\n" +
			" map ips { type ipv4_addr . inet_proto . inet_service : verdict; }\n chain a { }\n" +
			" chain x { ip daddr . meta l4proto . th dport vmap @ips\n  meta l4proto { icmp, ipv6-icmp, sctp } accept\n }\n}\n" +
			"add element ip k ips { 10.0.0.1 . tcp . 80 : goto a }\n", want: `^$`},
		{line: "nft -j list map ip k ips", want: `"10.0.0.1", "tcp", 80`},
		{line: "ipset create s hash:ip,port", want: `^$`},
		{line: "ipset add s 192.0.2.1,tcp:80", want: `^$`},
		{line: "ipset add s 192.0.2.1,udp:53", want: `^$`},
		{line: "ipset list s", want: `192.0.2.1,udp:53`},
		// Extensions, of which some are links to others.
		{line: "iptables -A INPUT -p tcp -m multiport --dports 1,2 -m comment --comment c -m conntrack --ctstate NEW -j ACCEPT", want: `^$`},
		{line: "iptables -A INPUT -p sctp -m state --state NEW -j ACCEPT", want: `^$`},
		{line: "iptables -A INPUT -m set --match-set s dst,dst -j DROP", want: `^$`},
		{line: "iptables -t raw -A PREROUTING -j NOTRACK", want: `^$`},
		{line: "iptables -t raw -A PREROUTING -j CT --notrack", want: `^$`},
		{line: "iptables -t nat -A POSTROUTING -s 10.42.0.0/16 -j MASQUERADE --random-fully", want: `^$`},
		{line: "iptables-save", want: `-A POSTROUTING -s 10.42.0.0/16 -j MASQUERADE --random-fully\n`},
		{line: "iptables-restore --noflush -w 5 --counters", stdin: "*nat\n:KUBE - [0:0]\n-A KUBE -p udp -j RETURN\nCOMMIT\n", want: `^$`},
		{line: "ip6tables-restore --noflush", stdin: "*filter\n:KUBE - [0:0]\n-A KUBE -p ipv6-icmp -j RETURN\nCOMMIT\n", want: `^$`},
		{line: "iptables -t nat -S KUBE", want: `-A KUBE -p udp -j RETURN`},
	}
	for _, s := range steps {
		words := strings.Fields(s.line)
		out, err := b.run(t, words[0], s.stdin, words[1:]...)
		if err != nil || !regexp.MustCompile(s.want).MatchString(out) {
			t.Errorf("%s: %v, output:\n%s\nwant %s", s.line, err, out, s.want)
		}
	}
	if out, err := b.run(t, "iptables", "", "-C", "INPUT", "-j", "REJECT"); err == nil {
		t.Errorf("the exit status of iptables is lost, output:\n%s", out)
	}
}

func TestPluginsAlone(t *testing.T) {
	b := newBare(t)
	t.Setenv("CNI_COMMAND", "VERSION")
	for _, plugin := range []string{"ptp", "bridge", "loopback", "host-local", "portmap", "bandwidth"} {
		cmd := exec.CommandContext(t.Context(), filepath.Join(b.bin, "cni", plugin))
		cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Chroot: b.root}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), `"1.1.0"`) {
			t.Errorf("%s: %v, output:\n%s", plugin, err, out)
		}
	}
}
