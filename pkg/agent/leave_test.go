// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// serverConfig is that of a server without pods: everything that runs in it is in this process.
func serverConfig(t *testing.T) *config.Config {
	t.Helper()
	cfg := testConfig(t)
	cfg.Role, cfg.DisableAgent = config.RoleServer, true
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cfg.LBServerPort = int(netip.MustParseAddrPort(l.Addr().String()).Port())
	return cfg
}

// running starts a machine and waits until it is part of its cluster.
func running(t *testing.T, m *Machine) (stop func() error) {
	t.Helper()
	if _, err := m.Balance(""); err != nil {
		t.Fatal(err)
	}
	stop = serve(t, m, func(ctx context.Context) error { return m.Run(ctx, nil, nil) })
	eventually(t, "processes", func() error {
		st, err := GetStatus(t.Context(), m.cfg.RunDir)
		if err == nil && st.Processes == nil {
			err = errors.New("not yet")
		}
		return err
	})
	return stop
}

func write(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// A machine that leaves tells who asked, removes what made it part of the cluster and nothing else, and ends without an error.
func TestLeave(t *testing.T) {
	cfg := serverConfig(t)
	m := testMachine(t, cfg)
	var forced []bool
	m.LeaveCluster = func(_ context.Context, force bool, say func(string)) error {
		forced = append(forced, force)
		say("the plan,\nin two lines")
		return nil
	}
	extra := filepath.Join(cfg.DataDir, "etcd", "member", "wal")
	m.LeaveFiles = []string{filepath.Join(cfg.DataDir, "etcd"), filepath.Join(cfg.DataDir, "not-there")}
	gone := []string{extra, membershipFile(cfg), BalancerFile(cfg), filepath.Join(cfg.PKIDir(), "server-ca.key"), node.ClientCertFile(cfg.KubeletRootDir)}
	stay := []string{filepath.Join(cfg.DataDir, "images", "x.tar"), filepath.Join(cfg.DataDir, "containerd", "x"), filepath.Join(cfg.KubeletRootDir, "pods", "x")}
	write(t, append(gone, stay...)...)
	stop := running(t, m)

	var out strings.Builder
	if err := Leave(t.Context(), cfg.RunDir, true, &out); err != nil {
		t.Fatal(err)
	}
	if want := "the plan,\nin two lines\nthis machine is not part of the cluster any more\n"; out.String() != want {
		t.Errorf("it said %q, want %q", out.String(), want)
	}
	if !slices.Equal(forced, []bool{true}) {
		t.Errorf("forced: %v", forced)
	}
	if err := stop(); err != nil {
		t.Errorf("the machine ended with %v", err)
	}
	for _, path := range gone {
		if exists(path) {
			t.Errorf("%s is left", path)
		}
	}
	for _, path := range stay {
		if !exists(path) {
			t.Errorf("%s is gone", path)
		}
	}
	if err := Leave(t.Context(), cfg.RunDir, false, io.Discard); !errors.Is(err, ErrNotRunning) {
		t.Errorf("afterwards: %v", err)
	}
}

// Where leaving fails, nothing has happened; all of the error gets to who asked, and another try may succeed.
func TestLeaveFails(t *testing.T) {
	cfg := serverConfig(t)
	m := testMachine(t, cfg)
	fail := true
	m.LeaveCluster = func(context.Context, bool, func(string)) error {
		if fail {
			return errors.Join(errors.New("nothing was changed: no other server answers"), errors.New("second line"))
		}
		return nil
	}
	write(t, membershipFile(cfg))
	stop := running(t, m)
	err := Leave(t.Context(), cfg.RunDir, false, io.Discard)
	if err == nil || err.Error() != "nothing was changed: no other server answers\nsecond line" {
		t.Errorf("got %v", err)
	}
	if m.Leaving() || !exists(membershipFile(cfg)) {
		t.Errorf("leaving %v, membership %v", m.Leaving(), exists(membershipFile(cfg)))
	}
	if _, err := GetStatus(t.Context(), cfg.RunDir); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	fail = false
	if err := Leave(t.Context(), cfg.RunDir, false, io.Discard); err != nil {
		t.Errorf("second try: %v", err)
	}
	if err := stop(); err != nil || exists(membershipFile(cfg)) {
		t.Errorf("the machine ended with %v, membership %v", err, exists(membershipFile(cfg)))
	}
}

// What cannot be removed is told, and the machine ends all the same: the cluster has forgotten it.
func TestLeaveCannotRemove(t *testing.T) {
	cfg := serverConfig(t)
	m := testMachine(t, cfg)
	m.LeaveCluster = func(context.Context, bool, func(string)) error { return nil }
	m.LeaveFiles = []string{"/proc/self/status"}
	write(t, membershipFile(cfg))
	stop := running(t, m)
	if err := Leave(t.Context(), cfg.RunDir, false, io.Discard); err == nil || !strings.Contains(err.Error(), "/proc/self/status") {
		t.Errorf("got %v", err)
	}
	if err := stop(); err != nil || exists(membershipFile(cfg)) {
		t.Errorf("the machine ended with %v, membership %v", err, exists(membershipFile(cfg)))
	}
}

// A stop while the cluster is asked is an ordinary one: pods run on, files stay. A second request to leave is refused meanwhile.
func TestStopWhileLeaving(t *testing.T) {
	cfg := serverConfig(t)
	m := testMachine(t, cfg)
	m.log = slog.New(slog.DiscardHandler) // the request outlives the test
	asked, answer := make(chan struct{}), make(chan error)
	m.LeaveCluster = func(context.Context, bool, func(string)) error {
		close(asked)
		return <-answer
	}
	write(t, membershipFile(cfg))
	stop := running(t, m)
	var out strings.Builder
	left := make(chan error, 1)
	go func() { left <- Leave(context.WithoutCancel(t.Context()), cfg.RunDir, false, &out) }()
	<-asked
	if err := Leave(t.Context(), cfg.RunDir, false, io.Discard); err == nil || !strings.Contains(err.Error(), "is about to leave it already") {
		t.Errorf("second request: %v", err)
	}
	m.beforeStop(Containerd) // would remove the pods
	if err := stop(); err != nil || !exists(membershipFile(cfg)) {
		t.Errorf("the machine ended with %v, membership %v", err, exists(membershipFile(cfg)))
	}
	if err := <-left; err == nil || !strings.Contains(err.Error(), "kedge ended in the middle of it") {
		t.Errorf("who asked got %v", err)
	}
	if out.Len() != 0 {
		t.Errorf("it went on: %s", out.String())
	}
	answer <- errors.New("too late")
}

// A stop that comes when the cluster has forgotten the machine already: it leaves.
func TestStopAfterLeaving(t *testing.T) {
	cfg := serverConfig(t)
	m := testMachine(t, cfg)
	write(t, membershipFile(cfg))
	if _, err := m.Balance(""); err != nil {
		t.Fatal(err)
	}
	m.leaving = &leaving{say: func(string) {}, done: make(chan error, 1)}
	close(m.left)
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // watchLeave may take notice of either
	for range 20 {
		write(t, membershipFile(cfg))
		if err := m.Run(ctx, nil, nil); err != nil || exists(membershipFile(cfg)) {
			t.Fatalf("the machine ended with %v, membership %v", err, exists(membershipFile(cfg)))
		}
		if err := <-m.leaving.done; err != nil {
			t.Fatal(err)
		}
	}
}

// lastLine holds the line that ends a leaving up for a while, and notes that it was written.
type lastLine struct {
	slog.Handler
	served  <-chan struct{} // Serve has returned
	written chan string
}

func (l lastLine) Enabled(context.Context, slog.Level) bool { return true }
func (l lastLine) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if a.Value.String() != "ok" {
			return true
		}
		select {
		case <-l.served:
			l.written <- "after the end"
		case <-time.After(200 * time.Millisecond):
			l.written <- "before the end"
		}
		return false
	})
	return nil
}

// The process ends when Serve returns: until then, who asked to leave has to have heard how it ended.
func TestLastLineBeforeTheEnd(t *testing.T) {
	cfg := serverConfig(t)
	m := testMachine(t, cfg)
	m.LeaveCluster = func(context.Context, bool, func(string)) error { return nil }
	served, written := make(chan struct{}), make(chan string, 1)
	m.log = slog.New(lastLine{slog.DiscardHandler, served, written})
	stop := running(t, m)
	left := make(chan error, 1)
	go func() { left <- Leave(t.Context(), cfg.RunDir, false, io.Discard) }()
	<-m.left
	if err := stop(); err != nil {
		t.Error(err)
	}
	close(served)
	if when := <-written; when != "before the end" {
		t.Errorf("the last line was written %s", when)
	}
	if err := <-left; err != nil {
		t.Error(err)
	}
}

// An agent asks to be forgotten with its own certificate, at whichever server the balancer finds.
func TestLeaveAsNode(t *testing.T) {
	var asked string
	code := http.StatusOK
	api := newAPIServer(t, func(w http.ResponseWriter, r *http.Request) {
		asked = fmt.Sprint(r.Method, " ", r.URL.Path, " as ", r.TLS.PeerCertificates[0].Subject.CommonName)
		answer(w, code, refusal(code, "", "the datastore has no leader"))
	})
	cfg := testConfig(t)
	m := testMachine(t, cfg)
	m.Credentials.Kubeconfig = api.enrolled(t, cfg).KubeconfigFile()
	var said []string
	say := func(text string) { said = append(said, text) }
	if err := m.leaveAsNode(t.Context(), false, say); err != nil {
		t.Error(err)
	}
	if asked != "DELETE /kedge/v1/nodes/n1 as system:node:n1" || !slices.Equal(said, []string{"node n1 removed from the cluster"}) {
		t.Errorf("it asked %q and said %q", asked, said)
	}
	code, said = http.StatusServiceUnavailable, nil
	if err := m.leaveAsNode(t.Context(), false, say); err == nil || !strings.HasPrefix(err.Error(), "nothing was changed: ") || !strings.Contains(err.Error(), "the datastore has no leader") || said != nil {
		t.Errorf("refused: %v, said %q", err, said)
	}
}

// While a machine joins, its socket says what it waits for; there is nothing to leave yet.
func TestStatusWhileJoining(t *testing.T) {
	cfg := testConfig(t)
	m := testMachine(t, cfg)
	next := make(chan struct{})
	end := errors.New("gave up")
	stop := serve(t, m, func(context.Context) error {
		m.Phase("waiting to join: nothing listens on 192.0.2.1:6443")
		<-next
		m.Phase("waiting to join: another server is joining")
		<-next
		return end
	})
	phase := func(want string) {
		t.Helper()
		eventually(t, want, func() error {
			st, err := GetStatus(t.Context(), cfg.RunDir)
			if err == nil && st.Phase != want {
				err = fmt.Errorf("the phase is %q", st.Phase)
			}
			return err
		})
	}
	phase("waiting to join: nothing listens on 192.0.2.1:6443")
	st, err := GetStatus(t.Context(), cfg.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	if st.Node != "n1" || st.Role != config.RoleAgent || st.PID != os.Getpid() || st.Ready || st.Processes != nil || st.Started.IsZero() {
		t.Errorf("got %+v", st)
	}
	if info, err := os.Stat(SocketPath(cfg.RunDir)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", info, err)
	}
	if err := Leave(t.Context(), cfg.RunDir, false, io.Discard); err == nil || !strings.Contains(err.Error(), "this machine is not part of a cluster yet") {
		t.Errorf("leave: %v", err)
	}
	next <- struct{}{}
	phase("waiting to join: another server is joining")
	next <- struct{}{}
	if err := stop(); !errors.Is(err, end) {
		t.Errorf("Serve ended with %v", err)
	}
	if _, err := GetStatus(t.Context(), cfg.RunDir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("afterwards: %v", err)
	}
}

// A socket that a killed Kedge left behind is not in the way.
func TestStaleSocket(t *testing.T) {
	cfg := testConfig(t)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: SocketPath(cfg.RunDir), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := GetStatus(t.Context(), cfg.RunDir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("nobody listens: %v", err)
	}
	serve(t, testMachine(t, cfg), func(ctx context.Context) error { <-ctx.Done(); return nil })
	eventually(t, "status", func() error { _, err := GetStatus(t.Context(), cfg.RunDir); return err })
}

// A server without anything that is not ready is ready, and its phase is over.
func TestStatusOfServer(t *testing.T) {
	cfg := serverConfig(t)
	m := testMachine(t, cfg)
	m.Phase("waiting to join")
	changed := make(chan []supervise.ProcessStatus, 100)
	m.OnChange = func(p []supervise.ProcessStatus) {
		select {
		case changed <- p:
		default:
		}
	}
	if _, err := m.Balance("127.0.0.1:6443"); err != nil {
		t.Fatal(err)
	}
	failing := m.Process("etcd", []string{"etcd"}, func() (any, error) { return nil, errors.New("no disk") })
	stop := serve(t, m, func(ctx context.Context) error { return m.Run(ctx, []*supervise.Process{failing}, []string{"etcd"}) })
	eventually(t, "a failed process", func() error {
		st, err := GetStatus(t.Context(), cfg.RunDir)
		if err != nil || len(st.Processes) == 0 || st.Processes[0].LastExit == "" {
			return fmt.Errorf("%+v, %w", st, err)
		}
		if st.Phase != "" || st.Ready || st.Processes[0].LastExit != "configuration: no disk" || len(st.APIServers) != 1 || !st.APIServers[0].Local {
			t.Errorf("got %+v", st)
		}
		return nil
	})
	<-changed
	if err := m.Restart("nothing", ""); err == nil {
		t.Error("a process that does not exist was restarted")
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}
