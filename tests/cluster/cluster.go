// SPDX-License-Identifier: Apache-2.0

// Package cluster runs bin/kedge in machines of the test bed, the way a user would, and talks to it with the tools that a
// user has: kedge kubectl and kedge status.
package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/kedge-io/kedge/tests/image"
	"github.com/kedge-io/kedge/tests/testbed"
)

// Places in a machine.
const (
	Program = "/usr/local/bin/kedge"
	LogFile = "/var/log/kedge.log"
	DataDir = "/var/lib/kedge"
)

// Options say how a server is set up before its first start.
type Options struct {
	Machine    []testbed.Option
	Flags      []string          // of kedge server
	Config     string            // /etc/kedge/config.yaml
	Registries string            // /etc/kedge/registries.yaml
	Images     []string          // archives of the host that go to data-dir/images
	Files      map[string]string // other files in the machine
}

// Server is a machine with Kedge.
type Server struct {
	*testbed.Machine

	flags []string
	proc  *testbed.Process
}

// Prepare makes a machine that is ready for Start.
func Prepare(ctx context.Context, bed *testbed.Bed, name string, o Options) (*Server, error) {
	bin, err := Binary()
	if err != nil {
		return nil, err
	}
	m, err := bed.Machine(ctx, name, append([]testbed.Option{testbed.Bind(bin, Program)}, o.Machine...)...)
	if err != nil {
		return nil, err
	}
	s := &Server{Machine: m, flags: o.Flags}
	bed.OnKeepLogs(s.describe)
	files := map[string]string{"/etc/kedge/config.yaml": o.Config, "/etc/kedge/registries.yaml": o.Registries}
	for name, text := range o.Files {
		files[name] = text
	}
	for name, text := range files {
		if text == "" {
			continue
		}
		if err := m.WriteFile(name, []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	for _, archive := range o.Images {
		b, err := os.ReadFile(archive)
		if err != nil {
			return nil, err
		}
		if err := m.WriteFile(path.Join(DataDir, "images", filepath.Base(archive)), b, 0o644); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Start makes a machine, starts Kedge in it and waits until the node is ready.
func Start(ctx context.Context, bed *testbed.Bed, name string, o Options) (*Server, error) {
	s, err := Prepare(ctx, bed, name, o)
	if err != nil {
		return nil, err
	}
	return s, errors.Join(s.Run(ctx), s.WaitReady(ctx))
}

// Run starts kedge server in the background.
func (s *Server) Run(ctx context.Context) error {
	p, err := s.Spawn(ctx, LogFile, append([]string{Program, "server"}, s.flags...)...)
	s.proc = p
	return err
}

// Process is the kedge server that Run started last.
func (s *Server) Process() *testbed.Process { return s.proc }

// Stop ends kedge server with SIGTERM and waits for its end.
func (s *Server) Stop(ctx context.Context) error {
	if err := s.proc.Signal(ctx, "TERM"); err != nil {
		return err
	}
	return s.proc.Wait(ctx)
}

// WaitReady waits until the node is Ready and new pods are accepted. It gives up at once when the server ends.
func (s *Server) WaitReady(ctx context.Context) error {
	return testbed.Wait(ctx, "the node "+s.Name()+" to be Ready", func(ctx context.Context) error {
		if running, err := s.proc.Running(ctx); err == nil && !running {
			return testbed.GiveUp(fmt.Errorf("kedge server ended: %s", s.logTail(ctx)))
		}
		if err := s.ready(ctx); err != nil {
			return err
		}
		_, err := s.Kubectl(ctx, "-n", "default", "get", "serviceaccount", "default")
		return err
	})
}

func (s *Server) ready(ctx context.Context) error {
	out, err := s.Kubectl(ctx, "get", "node", s.Name(), "-o", `jsonpath={.status.conditions[?(@.type=="Ready")]}`)
	if err != nil {
		return err
	}
	var c struct{ Status, Message string }
	if err := json.Unmarshal([]byte(out), &c); err != nil {
		return fmt.Errorf("the node's condition %q: %w", out, err)
	}
	if c.Status != "True" {
		return fmt.Errorf("condition Ready is %s: %s", c.Status, c.Message)
	}
	return nil
}

func (s *Server) logTail(ctx context.Context) string {
	out, err := s.Exec(ctx, "tail", "-n", "15", LogFile)
	return strings.TrimSpace(out) + errorText(err)
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// Kubectl runs kedge kubectl in the machine, each request limited to 30 seconds, and returns its standard output.
func (s *Server) Kubectl(ctx context.Context, args ...string) (string, error) {
	return s.Exec(ctx, kubectl(args)...)
}

// Apply hands YAML to kubectl apply, in a namespace.
func (s *Server) Apply(ctx context.Context, namespace, yaml string) error {
	_, err := s.ExecInput(ctx, strings.NewReader(yaml), kubectl([]string{"-n", namespace, "apply", "-f", "-"})...)
	return err
}

func kubectl(args []string) []string {
	for _, a := range args {
		switch a {
		case "exec", "attach", "port-forward", "logs", "wait", "rollout": // these last as long as they must
			return append([]string{Program, "kubectl"}, args...)
		}
	}
	return append([]string{Program, "kubectl", "--request-timeout=30s"}, args...)
}

// Status is the part of `kedge status -o json` that tests look at.
type Status struct {
	Ready     bool
	Processes []struct {
		Name       string
		PID        int
		Restarts   int
		LastExit   string
		Components []struct{ Name, State, Reason string }
	}
}

// Status asks kedge status. It exits with 3 when something is not ready, which is no error here.
func (s *Server) Status(ctx context.Context) (*Status, error) {
	out, err := s.Exec(ctx, Program, "status", "-o", "json")
	var exit *testbed.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.Code != 3) {
		return nil, err
	}
	var st Status
	if err := json.Unmarshal([]byte(out), &st); err != nil {
		return nil, fmt.Errorf("kedge status: %w: %s", err, out)
	}
	return &st, nil
}

// Log returns the log of kedge server.
func (s *Server) Log() (string, error) {
	b, err := s.ReadFile(LogFile)
	return string(b), err
}

// describe writes what the cluster says about itself beside the logs of a failed test.
func (s *Server) describe(dir string) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for file, args := range map[string][]string{
		"status":    {Program, "status"},
		"processes": {"ps", "-eo", "pid,ppid,etimes,time,rss,stat,args", "--forest"},
		"network":   {"sh", "-c", "ip addr; ip route; cat /etc/resolv.conf; ls -la /etc/cni/net.d /var/lib/kedge 2>&1"},
		"all":       kubectl([]string{"get", "nodes,pods,services,endpointslices", "-A", "-o", "wide", "--request-timeout=5s"}),
		"events":    kubectl([]string{"get", "events", "-A", "--sort-by=.lastTimestamp", "--request-timeout=5s"}),
		"pods":      kubectl([]string{"describe", "pods", "-A", "--request-timeout=5s"}),
	} {
		out, err := s.Exec(ctx, args...)
		// Best effort: a test has failed already, and this very machine may be why.
		_ = os.WriteFile(filepath.Join(dir, s.Name(), "kedge-"+file+".txt"), []byte(out+errorText(err)+"\n"), 0o644)
	}
}

// Binary is the program under test: $KEDGE_BIN, or bin/kedge of the module.
func Binary() (string, error) {
	if bin := os.Getenv("KEDGE_BIN"); bin != "" {
		return filepath.Abs(bin)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		if dir == "/" {
			return "", errors.New("not inside the module: set KEDGE_BIN to the program under test")
		}
	}
	bin := filepath.Join(dir, "bin", "kedge")
	if _, err := os.Stat(bin); err != nil {
		return "", fmt.Errorf("%w: run make build first", err)
	}
	return bin, nil
}

// Images makes the archives of the images that tests use, busybox and the test server, in dir.
func Images(ctx context.Context, bed *testbed.Bed, dir string) ([]string, error) {
	root, err := bed.Template()
	if err != nil {
		return nil, err
	}
	files := []string{filepath.Join(dir, "busybox.tar"), filepath.Join(dir, "server.tar")}
	return files, errors.Join(image.Busybox(ctx, files[0], image.BusyboxName, root), image.Server(ctx, files[1], image.ServerName))
}
