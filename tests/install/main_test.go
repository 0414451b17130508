// SPDX-License-Identifier: Apache-2.0

// Package install tests what a user does first: it takes a release into machines that have no way to anything but each other,
// and runs install.sh there.
package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

const minute = time.Minute

// Where machines see the releases: read-only, and programs cannot be run from there, as from many a stick.
const (
	stick = "/media/stick"
	newer = "/media/newer"
)

// releases are two directories as their archives unpack to.
type releases struct {
	dir         string
	first, next string // the directories
	versions    [2]string
	key         string // the public one of both
}

var shared releases //policy:allow variable one release for the package

func TestMain(m *testing.M) {
	code, err := 1, error(nil)
	if os.Getuid() == 0 { // without root the tests skip
		err = shared.make()
	}
	if err == nil {
		code = m.Run()
	} else {
		fmt.Println("make the releases:", err)
	}
	if err := os.RemoveAll(shared.dir); err != nil {
		fmt.Println(err)
	}
	os.Exit(code)
}

// make has make put both releases together, around the binary under test. The second build is that binary with another version
// in it, of the same length: linking takes a minute, and this is as good for what is tested here.
func (r *releases) make() error {
	bin, err := cluster.Binary()
	if err != nil {
		return err
	}
	if r.dir, err = os.MkdirTemp("", "kedge-releases-"); err != nil {
		return err
	}
	out, err := exec.Command(bin, "version").Output()
	if err != nil {
		return err
	}
	r.versions[0] = strings.Fields(string(out))[1]
	r.versions[1] = r.versions[0][:len(r.versions[0])-1] + "9"
	program, err := os.ReadFile(bin)
	if err != nil {
		return err
	}
	other := filepath.Join(r.dir, "kedge")
	if err := os.WriteFile(other, bytes.ReplaceAll(program, []byte(r.versions[0]), []byte(r.versions[1])), 0o755); err != nil {
		return err
	}
	r.key = filepath.Join(r.dir, "key.pub")
	for i, bin := range []string{bin, other} {
		dir := filepath.Join(r.dir, fmt.Sprintf("kedge-%s-linux-%s", r.versions[i], runtime.GOARCH))
		cmd := exec.Command("make", "-C", "../..", "--no-print-directory", "release-tree", "STAGE="+dir, "RELEASE_BIN="+bin,
			"RELEASE_KEY="+filepath.Join(r.dir, "key"), "RELEASE_PUB="+r.key)
		cmd.Env = append(os.Environ(), "MAKEFLAGS=", "MFLAGS=", "MAKELEVEL=")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, out)
		}
		if i == 0 {
			r.first = dir
		} else {
			r.next = dir
		}
	}
	return nil
}

// machine boots one that has both releases and the images of the tests, and no way out.
func machine(t *testing.T, bed *testbed.Bed, name string, images []string, opts ...testbed.Option) *cluster.Server {
	t.Helper()
	opts = append(opts, testbed.NoGateway(), testbed.Bind(shared.first, stick), testbed.Bind(shared.next, newer))
	m, err := bed.Machine(cluster.Within(t, minute), name, opts...)
	if err != nil {
		t.Fatal(err)
	}
	for _, archive := range images {
		data, err := os.ReadFile(archive)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.WriteFile(filepath.Join(cluster.DataDir, "images", filepath.Base(archive)), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := &cluster.Server{Node: &cluster.Node{Machine: m, Role: cluster.ServerRole}}
	bed.OnKeepLogs(func(dir string) {
		out, err := s.Shell(context.Background(), "journalctl --no-pager -b; cat /etc/systemd/system/kedge.service; ls -laR /etc/kedge /usr/local/bin")
		_ = os.WriteFile(filepath.Join(dir, name, "journal.txt"), []byte(fmt.Sprintln(out, err)), 0o644) // a test has failed already
	})
	if out, err := s.Shell(cluster.Within(t, minute), "mount -o remount,bind,ro,noexec "+stick+" && mount -o remount,bind,ro,noexec "+newer+
		"; ip route get 192.0.2.1 2>&1; ip -6 route get 2001:db8::1 2>&1"); !strings.Contains(out, "unreachable") || strings.Contains(out, "via") {
		t.Fatalf("%s has a way out: %v: %s", name, err, out)
	}
	return s
}

// booted waits until systemd has started what it has to.
func booted(t *testing.T, s *cluster.Server) {
	t.Helper()
	cluster.Eventually(t, s.Name()+" to have booted", func(ctx context.Context) error {
		out, err := s.Exec(ctx, "systemctl", "is-system-running")
		if strings.TrimSpace(out) == "degraded" {
			failed, _ := s.Exec(ctx, "systemctl", "--failed", "--no-legend")
			return testbed.GiveUp(errors.New(failed))
		}
		return err
	})
}

// install runs install.sh of a release and gives what it says. Arguments with a = before the first without one are variables.
func install(t *testing.T, s *cluster.Server, from string, args ...string) string {
	t.Helper()
	out, err := tryInstall(t, s, from, args...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", s.Name(), err, out)
	}
	return out
}

func tryInstall(t *testing.T, s *cluster.Server, from string, args ...string) (string, error) {
	t.Helper()
	n := 0
	for n < len(args) && strings.HasPrefix(args[n], "KEDGE_") {
		n++
	}
	line := append(append([]string{"sh", "-c", `exec env "$@" 2>&1`, "sh"}, args[:n]...), append([]string{"sh", from + "/install.sh"}, args[n:]...)...)
	return s.Exec(cluster.Within(t, 4*minute), line...)
}

func contains(t *testing.T, out string, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(out, text) {
			t.Errorf("%q is missing in:\n%s", text, out)
		}
	}
}

// listing is every file of the machine outside of what lives: name, type, size, mode, time, target of a link.
func listing(t *testing.T, s *cluster.Server) string {
	t.Helper()
	out, err := s.Shell(cluster.Within(t, minute), `find / \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /media -o -path /var/log \) -prune -o `+
		`-type d -printf '%p %y %m\n' -o -printf '%p %y %s %m %T@ %l\n' | sort`)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func shell(t *testing.T, s *cluster.Server, line string) string {
	t.Helper()
	out, err := s.Shell(cluster.Within(t, minute), line)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}
