// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/release"
)

const (
	// sayVersion bounds how long a new program may take to say its version.
	sayVersion = time.Minute
	// spareProgram and spareData are left free beside a new program, and for what it unpacks when it starts, bytes.
	spareProgram = 32 << 20
	spareData    = 192 << 20
)

// ErrUnderWay says that there is an upgrade under way already.
var ErrUnderWay = errors.New("an upgrade of this machine is under way already: see kedge upgrade --status")

// Staging is how a new version comes to a machine.
type Staging struct {
	Store   Store
	DataDir string // the new version unpacks its programs there
	Program string // what is to be replaced
	Keys    []release.Key
}

// Check says why the program cannot be replaced by one of a size, 0 if that is not known. It changes nothing.
func (g Staging) Check(size int64) error {
	if p, err := g.Store.Pending(); err != nil {
		return fmt.Errorf("%w; remove it if no upgrade is under way", err)
	} else if p != nil {
		return ErrUnderWay
	}
	var file, dir unix.Stat_t
	if err := unix.Lstat(g.Program, &file); err != nil {
		return fmt.Errorf("%s: %w", g.Program, err)
	}
	if err := unix.Stat(filepath.Dir(g.Program), &dir); err != nil {
		return err
	}
	if err := unix.Access(filepath.Dir(g.Program), unix.W_OK); err != nil {
		return fmt.Errorf("%s cannot be written to: %w", filepath.Dir(g.Program), err)
	}
	if file.Dev != dir.Dev || isMount(g.Program) {
		return fmt.Errorf("%s is a mount of its own: its file can only be replaced where it comes from", g.Program)
	}
	return errors.Join(room(filepath.Dir(g.Program), size+spareProgram), room(g.DataDir, spareData))
}

// isMount says whether something is mounted at a path.
func isMount(path string) bool {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == path {
			return true
		}
	}
	return false
}

func room(dir string, want int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < want {
		return fmt.Errorf("%s has %d MiB free, and %d MiB are needed: remove what is not used there", dir, free>>20, want>>20)
	}
	return nil
}

// Stage puts the program of a release beside the one that it is to replace. accept may refuse it for its name, before anything is
// written. What it returns has been signed by one of the keys, is for this machine's architecture, and says its version itself. When it
// returns an error, nothing is left.
func (g Staging) Stage(ctx context.Context, src io.Reader, accept func(release.Info) error) (*release.Release, error) {
	next := g.Program + nextSuffix
	var out *os.File
	rel, err := release.Extract(ctx, src, g.Keys, func(info release.Info) (io.Writer, error) {
		if err := CheckArch(info); err != nil {
			return nil, err
		}
		if err := errors.Join(g.Check(info.Size), accept(info)); err != nil {
			return nil, err
		}
		if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) { // of an upload that a power cut ended
			return nil, err
		}
		var err error
		out, err = os.OpenFile(next, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		return out, err
	})
	if out == nil {
		return nil, err
	}
	if err == nil {
		err = errors.Join(out.Chmod(0o755), out.Sync())
	}
	if err = errors.Join(err, out.Close()); err == nil {
		err = errors.Join(syncDir(filepath.Dir(next)), examine(ctx, next, rel.Version))
	}
	if err != nil {
		return nil, errors.Join(err, os.Remove(next))
	}
	return rel, nil
}

// Arch is this machine's architecture.
const Arch = runtime.GOARCH

// CheckArch says why a release is not for this machine.
func CheckArch(info release.Info) error {
	if info.Arch == Arch {
		return nil
	}
	return fmt.Errorf("the release is for %s, and this machine is %s: give kedge-%s-linux-%s.tar.zst", info.Arch, Arch, info.Version, Arch)
}

// Unstage removes a staged program that is not to be tried.
func (g Staging) Unstage() error { return os.Remove(g.Program + nextSuffix) }

// Back stages the previous program and returns its version.
func (g Staging) Back(ctx context.Context) (version string, err error) {
	previous := g.Program + previousSuffix
	if _, err := os.Stat(previous); errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("there is no way back: this machine has no version before (%s); give an older release by --from, with --force", previous)
	} else if err != nil {
		return "", fmt.Errorf("there is no way back: %w", err)
	}
	if err := g.Check(0); err != nil {
		return "", err
	}
	if version, err = VersionOf(ctx, previous); err != nil {
		return "", err
	}
	return version, place(previous, g.Program+nextSuffix)
}

// examine runs a program that has been verified, to see that it runs here and what it is: its name in the archive was not signed.
func examine(ctx context.Context, program, version string) error {
	arch, err := release.ProgramArch(program)
	if err != nil {
		return err
	}
	if arch != Arch {
		return fmt.Errorf("the program in the release is for %s, and this machine is %s", arch, Arch)
	}
	said, err := VersionOf(ctx, program)
	if err == nil && said != version {
		err = fmt.Errorf("the release calls itself %s, and its program %s: it has been renamed", version, said)
	}
	return err
}

// VersionOf asks a program of Kedge.
func VersionOf(ctx context.Context, program string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, sayVersion)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, "version").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("the new program does not run on this machine: %w: %s", err, strings.TrimSpace(string(out[:min(len(out), 500)])))
	}
	f := strings.Fields(string(out))
	if len(f) < 2 || f[0] != "kedge" {
		return "", fmt.Errorf("%s does not say which version it is: %q", program, out[:min(len(out), 100)])
	}
	return f[1], nil
}

// Begin notes that the staged program is to be tried with the next start. The caller starts again.
func (s Store) Begin(p Pending) (Pending, error) {
	p.Phase, p.Tries = PhaseTrial, 0
	p.Started = time.Now().UTC().Truncate(time.Second)
	p.ID = p.Started.Format("20060102T150405Z")
	if p.Timeout <= 0 {
		p.Timeout = DefaultTimeout
	}
	return p, s.put(&p)
}

// Replace puts the staged program in its place without a trial.
func (s Store) Replace(p Pending) error {
	begun, err := s.Begin(p)
	if err != nil {
		return err
	}
	return s.confirm(&begun)
}

// place makes to the same file as from, in one step.
func place(from, to string) error {
	tmp := to + ".tmp"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Link(from, tmp); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := copyFile(from, tmp); err != nil { // a file system without links
			return errors.Join(err, os.Remove(tmp))
		}
	}
	return os.Rename(tmp, to)
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Sync(), out.Close())
}
