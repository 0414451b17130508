// SPDX-License-Identifier: Apache-2.0

// Package upgrade tests that a machine goes to another version of Kedge and back, and a cluster, with the program installed as users have
// it: under systemd, in a file that can be replaced.
package upgrade

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

const minute = time.Minute

// stick is where machines see the releases, read-only.
const stick = "/media/stick"

// releases are what the tests upgrade to.
type releases struct {
	dir               string
	program           []byte // under test
	old, new          string // versions
	good, bad, forged string // archives as machines see them
	minor             []byte // a program that says it is an older minor version
	pub               []byte // the key that the first two are signed with
}

// makeReleases makes another version out of the program under test, by another version in it: linking takes a minute, and this is as good.
func makeReleases(t *testing.T) *releases {
	t.Helper()
	bin, err := cluster.Binary()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(bin, "version").Output()
	if err != nil {
		t.Fatal(err)
	}
	r := &releases{dir: t.TempDir(), old: strings.Fields(string(out))[1]}
	if r.program, err = os.ReadFile(bin); err != nil {
		t.Fatal(err)
	}
	version := func(digit string) string { return r.old[:len(r.old)-1] + digit }
	r.new = version("8")
	broken, err := cluster.Build(t.Context(), "./broken")
	if err != nil {
		t.Fatal(err)
	}
	const place = "VERSION.VERSION.VERSION.VERSION."
	r.minor = bytes.ReplaceAll(broken, []byte(place), fmt.Appendf(nil, "%-*s", len(place), "v1.1.0+kedge1"))
	broken = bytes.ReplaceAll(broken, []byte(place), fmt.Appendf(nil, "%-*s", len(place), version("9")))
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	r.pub = pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	newer := bytes.ReplaceAll(r.program, []byte(r.old), []byte(r.new))
	r.good = r.archive(t, r.new, newer, key)
	r.bad = r.archive(t, version("9"), broken, key)
	r.forged = r.archive(t, version("7"), broken, other)
	return r
}

func (r *releases) archive(t *testing.T, version string, program []byte, key ed25519.PrivateKey) string {
	t.Helper()
	top := fmt.Sprintf("kedge-%s-linux-%s", version, runtime.GOARCH)
	f, err := os.Create(filepath.Join(r.dir, top+".tar.zst"))
	if err != nil {
		t.Fatal(err)
	}
	enc, err := zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		t.Fatal(err)
	}
	out := tar.NewWriter(enc)
	sums := fmt.Appendf(nil, "%x  kedge\n", sha256.Sum256(program))
	for _, file := range []struct {
		name string
		data []byte
	}{{"kedge", program}, {"SHA256SUMS", sums}, {"SHA256SUMS.sig", ed25519.Sign(key, sums)}} {
		if err := out.WriteHeader(&tar.Header{Name: top + "/" + file.name, Mode: 0o755, Size: int64(len(file.data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Write(file.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(out.Close(), enc.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(stick, filepath.Base(f.Name()))
}

// machine boots one with systemd and the old version, as install.sh leaves it.
func (r *releases) machine(t *testing.T, bed *testbed.Bed, name string, args ...string) *cluster.Server {
	t.Helper()
	m, err := bed.Machine(cluster.Within(t, minute), name, testbed.Systemd(), testbed.Bind(r.dir, stick))
	if err != nil {
		t.Fatal(err)
	}
	unit, err := os.ReadFile("../../scripts/kedge.service")
	if err != nil {
		t.Fatal(err)
	}
	role := cluster.Role(args[0])
	unit = bytes.Replace(unit, []byte("/usr/local/bin/kedge server"), []byte("/usr/local/bin/kedge "+strings.Join(args, " ")), 1)
	if err := errors.Join(m.WriteFile(cluster.Program, r.program, 0o755), m.WriteFile("/etc/kedge/release.pub", r.pub, 0o644),
		m.WriteFile("/etc/systemd/system/kedge.service", unit, 0o644)); err != nil {
		t.Fatal(err)
	}
	s := &cluster.Server{Node: &cluster.Node{Machine: m, Role: role}}
	bed.OnKeepLogs(func(dir string) {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		out, err := s.Shell(ctx, "journalctl --no-pager -b -u kedge; kedge status; kedge upgrade --status; ls -la /usr/local/bin /var/lib/kedge/upgrade")
		_ = os.WriteFile(filepath.Join(dir, name, "journal.txt"), []byte(fmt.Sprintln(out, err)), 0o644) // a test has failed already
	})
	cluster.Do(t, func(ctx context.Context) error { // ends when it is ready, if it is the first
		start := "systemctl daemon-reload && systemctl enable --now kedge"
		if len(args) > 1 {
			start += " --no-block"
		}
		_, err := s.Shell(ctx, start)
		return err
	})
	return s
}

// state is what `kedge upgrade --status -o json` says.
type state struct {
	Machine struct {
		Version, Missing string
		Pending          *struct{ To string }
	}
	History []struct {
		To, Reason, Snapshot string
		Failed, Back         bool
	}
	Cluster *struct {
		Phase, Text string
		Nodes       []struct {
			Name, Phase, Text string
			Began, Ended      time.Time
		}
	}
}

func stateOf(ctx context.Context, s *cluster.Server) (*state, error) {
	out, err := s.Exec(ctx, cluster.Program, "upgrade", "--status", "-o", "json")
	if err != nil {
		return nil, err
	}
	var st state
	return &st, json.Unmarshal([]byte(out), &st)
}

// runs waits until a machine runs a version, with everything ready and no upgrade under way.
func runs(t *testing.T, s *cluster.Server, version string) *state {
	t.Helper()
	var st *state
	cluster.Eventually(t, s.Name()+" to run "+version, func(ctx context.Context) error {
		var err error
		if st, err = stateOf(ctx, s); err != nil {
			return err
		}
		if m := st.Machine; m.Version != version || m.Missing != "" || m.Pending != nil {
			return fmt.Errorf("it says %+v", m)
		}
		return nil
	})
	return st
}

// upgrade runs the command and returns what it printed, errors and all.
func upgrade(t *testing.T, s *cluster.Server, args ...string) (string, error) {
	t.Helper()
	out, err := s.Exec(cluster.Within(t, 4*minute), append([]string{cluster.Program, "upgrade"}, args...)...)
	var exit *testbed.ExitError
	if errors.As(err, &exit) {
		out += exit.Stderr
	}
	return out, err
}
