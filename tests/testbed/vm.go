// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// ErrNoVM tells that this host cannot have virtual machines: QEMU or Debian's kernel could not be had, or it is not amd64.
var ErrNoVM = errors.New("no virtual machines on this host")

// VM is a virtual machine with a kernel of its own, on the network of a [Bed]. Computing in it is about 20 times slower than in a
// [Machine]. The script "vm" in this directory does the work and can be used by hand, too.
type VM struct {
	bed  *Bed
	name string
	ip   string
}

// VMOption changes how a virtual machine is made.
type VMOption func() []string

// VMMemory is its memory in MiB. The default is 2048.
func VMMemory(mib int) VMOption { return func() []string { return []string{"--mem", fmt.Sprint(mib)} } }

// Share puts a read-only copy of a directory of the host into the virtual machine.
func Share(dir, dst string) VMOption {
	return func() []string { return []string{"--share", dir + ":" + dst} }
}

// VM creates and boots a virtual machine. Names are like those of machines. The error is [ErrNoVM] when the host cannot have any.
func (b *Bed) VM(ctx context.Context, name string, opts ...VMOption) (*VM, error) {
	if _, err := b.runScript(ctx, b.vmScript(), "image"); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoVM, err)
	}
	args := []string{"up", name}
	for _, opt := range opts {
		args = append(args, opt()...)
	}
	if _, err := b.runScript(ctx, b.vmScript(), args...); err != nil {
		return nil, err
	}
	ip, err := b.runScript(ctx, b.vmScript(), "ip", name)
	if err != nil {
		return nil, err
	}
	v := &VM{bed: b, name: name, ip: strings.TrimSpace(ip)}
	b.vms = append(b.vms, v)
	return v, nil
}

func (b *Bed) vmScript() string { return filepath.Join(b.dir(), "vm") }

// Name returns the virtual machine's host name.
func (v *VM) Name() string { return v.name }

// IP returns its IPv4 address.
func (v *VM) IP() string { return v.ip }

// Restart takes its power away and boots it from the same disk, with its clock set to a time. What is to survive has to be on the disk: see sync(1).
func (v *VM) Restart(ctx context.Context, clock time.Time) error {
	if _, err := v.bed.runScript(ctx, v.bed.vmScript(), "kill", v.name); err != nil {
		return err
	}
	_, err := v.bed.runScript(ctx, v.bed.vmScript(), "start", v.name, clock.UTC().Format("2006-01-02T15:04:05"))
	return err
}

// Shell runs a line of shell and returns what it printed, on standard error, too. If the line ran and failed, the error is an [*ExitError].
func (v *VM) Shell(ctx context.Context, line string) (string, error) {
	out, err := v.bed.scriptCommand(ctx, v.bed.vmScript(), "exec", v.name, line).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w (%w)", context.Cause(ctx), err)
		}
		return string(out), &ExitError{Args: []string{line}, Code: exit.ExitCode(), Stdout: string(out), Stderr: string(exit.Stderr), err: err}
	}
	return string(out), err
}

// keepLogs copies the console and the files right below /var/log, if the virtual machine answers.
func (v *VM) keepLogs(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := copyFile(filepath.Join(v.bed.dir(), "vms", v.name, "console"), filepath.Join(dir, "console"))
	logs, errLogs := v.Shell(ctx, "cd /var/log && for f in *.log; do echo \"== $f\"; tail -n 3000 $f; done")
	return errors.Join(err, errLogs, os.WriteFile(filepath.Join(dir, "logs"), []byte(logs), 0o644))
}
