// SPDX-License-Identifier: Apache-2.0

package testbed_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/testbed"
)

func deadline(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func machine(t *testing.T, bed *testbed.Bed, name string, opts ...testbed.Option) *testbed.Machine {
	t.Helper()
	m, err := bed.Machine(deadline(t, time.Minute), name, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func sh(t *testing.T, m *testbed.Machine, line string) string {
	t.Helper()
	out, err := m.Shell(deadline(t, time.Minute), line)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func do(t *testing.T, f func(context.Context) error) {
	t.Helper()
	if err := f(deadline(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
}

func TestMachineHasNoTools(t *testing.T) {
	m := machine(t, testbed.New(t), "m1")
	for _, tool := range []string{"nft", "iptables", "ipset", "conntrack", "runc", "containerd", "modinfo-missing"} {
		if out, err := m.Shell(deadline(t, time.Minute), "command -v "+tool); err == nil {
			t.Errorf("%s is in the machine (%s): a test on it cannot show that Kedge brings its own", tool, strings.TrimSpace(out))
		}
	}
}

func TestExec(t *testing.T) {
	m := machine(t, testbed.New(t), "m1")
	if got := sh(t, m, "hostname; id -u"); got != "m1\n0" {
		t.Errorf("hostname and uid: %q", got)
	}
	_, err := m.Shell(deadline(t, time.Minute), "echo out; echo why >&2; exit 7")
	var exit *testbed.ExitError
	if !errors.As(err, &exit) || exit.Code != 7 || exit.Stdout != "out\n" || exit.Stderr != "why\n" {
		t.Errorf("failed command: %v", err)
	}
	out, err := m.ExecInput(deadline(t, time.Minute), strings.NewReader("in"), "cat")
	if err != nil || out != "in" {
		t.Errorf("standard input: %q, %v", out, err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := m.Exec(ctx, "sleep", "98765"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("command past its deadline: %v", err)
	}
	err = testbed.Wait(deadline(t, 10*time.Second), "the end of sleep", func(context.Context) error {
		if out := sh(t, m, "pgrep -x sleep -a || true"); strings.Contains(out, "98765") {
			return errors.New(out)
		}
		return nil
	})
	if err != nil {
		t.Errorf("a cancelled command lives on: %v", err)
	}
}

// hostMAC is the hardware address under which machines know the host.
func hostMAC(t *testing.T, bed *testbed.Bed) string {
	t.Helper()
	list, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list {
		addrs, err := i.Addrs()
		if err == nil && slices.ContainsFunc(addrs, func(a net.Addr) bool { return strings.HasPrefix(a.String(), bed.Gateway()+"/") }) {
			return i.HardwareAddr.String()
		}
	}
	t.Fatal("the host is not in the machines' network")
	return ""
}

func TestFilesAndPowerCut(t *testing.T) {
	bed := testbed.New(t)
	m := machine(t, bed, "m1", testbed.Memory("200M"))
	mac, card := hostMAC(t, bed), sh(t, m, "cat /sys/class/net/eth0/address")
	do(t, func(ctx context.Context) error {
		return errors.Join(
			m.WriteFile("/var/lib/kept", []byte("kept"), 0o600),
			m.WriteFile("/etc/kedge/kept", []byte("kept"), 0o600),
			m.WriteFile("/run/lost", []byte("lost"), 0o600),
			m.WriteFile("/bin/tool", []byte("#!/bin/sh\necho tool\n"), 0o755), // through the link /bin
		)
	})
	if got := sh(t, m, "tool"); got != "tool" {
		t.Errorf("tool says %q", got)
	}
	p, err := m.Spawn(deadline(t, time.Minute), "/var/log/tick", "sh", "-c", "while sleep 0.1; do echo tick; done")
	if err != nil {
		t.Fatal(err)
	}
	do(t, func(ctx context.Context) error {
		return testbed.Wait(ctx, "a tick", func(context.Context) error {
			if b, err := m.ReadFile("/var/log/tick"); err != nil || !strings.Contains(string(b), "tick") {
				return errors.Join(err, errors.New("no tick yet"))
			}
			return nil
		})
	})
	do(t, m.PowerCut)
	if _, err := m.Exec(deadline(t, time.Minute), "true"); err == nil {
		t.Error("a machine without power runs commands")
	}
	if now := hostMAC(t, bed); now != mac {
		t.Errorf("the host has another MAC after the power cut: %s, before %s", now, mac)
	}
	do(t, m.Boot)
	if running, err := p.Running(deadline(t, time.Minute)); running || err != nil {
		t.Errorf("after a power cut the process runs: %v, %v", running, err)
	}
	if now := sh(t, m, "cat /sys/class/net/eth0/address"); now != card {
		t.Errorf("the machine has another MAC after the power cut: %s, before %s", now, card)
	}
	if got := sh(t, m, "cat /var/lib/kept /etc/kedge/kept; ls /run/lost 2>&1 || true"); !strings.HasPrefix(got, "keptkept") || !strings.Contains(got, "No such file") {
		t.Errorf("files after the power cut: %s", got)
	}
	if out, err := m.Shell(deadline(t, time.Minute), "head -c 300M /dev/zero >/dev/shm/big"); err == nil {
		t.Errorf("300 MB fit into a machine of 200 MB: %s", out)
	}
}

func TestSignal(t *testing.T) {
	m := machine(t, testbed.New(t), "m1")
	p, err := m.Spawn(deadline(t, time.Minute), "/var/log/trap", "bash", "-c", "trap 'echo bye; exit' TERM; echo on; while :; do sleep 0.1; done")
	if err != nil {
		t.Fatal(err)
	}
	do(t, func(ctx context.Context) error {
		return testbed.Wait(ctx, "the trap", func(context.Context) error {
			if b, err := m.ReadFile(p.Log); err != nil || string(b) != "on\n" {
				return errors.Join(err, errors.New("not set"))
			}
			return nil
		})
	})
	if running, err := p.Running(deadline(t, time.Minute)); !running || err != nil {
		t.Errorf("running: %v, %v", running, err)
	}
	do(t, func(ctx context.Context) error { return errors.Join(p.Signal(ctx, "TERM"), p.Wait(ctx)) })
	if b, err := m.ReadFile(p.Log); err != nil || string(b) != "on\nbye\n" {
		t.Errorf("log: %q, %v", b, err)
	}
}

func TestNetworkFaults(t *testing.T) {
	bed := testbed.New(t)
	m1, m2 := machine(t, bed, "m1"), machine(t, bed, "m2")
	reach := func(from *testbed.Machine, to string) bool {
		_, err := from.Exec(deadline(t, time.Minute), "busybox", "ping", "-c1", "-W1", to)
		return err == nil
	}
	if !reach(m1, m2.IP()) || !reach(m2, "m1") || !reach(m1, bed.Gateway()) {
		t.Fatal("the machines do not reach each other and the host")
	}
	do(t, m2.Isolate)
	if reach(m1, m2.IP()) {
		t.Error("an isolated machine answers")
	}
	do(t, m2.Join)
	do(t, func(ctx context.Context) error { return bed.Partition(ctx, m1, m2) })
	if reach(m1, m2.IP()) || !reach(m1, bed.Gateway()) {
		t.Error("a partition must cut the two from each other and from nobody else")
	}
	do(t, bed.Heal)
	if !reach(m1, m2.IP()) {
		t.Error("no answer after the partition is healed")
	}
	do(t, m2.Freeze)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := m2.Exec(ctx, "true"); err == nil {
		t.Error("a frozen machine runs commands")
	}
	do(t, m2.Thaw)
	sh(t, m2, "true")
}

// TestShield: nobody but the host opens connections to a shielded machine; its own work.
func TestShield(t *testing.T) {
	bed := testbed.New(t)
	m1, m2 := machine(t, bed, "m1"), machine(t, bed, "m2")
	for _, m := range []*testbed.Machine{m1, m2} {
		if _, err := m.Spawn(deadline(t, time.Minute), "/var/log/httpd", "busybox", "httpd", "-f", "-p", "8000", "-h", "/etc"); err != nil {
			t.Fatal(err)
		}
	}
	reach := func(from, to *testbed.Machine) error {
		_, err := from.Exec(deadline(t, time.Minute), "curl", "-sS", "-m", "1", "-o", "/dev/null", "http://"+to.IP()+":8000/hostname")
		return err
	}
	do(t, func(ctx context.Context) error {
		return testbed.Wait(ctx, "both to answer", func(context.Context) error { return errors.Join(reach(m1, m2), reach(m2, m1)) })
	})
	do(t, m2.Shield)
	if err := reach(m1, m2); err == nil {
		t.Error("a shielded machine accepts a connection")
	}
	if err := reach(m2, m1); err != nil {
		t.Errorf("a connection that the shielded machine opens: %v", err)
	}
	do(t, bed.Heal)
	if err := reach(m1, m2); err != nil {
		t.Errorf("after the shield is gone: %v", err)
	}
}

// TestReaddress: a machine gets another address, while it runs and while it does not, and everybody knows it by its name.
func TestReaddress(t *testing.T) {
	bed := testbed.New(t)
	m1, m2 := machine(t, bed, "m1"), machine(t, bed, "m2")
	seen := map[string]bool{m1.IP(): true, m2.IP(): true}
	check := func(when string) {
		t.Helper()
		if seen[m1.IP()] {
			t.Errorf("%s: %s is no new address", when, m1.IP())
		}
		seen[m1.IP()] = true
		if got := sh(t, m1, "ip -4 -o addr show eth0 | wc -l; ip -4 -o addr show eth0; ip route"); !strings.HasPrefix(got, "1\n") ||
			!strings.Contains(got, m1.IP()+"/24") || !strings.Contains(got, "default via "+bed.Gateway()) {
			t.Errorf("%s, %s: %s", when, m1.IP(), got)
		}
		sh(t, m1, "busybox ping -c1 -W1 "+m2.IP()+" && busybox ping -c1 -W1 "+bed.Gateway())
		sh(t, m2, "busybox ping -c1 -W1 m1 | grep -F "+m1.IP())
	}
	do(t, m1.Readdress)
	check("while it ran")
	do(t, m1.PowerCut)
	do(t, m1.Readdress)
	do(t, m1.Boot)
	check("while it was off")
}

// TestWipe: the disk is that of a new machine, whatever kind of disk it is, and the rest stays.
func TestWipe(t *testing.T) {
	bed := testbed.New(t)
	tool := filepath.Join(t.TempDir(), "tool")
	if err := os.WriteFile(tool, []byte("#!/bin/sh\necho tool\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, opts := range map[string][]testbed.Option{"m1": nil, "m2": {testbed.Disk("200M")}} {
		m := machine(t, bed, name, append(opts, testbed.Bind(tool, "/usr/bin/tool"))...)
		sh(t, m, "mkdir -p /etc/kedge; echo x >/etc/kedge/old; echo x >/var/lib/old; echo nameserver 1.1.1.1 >/etc/resolv.conf")
		do(t, m.Wipe)
		if state, err := m.State(deadline(t, time.Minute)); state != "dead" || err != nil {
			t.Errorf("%s: state %s, %v after wipe", name, state, err)
		}
		do(t, m.Boot)
		if got := sh(t, m, "ls -d /etc/kedge /var/lib/old 2>/dev/null; ls -d /var/lib/dpkg; tool; cat /etc/resolv.conf; ip -4 -o addr show eth0"); !strings.HasPrefix(got, "/var/lib/dpkg\ntool\nnameserver "+bed.Gateway()) ||
			!strings.Contains(got, m.IP()) {
			t.Errorf("%s: %s", name, got)
		}
	}
}

func TestState(t *testing.T) {
	m := machine(t, testbed.New(t), "m1")
	for _, c := range []struct {
		do   func(context.Context) error
		want string
	}{{m.Freeze, "frozen"}, {m.Thaw, "running"}, {m.PowerCut, "dead"}, {m.Boot, "running"}} {
		do(t, c.do)
		if got, err := m.State(deadline(t, time.Minute)); got != c.want || err != nil {
			t.Errorf("state %s, %v; want %s", got, err, c.want)
		}
	}
}

func TestSystemd(t *testing.T) {
	m := machine(t, testbed.New(t), "m1", testbed.Systemd())
	do(t, func(ctx context.Context) error {
		return testbed.Wait(ctx, "systemd", func(ctx context.Context) error {
			_, err := m.Exec(ctx, "systemctl", "is-system-running")
			return err
		})
	})
}

func TestSmallDisk(t *testing.T) {
	m := machine(t, testbed.New(t), "m1", testbed.Disk("200M"))
	if out := sh(t, m, "head -c 300M /dev/zero >/var/big; stat -c %s /var/big; df -h / >/dev/null; echo x >/etc/other"); out == "314572800" {
		t.Error("300 MB fit on a disk of 200 MB")
	}
	do(t, m.PowerCut)
	do(t, m.Boot)
	sh(t, m, "test -s /var/big && rm /var/big && echo there-is-space >/var/small")
}

// A run that was killed leaves its machines behind: the next one removes them, and no others.
func TestStaleSetsAreRemoved(t *testing.T) {
	if os.Getenv("TESTBED_ABANDON") != "" {
		bed, err := testbed.Open(t.Context(), t.Name())
		if err != nil {
			t.Fatal(err)
		}
		m := machine(t, bed, "m1")
		dir, err := m.Bed().Template()
		if err != nil {
			t.Fatal(err)
		}
		os.Stdout.WriteString("\nUP " + m.IP() + " " + dir + "\n")
		time.Sleep(time.Hour) // until it is killed
	}
	bed := testbed.New(t)
	mine := machine(t, bed, "m1")
	cmd := exec.CommandContext(deadline(t, time.Minute), os.Args[0], "-test.run=^TestStaleSetsAreRemoved$", "-test.v")
	cmd.Env = append(os.Environ(), "TESTBED_ABANDON=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	buf := make([]byte, 4096)
	for !strings.Contains(said.String(), "UP ") {
		n, err := out.Read(buf)
		said.Write(buf[:n])
		if err != nil {
			t.Fatalf("the other process did not bring its machine up: %v: %s", err, said.String())
		}
	}
	_, line, _ := strings.Cut(said.String(), "UP ")
	ip := strings.Fields(line)[0]
	if _, err := mine.Exec(deadline(t, time.Minute), "true"); err != nil {
		t.Errorf("another process's bed disturbs this one: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, out)
	_ = cmd.Wait()          // killed: not nil
	other := testbed.New(t) // removes stale sets
	machine(t, other, "m1")
	leftover, err := exec.CommandContext(t.Context(), "ip", "-4", "-o", "addr", "show", "to", gatewayOf(ip)).Output()
	if err != nil {
		t.Fatal(err)
	}
	if len(leftover) != 0 && gatewayOf(ip) != other.Gateway() {
		t.Errorf("the abandoned set is still there: %s", leftover)
	}
	sh(t, mine, "true")
}

func gatewayOf(ip string) string { return ip[:strings.LastIndex(ip, ".")] + ".1" }

func TestKeepLogs(t *testing.T) {
	t.Setenv("KEDGE_TEST_LOGS", t.TempDir())
	bed := testbed.New(t)
	m := machine(t, bed, "m1")
	sh(t, m, "mkdir -p /var/log/pods/x; echo hello >/var/log/pods/x/0.log; ln -s pods/x/0.log /var/log/link")
	bed.OnKeepLogs(func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "events"), []byte("e"), 0o600); err != nil {
			t.Error(err)
		}
	})
	do(t, m.PowerCut) // logs of a dead machine are what one needs most
	dir := bed.KeepLogs()
	for _, name := range []string{"m1/console", "m1/pods/x/0.log", "events"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "ERRORS")); err == nil {
		t.Error("there were errors")
	}
}

func TestWait(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	reason := errors.New("not yet")
	err := testbed.Wait(ctx, "something", func(context.Context) error { return reason })
	if !errors.Is(err, reason) || !strings.Contains(err.Error(), "something") {
		t.Errorf("error: %v", err)
	}
	calls := 0
	err = testbed.Wait(deadline(t, time.Minute), "nothing", func(context.Context) error { calls++; return testbed.GiveUp(reason) })
	if !errors.Is(err, reason) || calls != 1 {
		t.Errorf("after giving up: %v, %d calls", err, calls)
	}
	if err := testbed.Wait(context.Background(), "ever", func(context.Context) error { return nil }); err == nil {
		t.Error("a wait without a deadline is accepted")
	}
}
