// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/kedge-io/kedge/tests/testbed"
)

// Places in a machine.
const (
	Program    = "/usr/local/bin/kedge"
	LogFile    = "/var/log/kedge.log"
	DataDir    = "/var/lib/kedge"
	Kubeconfig = "/etc/kedge/kubeconfig.yaml" // of a server
)

// Options say how a machine is set up before its first start.
type Options struct {
	Machine    []testbed.Option
	Flags      []string          // of kedge server, or kedge agent
	Config     string            // /etc/kedge/config.yaml
	Registries string            // /etc/kedge/registries.yaml
	Images     []string          // archives of the host that go to data-dir/images
	Files      map[string]string // other files in the machine
}

// Role is what a machine is in its cluster, and the subcommand that makes it one.
type Role string

// Roles.
const (
	ServerRole Role = "server"
	AgentRole  Role = "agent"
)

// Node is a machine with Kedge.
type Node struct {
	*testbed.Machine

	Role Role
	// Flags and JoinFlags are those of the next start. JoinFlags are the ones of a machine that joins.
	Flags, JoinFlags []string

	opts Options
	proc *testbed.Process
}

func prepareNode(ctx context.Context, bed *testbed.Bed, name string, role Role, o Options) (*Node, error) {
	bin, err := Binary()
	if err != nil {
		return nil, err
	}
	m, err := bed.Machine(ctx, name, append([]testbed.Option{testbed.Bind(bin, Program)}, o.Machine...)...)
	if err != nil {
		return nil, err
	}
	n := &Node{Machine: m, Role: role, Flags: slices.Clone(o.Flags), opts: o}
	bed.OnKeepLogs(n.describe)
	return n, n.setUp()
}

// setUp writes the files of the options.
func (n *Node) setUp() error {
	files := map[string]string{"/etc/kedge/config.yaml": n.opts.Config, "/etc/kedge/registries.yaml": n.opts.Registries}
	for name, text := range n.opts.Files {
		files[name] = text
	}
	for name, text := range files {
		if text == "" {
			continue
		}
		if err := n.WriteFile(name, []byte(text), 0o600); err != nil {
			return err
		}
	}
	for _, archive := range n.opts.Images {
		b, err := os.ReadFile(archive)
		if err != nil {
			return err
		}
		if err := n.WriteFile(path.Join(DataDir, "images", filepath.Base(archive)), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Reimage gives the machine a new disk, set up as the first one was, and boots it. Its name and address stay, and it is like a
// node that was never started.
func (n *Node) Reimage(ctx context.Context) error {
	n.proc = nil
	if err := errors.Join(n.Wipe(ctx), n.Boot(ctx)); err != nil {
		return err
	}
	return n.setUp()
}

// Run starts Kedge in the background.
func (n *Node) Run(ctx context.Context) error {
	p, err := n.Spawn(ctx, LogFile, n.command()...)
	n.proc = p
	return err
}

func (n *Node) command() []string {
	return slices.Concat([]string{Program, string(n.Role)}, n.Flags, n.JoinFlags)
}

// JoinThrough makes the node join through the server at a URL, with its next start.
func (n *Node) JoinThrough(url, token string) {
	n.JoinFlags = []string{"--server", url, "--token", token}
}

// Process is the Kedge that Run started last, nil before the first.
func (n *Node) Process() *testbed.Process { return n.proc }

// Stop ends Kedge with SIGTERM and waits for its end.
func (n *Node) Stop(ctx context.Context) error {
	if err := n.proc.Signal(ctx, "TERM"); err != nil {
		return err
	}
	return n.proc.Wait(ctx)
}

// Restart boots the machine if it is off, and starts Kedge if it does not run.
func (n *Node) Restart(ctx context.Context) error {
	state, err := n.State(ctx)
	if err != nil {
		return err
	}
	if state == "dead" {
		if err := n.Boot(ctx); err != nil {
			return err
		}
		return n.Run(ctx) // the old process's ID may be another's now
	}
	if running, err := n.proc.Running(ctx); running || err != nil {
		return err
	}
	return n.Run(ctx)
}

// ended is an error that no waiting cures if Kedge has ended.
func (n *Node) ended(ctx context.Context) error {
	if running, err := n.proc.Running(ctx); err == nil && !running {
		return testbed.GiveUp(fmt.Errorf("kedge %s of %s ended: %s", n.Role, n.Name(), n.logTail(ctx)))
	}
	return nil
}

func (n *Node) logTail(ctx context.Context) string {
	out, err := n.Exec(ctx, "tail", "-n", "15", LogFile)
	return strings.TrimSpace(out) + errorText(err)
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// Status is the part of `kedge status -o json` that tests look at.
type Status struct {
	Ready      bool
	Role       Role
	Phase      string // what it waits for before it starts any process
	APIServers []APIServer
	Processes  []struct {
		Name       string
		PID        int
		Restarts   int
		LastExit   string
		Components []struct{ Name, State, Reason string }
	}
}

// APIServer is one that the node's load balancer knows.
type APIServer struct {
	Address                string
	Healthy, Local, Active bool
}

// Problems is an error that names what is not ready.
func (st *Status) Problems() error {
	var bad []string
	for _, p := range st.Processes {
		for _, c := range p.Components {
			if c.State != "ready" {
				bad = append(bad, fmt.Sprintf("%s is %s (%s)", c.Name, c.State, c.Reason))
			}
		}
	}
	if st.Phase != "" {
		bad = append(bad, st.Phase)
	}
	if len(bad) > 0 || !st.Ready {
		return errors.New("not ready: " + strings.Join(bad, ", "))
	}
	return nil
}

// PIDs are the processes by name.
func (st *Status) PIDs() map[string]int {
	pids := map[string]int{}
	for _, p := range st.Processes {
		pids[p.Name] = p.PID
	}
	return pids
}

// Status asks kedge status. It exits with 3 when something is not ready, which is no error here.
func (n *Node) Status(ctx context.Context) (*Status, error) {
	out, err := n.Exec(ctx, Program, "status", "-o", "json")
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

// Log returns what Kedge has written, in all its starts.
func (n *Node) Log() (string, error) {
	b, err := n.ReadFile(LogFile)
	return string(b), err
}

// WaitLog waits until Kedge has written a text.
func (n *Node) WaitLog(ctx context.Context, text string) error {
	return testbed.Wait(ctx, fmt.Sprintf("%s to write %q", n.Name(), text), func(ctx context.Context) error {
		log, err := n.Log()
		if err == nil && !strings.Contains(log, text) {
			err = errors.Join(fmt.Errorf("it wrote: %s", n.logTail(ctx)), n.ended(ctx))
		}
		return err
	})
}

// describe writes what the node says about itself beside the logs of a failed test.
func (n *Node) describe(dir string) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	commands := map[string][]string{
		"status":    {Program, "status"},
		"processes": {"ps", "-eo", "pid,ppid,etimes,time,rss,stat,args", "--forest"},
		"network":   {"sh", "-c", "ip addr; ip route; cat /etc/resolv.conf; ls -la /etc/cni/net.d /var/lib/kedge 2>&1"},
	}
	if n.Role == ServerRole {
		commands["all"] = kubectl([]string{"get", "nodes,pods,services,endpointslices", "-A", "-o", "wide", "--request-timeout=5s"})
		commands["events"] = kubectl([]string{"get", "events", "-A", "--sort-by=.lastTimestamp", "--request-timeout=5s"})
		commands["pods"] = kubectl([]string{"describe", "pods", "-A", "--request-timeout=5s"})
		commands["members"] = kubectl([]string{"get", "--raw", membersPath, "--request-timeout=5s"})
	}
	for file, args := range commands {
		out, err := n.Exec(ctx, args...)
		// Best effort: a test has failed already, and this very machine may be why.
		_ = os.WriteFile(filepath.Join(dir, n.Name(), "kedge-"+file+".txt"), []byte(out+errorText(err)+"\n"), 0o644)
	}
}
