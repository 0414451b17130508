// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"log/slog"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
	"github.com/kedge-io/kedge/pkg/version"
)

// Status is what `kedge status` shows.
type Status struct {
	Version      string                    `json:"version"`
	Node         string                    `json:"node"`
	PID          int                       `json:"pid"`
	Started      time.Time                 `json:"started"`
	Ready        bool                      `json:"ready"` // every component is
	Processes    []supervise.ProcessStatus `json:"processes"`
	Certificates []pki.CertStatus          `json:"certificates"`
}

// SocketPath is where a server with that run directory answers status requests, for root only.
func SocketPath(runDir string) string { return filepath.Join(runDir, "kedge.sock") }

// GetStatus asks the server of this machine. It works while the API is down. An error that wraps ErrNotRunning says that no
// server answers.
func GetStatus(ctx context.Context, runDir string) (*Status, error) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", SocketPath(runDir))
		},
	}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://kedge/status", nil)
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
	defer res.Body.Close()
	var st Status
	if err := json.NewDecoder(res.Body).Decode(&st); err != nil {
		return nil, fmt.Errorf("answer of the server: %w", err)
	}
	return &st, nil
}

// ErrNotRunning is returned by GetStatus.
var ErrNotRunning = errors.New("kedge is not running on this machine: start it with `kedge server` or `systemctl start kedge`")

// DefaultRunDir is where GetStatus looks unless told otherwise.
const DefaultRunDir = config.DefaultRunDir

func (s *server) serveStatus(ctx context.Context) error {
	path := SocketPath(s.cfg.RunDir)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return fmt.Errorf("status socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return err
	}
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(s.status()); err != nil {
			s.log.Debug("status request", "error", err)
		}
	})}
	go func() {
		<-ctx.Done()
		srv.Close()
	}()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("status socket: %w", err)
	}
	return nil
}

func (s *server) status() Status {
	st := Status{
		Version:      version.Version,
		Node:         s.cfg.NodeName,
		PID:          os.Getpid(),
		Started:      s.started,
		Processes:    s.supervisor.Status(),
		Certificates: s.pki.Status(),
	}
	st.Ready = notReady(st.Processes) == ""
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
func (s *server) changed() {
	missing := notReady(s.supervisor.Status())
	if missing != "" {
		s.notify.status(missing)
		return
	}
	s.notify.ready()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ready {
		s.ready = true
		s.log.Info("ready: try `kedge kubectl get nodes`", "took", time.Since(s.started).Round(time.Millisecond), "kubeconfig", s.cfg.WriteKubeconfig)
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
	n.send(daemon.SdNotifyStopping + "\nSTATUS=stopping; pods keep running")
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
