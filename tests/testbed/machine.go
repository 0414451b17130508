// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin"
)

// Machine is one machine of a [Bed]. It has what a small Debian server has and nothing that
// programs packet filters or runs containers.
type Machine struct {
	bed  *Bed
	name string
	ip   string
}

// Option changes how a machine is made.
type Option func() []string

// Memory limits the memory of the whole machine, e.g. "1500M". The default is no limit.
func Memory(size string) Option { return func() []string { return []string{"--mem", size} } }

// CPUs limits the processor time of the whole machine, e.g. "0.5". The default is no limit.
func CPUs(n string) Option { return func() []string { return []string{"--cpus", n} } }

// Disk makes /var a file system of its own with this size, e.g. "2G". By default it shares the host's disk.
func Disk(size string) Option { return func() []string { return []string{"--disk", size} } }

// Systemd boots systemd as PID 1. The default is a bare process that only reaps.
func Systemd() Option { return func() []string { return []string{"--init", "systemd"} } }

// NoGateway leaves out the default route: the machine reaches the others and the host, and nothing else.
func NoGateway() Option { return func() []string { return []string{"--no-gateway"} } }

// Bind shows a file or directory of the host in the machine, read-only.
func Bind(src, dst string) Option {
	return func() []string { return []string{"--bind", src + ":" + dst + ":ro"} }
}

// Machine creates and boots a machine. Names have at most 10 characters of a-z, 0-9 and -.
func (b *Bed) Machine(ctx context.Context, name string, opts ...Option) (*Machine, error) {
	args := []string{"up", name}
	for _, opt := range opts {
		args = append(args, opt()...)
	}
	if _, err := b.run(ctx, args...); err != nil {
		return nil, err
	}
	ip, err := b.run(ctx, "ip", name)
	if err != nil {
		return nil, err
	}
	m := &Machine{bed: b, name: name, ip: strings.TrimSpace(ip)}
	b.machines = append(b.machines, m)
	return m, nil
}

// Name returns the machine's host name.
func (m *Machine) Name() string { return m.name }

// IP returns the machine's IPv4 address; the other machines of the bed and the host reach it there.
func (m *Machine) IP() string { return m.ip }

// IP6 returns the machine's IPv6 address, which goes with IP.
func (m *Machine) IP6() string { return IP6(m.ip) }

// IP6 returns the IPv6 address of a bed that goes with an IPv4 address of it: fd00:N::M for 10.N.0.M.
func IP6(ip string) string {
	parts := strings.Split(ip, ".")
	return "fd00:" + parts[1] + "::" + parts[3]
}

// PID is that of the machine's first process on the host, for a look into its namespaces with the host's programs.
func (m *Machine) PID(ctx context.Context) (int, error) {
	out, err := m.bed.run(ctx, "pid", m.name)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(out))
}

// Bed returns the bed that the machine belongs to.
func (m *Machine) Bed() *Bed { return m.bed }

// ExitError tells that a command ran in a machine and failed.
type ExitError struct {
	Args   []string
	Code   int // exit status, -1 when a signal ended it
	Stdout string
	Stderr string
	err    error
}

// Error gives the command, its status and what it printed.
func (e *ExitError) Error() string {
	s := fmt.Sprintf("%s: %v", strings.Join(e.Args, " "), e.err)
	for _, out := range []string{e.Stderr, e.Stdout} {
		if out = strings.TrimSpace(out); out != "" {
			s += ": " + out
		}
	}
	return s
}

// Unwrap returns the cause.
func (e *ExitError) Unwrap() error { return e.err }

// Command prepares a command in the machine, for callers that need its streams. It ends with ctx.
func (m *Machine) Command(ctx context.Context, args ...string) *exec.Cmd {
	return m.bed.command(ctx, append([]string{"exec", m.name}, args...)...)
}

// Exec runs a command in the machine and returns its standard output. If the command ran and
// failed, the error is an [*ExitError].
func (m *Machine) Exec(ctx context.Context, args ...string) (string, error) {
	return m.ExecInput(ctx, nil, args...)
}

// ExecInput is Exec with a standard input.
func (m *Machine) ExecInput(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := m.Command(ctx, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	err := cmd.Run()
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w (%w)", context.Cause(ctx), err)
	}
	if err != nil {
		return stdout.String(), &ExitError{Args: args, Code: cmd.ProcessState.ExitCode(), Stdout: stdout.String(), Stderr: stderr.String(), err: err}
	}
	return stdout.String(), nil
}

// Shell runs a line of shell in the machine and returns its standard output.
func (m *Machine) Shell(ctx context.Context, line string) (string, error) {
	return m.Exec(ctx, "sh", "-c", line)
}

// Process is a background process in a machine.
type Process struct {
	m   *Machine
	PID int // inside the machine
	Log string
}

// Spawn starts a command in the background, in a session of its own. Its output is appended to
// the file log in the machine; files under /var/log are kept when a test fails.
func (m *Machine) Spawn(ctx context.Context, log string, args ...string) (*Process, error) {
	out, err := m.bed.run(ctx, append([]string{"spawn", m.name, log}, args...)...)
	if err != nil {
		return nil, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		return nil, fmt.Errorf("start %s in %s: no process id in %q", args[0], m.name, out)
	}
	return &Process{m: m, PID: pid, Log: log}, nil
}

// Signal sends a signal by name, e.g. "TERM".
func (p *Process) Signal(ctx context.Context, name string) error {
	_, err := p.m.Exec(ctx, "kill", "-"+name, strconv.Itoa(p.PID))
	return err
}

// Running tells whether the process is there and no zombie.
func (p *Process) Running(ctx context.Context) (bool, error) {
	out, err := p.m.Shell(ctx, fmt.Sprintf("cat /proc/%d/stat 2>/dev/null || true", p.PID))
	if err != nil {
		return false, err
	}
	_, rest, ok := strings.Cut(out, ") ")
	return ok && !strings.HasPrefix(rest, "Z"), nil
}

// Wait waits until the process is gone, as long as ctx allows.
func (p *Process) Wait(ctx context.Context) error {
	return Wait(ctx, fmt.Sprintf("the end of process %d in %s", p.PID, p.m.name), func(ctx context.Context) error {
		running, err := p.Running(ctx)
		if err == nil && running {
			err = errors.New("it still runs")
		}
		return err
	})
}

// path gives the place of a machine's file on the host. Symbolic links are followed inside the machine.
func (m *Machine) path(name string) (string, error) {
	root, err := m.bed.run(context.Background(), "root", m.name)
	if err != nil {
		return "", err
	}
	return securejoin.SecureJoin(strings.TrimSpace(root), name)
}

// ReadFile reads a file of a running machine.
func (m *Machine) ReadFile(name string) ([]byte, error) {
	path, err := m.path(name)
	if err != nil {
		return nil, err
	}
	return os.ReadFile(path)
}

// WriteFile writes a file in a running machine, with the directories above it.
func (m *Machine) WriteFile(name string, data []byte, perm fs.FileMode) error {
	path, err := m.path(name)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, data, perm)
}

// PowerCut kills everything in the machine at once. Its disk stays, /run and /tmp are lost.
func (m *Machine) PowerCut(ctx context.Context) error { return m.do(ctx, "kill") }

// Boot starts the machine again after PowerCut, with the same disk and address.
func (m *Machine) Boot(ctx context.Context) error { return m.do(ctx, "start") }

// Freeze stops every process of the machine, as when it hangs.
func (m *Machine) Freeze(ctx context.Context) error { return m.do(ctx, "freeze") }

// Thaw lets a frozen machine run on.
func (m *Machine) Thaw(ctx context.Context) error { return m.do(ctx, "thaw") }

// Isolate pulls the machine's network plug.
func (m *Machine) Isolate(ctx context.Context) error { return m.do(ctx, "isolate") }

// Join plugs the machine in again.
func (m *Machine) Join(ctx context.Context) error { return m.do(ctx, "join") }

// Shield drops TCP connections that other machines open to this one, until Heal, as for a machine behind a router with NAT.
// The host still gets through.
func (m *Machine) Shield(ctx context.Context) error { return m.do(ctx, "shield") }

// Readdress gives the machine an address that no machine of the bed has had, as a new lease of DHCP does. It may be running.
func (m *Machine) Readdress(ctx context.Context) error {
	ip, err := m.bed.run(ctx, "readdress", m.name)
	if err != nil {
		return err
	}
	m.ip = strings.TrimSpace(ip)
	return nil
}

// AddNIC plugs the running machine into a second network with another card, eth1, until its next boot, and returns its address there.
// The host is not in that network.
func (m *Machine) AddNIC(ctx context.Context) (string, error) {
	ip, err := m.bed.run(ctx, "nic", m.name)
	return strings.TrimSpace(ip), err
}

// Wipe cuts the power and empties the disk, as a new image on the same hardware does. Boot starts it with the same address.
func (m *Machine) Wipe(ctx context.Context) error { return m.do(ctx, "wipe") }

// State tells what the machine does: "running", "frozen" or "dead".
func (m *Machine) State(ctx context.Context) (string, error) {
	out, err := m.bed.run(ctx, "ls")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == m.name {
			return f[1], nil
		}
	}
	return "", fmt.Errorf("no machine %s in %q", m.name, out)
}

func (m *Machine) do(ctx context.Context, verb string) error {
	_, err := m.bed.run(ctx, verb, m.name)
	return err
}

// keepLogs copies /var/log and the console, of a machine that may be dead.
func (m *Machine) keepLogs(dir string) error {
	home := filepath.Join(m.bed.dir(), m.name)
	logs := filepath.Join(home, "var", "log")
	if path, err := m.path("/var/log"); err == nil {
		logs = path
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return errors.Join(copyFile(filepath.Join(home, "console"), filepath.Join(dir, "console")),
		filepath.WalkDir(logs, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil // a log that vanished meanwhile, or a link to one that is copied as well
			}
			rel, err := filepath.Rel(logs, path)
			if err != nil {
				return err
			}
			return copyFile(path, filepath.Join(dir, rel))
		}))
}

func copyFile(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}
