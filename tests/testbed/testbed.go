// SPDX-License-Identifier: Apache-2.0

// Package testbed gives scenario tests Linux machines: namespaces with an own
// PID 1, disk, cgroups and network card, which start in half a second and can
// lose their power, hang, or lose their network. The script "machines" in this
// directory does the work and can be used by hand, too.
//
// A [Bed] is a set of machines on one network that belongs to one test process.
// It disappears with the test; a bed of a run that was killed is removed by the
// next run. Beds do not see each other, so packages may run in parallel.
package testbed

import (
	"bytes"
	"context"
	_ "embed" // the script below
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed machines
var script []byte

//go:embed vm
var vmScript []byte

const (
	// DefaultDir holds the template and the machines' disks. MACHINES_DIR in the
	// environment moves it.
	DefaultDir = "/var/lib/kedge-testbed"
	// DefaultLogDir gets the logs of failed tests. KEDGE_TEST_LOGS moves it.
	DefaultLogDir = "/var/tmp/kedge-test-logs"

	maxID = 99 // of a set; 0 is the set that people use by hand
)

// ErrNotRoot tells that machines cannot be made because the process is not root.
var ErrNotRoot = errors.New("the test bed needs root (namespaces, mounts, cgroups)")

// Bed is a set of machines on one network.
type Bed struct {
	id       int
	base     string // state of all sets
	script   string // our copy of the script
	name     string // of the test, for the log directory
	lock     *os.File
	machines []*Machine
	vms      []*VM
	onKeep   []func(dir string)
}

// New makes a bed for one test. It skips the test when the process is not root. When the test ends,
// the machines are removed; if it failed, their logs are kept and the test's output names the place.
func New(t testing.TB) *Bed {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	bed, err := Open(ctx, t.Name())
	if errors.Is(err, ErrNotRoot) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("logs are kept in %s", bed.KeepLogs())
		}
		if err := bed.Close(); err != nil {
			t.Errorf("close the test bed: %v", err)
		}
	})
	return bed
}

// Open makes a bed that lives until Close, for machines that several tests share. It makes the
// template if that is not cached, which takes about a minute. The error is [ErrNotRoot] when the
// process is not root.
func Open(ctx context.Context, name string) (*Bed, error) {
	if os.Getuid() != 0 {
		return nil, ErrNotRoot
	}
	b := &Bed{base: DefaultDir, name: name}
	if dir := os.Getenv("MACHINES_DIR"); dir != "" {
		b.base = dir
	}
	if err := b.claim(); err != nil {
		return nil, err
	}
	b.script = filepath.Join(b.dir(), "machines")
	if err := errors.Join(os.WriteFile(b.script, script, 0o755), os.WriteFile(b.vmScript(), vmScript, 0o755)); err != nil {
		return nil, errors.Join(fmt.Errorf("write the scripts: %w", err), b.lock.Close())
	}
	for _, cmd := range []string{"deps", "gc", "template", "net"} {
		if _, err := b.run(ctx, cmd); err != nil {
			return nil, errors.Join(err, b.Close())
		}
	}
	return b, nil
}

// claim takes the first free set. The lock on its owner file lasts as long as this process.
func (b *Bed) claim() error {
	for id := 1; id <= maxID; id++ {
		dir := filepath.Join(b.base, "sets", strconv.Itoa(id))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make the test bed's directory: %w", err)
		}
		f, err := os.OpenFile(filepath.Join(dir, "owner"), os.O_RDWR|os.O_CREATE, 0o644)
		if errors.Is(err, fs.ErrNotExist) {
			continue // just being removed
		}
		if err != nil {
			return fmt.Errorf("claim a set of machines: %w", err)
		}
		free, err := tryLock(f)
		if err != nil {
			return errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
		}
		if entries, _ := os.ReadDir(dir); !free || len(entries) > 1 { // taken, or left behind: for gc
			if err := f.Close(); err != nil {
				return err
			}
			continue
		}
		if _, err := fmt.Fprintln(f, os.Getpid()); err != nil {
			return errors.Join(fmt.Errorf("write %s: %w", f.Name(), err), f.Close())
		}
		b.id, b.lock = id, f
		return nil
	}
	return fmt.Errorf("all %d sets of machines under %s are in use: look at them with 'machines ls', remove dead ones with 'machines gc'", maxID, b.base)
}

// tryLock locks f unless somebody else has it, or has removed it meanwhile.
func tryLock(f *os.File) (bool, error) {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false, err
	}
	return st.Nlink > 0, nil
}

func (b *Bed) dir() string { return filepath.Join(b.base, "sets", strconv.Itoa(b.id)) }

// Gateway is the address of the host on the machines' network, where a test can offer services to
// them. It is the machines' name server in /etc/resolv.conf, too, but nothing answers there unless the test does.
func (b *Bed) Gateway() string { return fmt.Sprintf("10.%d.0.1", 100+b.id) }

// Template returns the directory with the Debian root that all machines share. It must not be changed.
func (b *Bed) Template() (string, error) {
	dir, err := b.run(context.Background(), "template")
	return strings.TrimSpace(dir), err
}

// Partition drops all packets between two machines until Heal.
func (b *Bed) Partition(ctx context.Context, one, other *Machine) error {
	_, err := b.run(ctx, "partition", one.name, other.name)
	return err
}

// Heal ends every partition and plugs all machines in.
func (b *Bed) Heal(ctx context.Context) error {
	_, err := b.run(ctx, "heal")
	return err
}

// OnKeepLogs registers a function that adds files to the directory of a failed test, for things
// that have to be asked of a running machine. Functions run in order of registration.
func (b *Bed) OnKeepLogs(f func(dir string)) { b.onKeep = append(b.onKeep, f) }

// KeepLogs copies /var/log and the console of every machine to a new directory and returns its
// path. What could not be copied is listed in a file ERRORS in there.
func (b *Bed) KeepLogs() string {
	base := os.Getenv("KEDGE_TEST_LOGS")
	if base == "" {
		base = DefaultLogDir
	}
	name := time.Now().Format("20060102-150405-") + strings.NewReplacer("/", "_", " ", "_").Replace(b.name)
	dir := filepath.Join(base, name)
	var errs []error
	for _, m := range b.machines {
		errs = append(errs, m.keepLogs(filepath.Join(dir, m.name)))
	}
	for _, v := range b.vms {
		errs = append(errs, v.keepLogs(filepath.Join(dir, v.name)))
	}
	for _, f := range b.onKeep {
		f(dir)
	}
	if err := errors.Join(errs...); err != nil {
		// The last resort: the caller is about to report another failure.
		_ = os.MkdirAll(dir, 0o755)
		_ = os.WriteFile(filepath.Join(dir, "ERRORS"), []byte(err.Error()+"\n"), 0o644)
	}
	return dir
}

// Close removes the machines and their disks. With KEDGE_TEST_KEEP=1 in the environment it leaves
// them running, to look at; the next run, or "machines gc", removes them.
func (b *Bed) Close() error {
	if os.Getenv("KEDGE_TEST_KEEP") == "1" {
		fmt.Fprintf(os.Stderr, "machines are kept: MACHINES_ID=%d MACHINES_DIR=%s tests/testbed/machines ls\n", b.id, b.base)
		return b.lock.Close()
	}
	_, err := b.run(context.Background(), "down", "-a")
	return errors.Join(err, b.lock.Close())
}

// run calls the script. Its error carries what the script said.
func (b *Bed) run(ctx context.Context, args ...string) (string, error) {
	return b.runScript(ctx, b.script, args...)
}

func (b *Bed) runScript(ctx context.Context, script string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := b.scriptCommand(ctx, script, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %s: %w: %s", filepath.Base(script), strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// command prepares a call of the script that ends with ctx, including what the script started.
func (b *Bed) command(ctx context.Context, args ...string) *exec.Cmd {
	return b.scriptCommand(ctx, b.script, args...)
}

func (b *Bed) scriptCommand(ctx context.Context, script string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "bash", append([]string{script}, args...)...)
	cmd.Env = append(os.Environ(), "MACHINES_ID="+strconv.Itoa(b.id), "MACHINES_DIR="+b.base, "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Wait calls cond until it returns nil, and gives up when ctx ends or cond returns an error of [GiveUp]: the error then
// names what was waited for, how long, and the last error of cond. A ctx without a deadline is a mistake and refused.
func Wait(ctx context.Context, what string, cond func(context.Context) error) error {
	if _, ok := ctx.Deadline(); !ok {
		return fmt.Errorf("wait for %s: the context has no deadline", what)
	}
	start, pause := time.Now(), 100*time.Millisecond
	var last error
	for {
		err := cond(ctx)
		if err == nil {
			return nil
		}
		// An error that only says that the time is over hides the reason.
		if last == nil || ctx.Err() == nil || !errors.Is(err, ctx.Err()) {
			last = err
		}
		if errors.As(err, new(givenUp)) {
			return fmt.Errorf("gave up after %s to wait for %s: %w", time.Since(start).Round(time.Second), what, last)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %s for %s: %w", time.Since(start).Round(time.Second), what, last)
		case <-time.After(pause):
		}
		pause = min(pause*3/2, time.Second)
	}
}

type givenUp struct{ error }

// Unwrap returns the reason.
func (g givenUp) Unwrap() error { return g.error }

// GiveUp marks an error that waiting will not cure.
func GiveUp(err error) error { return givenUp{err} }
