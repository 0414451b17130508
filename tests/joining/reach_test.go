// SPDX-License-Identifier: Apache-2.0

package joining

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// TestReach: logs, exec, port-forward and requests to pods work from every server to every node, one of which nobody can open
// connections to, nor to its pods; the API's webhooks and extensions may run there. All of it works from a server that uses nothing
// but tunnels, too.
func TestReach(t *testing.T) {
	c := shared.Cluster(t)
	shielded := visitor(t, c)
	cluster.Do(t, shielded.Shield)
	join(t, c, shielded)
	s := c.Servers[0].Session(t)
	podsOn(s, c.Nodes())
	cutOff(t, c, shielded)
	extend(t, s, shielded)
	t.Run("auto", func(t *testing.T) {
		reach(t, s.NS, c.Nodes(), c.Servers...)
		extended(t, s.NS, c.Servers...)
	})

	t.Run("tunnel", func(t *testing.T) {
		tunnels := c.Servers[1]
		flags := tunnels.Flags
		tunnels.Flags = append(flags[:len(flags):len(flags)], "--egress-selector-mode", "tunnel")
		cluster.Do(t, tunnels.Stop, tunnels.Run, c.WaitReady)
		reach(t, s.NS, c.Nodes(), tunnels)
		extended(t, s.NS, tunnels)
		tunnels.Flags = flags
		cluster.Do(t, tunnels.Stop, tunnels.Run)
	})

	dismiss(t, c.Servers[0], shielded) // without its shield it would be one that others can open connections to
}

// patience is what a command may take that goes the direct way, or finds that it cannot.
const patience = 10 * time.Second

// podsOn starts a pod on each of some nodes, for reach.
func podsOn(s *cluster.Session, nodes []*cluster.Node) {
	for _, n := range nodes {
		s.Apply(cluster.ServerPod, "on-"+n.Name(), "", `
  - {name: shell, image: "kedge.test/busybox:1", command: [sleep, "100000"]}
  terminationGracePeriodSeconds: 0
  nodeName: `+n.Name())
	}
	for _, n := range nodes {
		s.Ready("on-" + n.Name())
	}
}

// reach uses the pods of some nodes from some servers in every way.
func reach(t *testing.T, ns string, nodes []*cluster.Node, servers ...*cluster.Server) {
	t.Helper()
	var all sync.WaitGroup
	for _, from := range servers {
		all.Go(func() {
			for _, to := range nodes {
				pod := "on-" + to.Name()
				for what, try := range map[string]func(context.Context) error{
					"logs": func(ctx context.Context) error {
						return says(ctx, from, "listening", "-n", ns, "logs", pod, "-c", "server")
					},
					"exec": func(ctx context.Context) error {
						return says(ctx, from, pod, "-n", ns, "exec", pod, "-c", "shell", "--", "hostname")
					},
					"request": func(ctx context.Context) error {
						return says(ctx, from, pod+" ", "get", "--raw", "/api/v1/namespaces/"+ns+"/pods/"+pod+":8080/proxy/")
					},
					"metrics": func(ctx context.Context) error {
						return says(ctx, from, "container_cpu_usage_seconds_total", "get", "--raw", "/api/v1/nodes/"+to.Name()+"/proxy/metrics/resource")
					},
					"port-forward": func(ctx context.Context) error { return forward(ctx, from, ns, pod) },
				} {
					patiently(t, fmt.Sprintf("%s from %s to %s", what, from.Name(), to.Name()), try)
				}
			}
		})
	}
	all.Wait()
}

func patiently(t *testing.T, what string, try func(context.Context) error) {
	t.Helper()
	begin := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	if err := try(ctx); err != nil || time.Since(begin) > patience {
		t.Errorf("%s, after %s: %v", what, time.Since(begin).Round(100*time.Millisecond), err)
	}
}

func says(ctx context.Context, s *cluster.Server, want string, args ...string) error {
	out, err := s.Kubectl(ctx, args...)
	if err == nil && !strings.Contains(out, want) {
		err = fmt.Errorf("it says %q", out[:min(len(out), 200)])
	}
	return err
}

// forward asks a pod through kubectl port-forward in the server's machine.
func forward(ctx context.Context, s *cluster.Server, ns, pod string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := s.Command(ctx, cluster.Program, "kubectl", "-n", ns, "port-forward", "pod/"+pod, ":8080")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	var problems strings.Builder
	cmd.Stderr = &problems
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		cancel()
		_ = cmd.Wait() // it runs until it is killed
	}()
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		cancel()
		return errors.Join(errors.New("port-forward ended"), cmd.Wait(), errors.New(problems.String()))
	}
	var port int
	if _, err := fmt.Sscanf(lines.Text(), "Forwarding from 127.0.0.1:%d -> 8080", &port); err != nil {
		return fmt.Errorf("%q: %w", lines.Text(), err)
	}
	got, err := s.Exec(ctx, "curl", "-sS", "-m", "5", fmt.Sprintf("http://127.0.0.1:%d/", port))
	if err == nil && !strings.HasPrefix(got, pod+" ") {
		err = fmt.Errorf("it answers %q", got)
	}
	return err
}

// TestLocalServer: a server's load balancer uses the server itself, some time after it has joined.
func TestLocalServer(t *testing.T) {
	c := shared.Cluster(t)
	for _, s := range c.Servers {
		err := testbed.Wait(cluster.Within(t, 3*minute), s.Name()+" to use itself", func(ctx context.Context) error {
			st, err := s.Status(ctx)
			if err == nil && !slices.ContainsFunc(st.APIServers, func(a cluster.APIServer) bool { return a.Local && a.Active }) {
				err = fmt.Errorf("it has %+v", st.APIServers)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}
