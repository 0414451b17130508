// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/kedge-io/kedge/pkg/apilb"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
	"github.com/kedge-io/kedge/pkg/tunnel"
	"github.com/kedge-io/kedge/pkg/version"
)

// Status is what `kedge status` shows.
type Status struct {
	Version      string                    `json:"version"`
	Node         string                    `json:"node"`
	Role         config.Role               `json:"role"`
	PID          int                       `json:"pid"`
	Started      time.Time                 `json:"started"`
	Ready        bool                      `json:"ready"`           // every component is
	Phase        string                    `json:"phase,omitempty"` // what it waits for before its processes start
	Trial        string                    `json:"trial,omitempty"` // the version to go back to while this one has to prove itself
	Processes    []supervise.ProcessStatus `json:"processes"`
	APIServers   []apilb.Server            `json:"apiServers"` // as the load balancer of this machine sees them
	Tunnels      []tunnel.Link             `json:"tunnels"`    // that this machine keeps open to servers
	Certificates []pki.CertStatus          `json:"certificates"`
}

// SocketPath is where a server with that run directory answers status requests, for root only.
func SocketPath(runDir string) string { return filepath.Join(runDir, "kedge.sock") }

// GetStatus asks the Kedge of this machine. It works while the API is down. An error that wraps ErrNotRunning says that none
// answers.
func GetStatus(ctx context.Context, runDir string) (*Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	body, err := ask(ctx, runDir, http.MethodGet, "/status", nil)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var st Status
	if err := json.NewDecoder(body).Decode(&st); err != nil {
		return nil, fmt.Errorf("answer of kedge: %w", err)
	}
	return &st, nil
}

// Leave has the Kedge of this machine leave its cluster and writes what it says.
func Leave(ctx context.Context, runDir string, force bool, out io.Writer) error {
	body, err := ask(ctx, runDir, http.MethodPost, "/leave?force="+strconv.FormatBool(force), nil)
	if err != nil {
		return err
	}
	return follow(body, out, "kedge ended in the middle of it: see its log, and `kedge node remove` on a server")
}

// ask sends a request to the supervisor's socket.
func ask(ctx context.Context, runDir, method, path string, send io.Reader) (io.ReadCloser, error) {
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", SocketPath(runDir))
		},
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://kedge"+path, send)
	if err != nil {
		return nil, err
	}
	res, err := client.Do(req)
	switch {
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("only root may ask: %w", err)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w (%s does not answer)", ErrNotRunning, SocketPath(runDir))
	case err != nil:
		return nil, err
	}
	return res.Body, nil
}

// ErrNotRunning is returned by GetStatus.
var ErrNotRunning = errors.New("kedge is not running on this machine: start it with `kedge server`, `kedge agent` or `systemctl start kedge`")

// DefaultRunDir is where GetStatus looks unless told otherwise.
const DefaultRunDir = config.DefaultRunDir

// QuerySocket is where the servers of the cluster may ask the Kedge of a machine with that run directory: GET tells, and what changes
// something (PUT, POST) is for administrators, as the API server lets nobody else through (nodes/proxy, create and update).
func QuerySocket(runDir string) string { return filepath.Join(runDir, "query.sock") }

// queries is what QuerySocket answers.
func (m *Machine) queries() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", m.serveStatus)
	mux.HandleFunc("GET /"+queryPolicy, m.servePolicy)
	mux.HandleFunc("POST /"+queryDoctor, m.serveDoctor)
	mux.HandleFunc("GET /"+queryImages, m.serveImages)
	mux.HandleFunc("POST /"+queryImages, m.serveImport)
	mux.HandleFunc("POST /"+queryImages+"/pull", m.servePull)
	mux.HandleFunc("GET /"+PathUpgrade, m.serveUpgradeStatus)
	mux.HandleFunc("PUT /"+PathUpgrade, m.serveRelease)
	mux.HandleFunc("POST /"+PathUpgrade, m.serveUpgrade)
	return mux
}

// requests is what root may ask of the machine's Kedge.
func (m *Machine) requests() *http.ServeMux {
	mux := m.queries()
	mux.HandleFunc("POST /leave", m.serveLeave)
	mux.HandleFunc("POST /certificates/rotate", m.serveRotate)
	mux.HandleFunc("POST /certificates/rotate-ca", m.serveRotateCA)
	mux.HandleFunc("POST /stop-pods", m.serveStopPods)
	return mux
}

func (m *Machine) serveStatus(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(m.status()); err != nil {
		m.log.Debug("status request", "error", err)
	}
}

// serveSocket answers requests on a unix socket that is root's until ctx ends.
func serveSocket(ctx context.Context, path string, handler http.Handler) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return fmt.Errorf("socket %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return err
	}
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: handler}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		// Who asked to leave gets to hear how it ended: the process does not end before.
		wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if srv.Shutdown(wait) != nil {
			srv.Close()
		}
	}()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("socket %s: %w", path, err)
	}
	<-stopped
	return nil
}

func (m *Machine) status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	st := Status{
		Version: version.Version,
		Node:    m.cfg.NodeName,
		Role:    m.cfg.Role,
		PID:     os.Getpid(),
		Started: m.started,
		Phase:   m.phase,

		Certificates: pki.Inspect(CertificatePlaces(m.cfg)),
		Trial:        m.trialAgainst(),
	}
	if m.supervisor != nil {
		st.Processes, st.APIServers = m.supervisor.Status(), m.balancer.Servers()
		if m.tunnel != nil {
			st.Tunnels = m.tunnel.Links()
		}
		st.Ready = notReady(st.Processes) == ""
	}
	return st
}

// notReady says in a line what is not ready; it is empty when everything is.
func notReady(processes []supervise.ProcessStatus) string {
	var parts []string
	for _, p := range processes {
		for _, c := range p.Components {
			if c.State != supervise.Ready {
				parts = append(parts, strings.TrimSuffix(fmt.Sprintf("%s %s: %s", c.Name, c.State, c.Reason), ": "))
			}
		}
	}
	return strings.Join(parts, "; ")
}

// changed tells the service manager and, once, the operator.
func (m *Machine) changed() {
	processes := m.supervisor.Status()
	if m.OnChange != nil {
		m.OnChange(processes)
	}
	missing := notReady(processes)
	if missing != "" {
		m.notify.status(missing)
		return
	}
	m.notify.ready()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.ready {
		m.ready = true
		attrs := []any{"took", time.Since(m.started).Round(time.Millisecond)}
		text := "ready"
		if m.cfg.Role == config.RoleServer {
			text, attrs = "ready: try `kedge kubectl get nodes`", append(attrs, "kubeconfig", m.cfg.WriteKubeconfig)
		}
		m.log.Info(text, attrs...)
	}
}

// notifier speaks sd_notify(3). It does nothing where there is no service manager.
type notifier struct {
	log      *slog.Logger
	interval time.Duration // of watchdog pings; zero: none wanted
}

func newNotifier(log *slog.Logger) *notifier {
	n := &notifier{log: log}
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("watchdog settings of the service manager", "error", err)
	}
	n.interval = interval / 2
	return n
}

func (n *notifier) send(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		n.log.Warn("cannot notify the service manager", "error", err)
	}
}

func (n *notifier) ready()             { n.send(daemon.SdNotifyReady + "\nSTATUS=ready") }
func (n *notifier) status(text string) { n.send("STATUS=" + text) }
func (n *notifier) stopping() {
	n.send(daemon.SdNotifyStopping + "\nSTATUS=stopping")
}

// watchdog pings while the supervisor lives; children are its own business, they do not decide about the whole service.
func (n *notifier) watchdog(ctx context.Context) {
	if n.interval <= 0 {
		return
	}
	for {
		n.send(daemon.SdNotifyWatchdog)
		select {
		case <-ctx.Done():
			return
		case <-time.After(n.interval):
		}
	}
}

// flock takes the lock without waiting.
func flock(f *os.File) error { return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) }
