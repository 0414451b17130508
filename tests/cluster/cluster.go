// SPDX-License-Identifier: Apache-2.0

// Package cluster runs bin/kedge in machines of the test bed, the way a user would, and talks to it with the tools that a
// user has: kedge kubectl and kedge status. [Server] is a cluster of one; [Cluster] has several machines.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kedge-io/kedge/tests/testbed"
)

// Spec says what a cluster is made of.
type Spec struct {
	Servers, Agents int
	// Options of every machine. The flags are those of the servers.
	Options    Options
	AgentFlags []string
}

// Cluster is several machines with Kedge: servers s1, s2 …, agents a1, a2 …
type Cluster struct {
	Bed     *testbed.Bed
	Servers []*Server
	Agents  []*Node
	// Took says how long nodes needed from their start until they were Ready, and voters if they are servers.
	Took map[string]time.Duration

	spec Spec
}

// New makes the machines of a cluster. Nothing runs in them yet.
func New(ctx context.Context, bed *testbed.Bed, spec Spec) (*Cluster, error) {
	c := &Cluster{Bed: bed, Took: map[string]time.Duration{}, spec: spec}
	for range spec.Servers {
		if _, err := c.AddServer(ctx); err != nil {
			return nil, err
		}
	}
	for range spec.Agents {
		if _, err := c.AddAgent(ctx); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// AddServer makes another machine for a server.
func (c *Cluster) AddServer(ctx context.Context) (*Server, error) {
	s, err := Prepare(ctx, c.Bed, fmt.Sprintf("s%d", len(c.Servers)+1), c.spec.Options)
	if err == nil {
		c.Servers = append(c.Servers, s)
	}
	return s, err
}

// AddAgent makes another machine for an agent.
func (c *Cluster) AddAgent(ctx context.Context) (*Node, error) {
	o := c.spec.Options
	o.Flags = c.spec.AgentFlags
	n, err := prepareNode(ctx, c.Bed, fmt.Sprintf("a%d", len(c.Agents)+1), AgentRole, o)
	if err == nil {
		c.Agents = append(c.Agents, n)
	}
	return n, err
}

// Nodes are all machines, servers first.
func (c *Cluster) Nodes() []*Node {
	var nodes []*Node
	for _, s := range c.Servers {
		nodes = append(nodes, s.Node)
	}
	return append(nodes, c.Agents...)
}

// Start starts the first server, lets the other machines join one after the other, each with a new token, and waits until all
// of them are ready.
func (c *Cluster) Start(ctx context.Context) error {
	first := c.Servers[0]
	begin := time.Now()
	if err := errors.Join(first.Run(ctx), first.WaitReady(ctx)); err != nil {
		return err
	}
	c.Took[first.Name()] = time.Since(begin)
	for _, n := range c.Nodes()[1:] {
		token, err := first.Token(ctx, n.Role)
		if err != nil {
			return fmt.Errorf("a token for %s: %w", n.Name(), err)
		}
		if err := c.Join(ctx, n, first, token); err != nil {
			return err
		}
	}
	return c.WaitReady(ctx)
}

// Join starts a node that joins through a server, waits until it is Ready and a voter, and keeps in Took how long that took.
func (c *Cluster) Join(ctx context.Context, n *Node, via *Server, token string) error {
	n.JoinThrough(via.URL(), token)
	begin := time.Now()
	if err := n.Run(ctx); err != nil {
		return err
	}
	err := testbed.Wait(ctx, n.Name()+" to join", func(ctx context.Context) error {
		if err := c.joined(ctx, n, via); err != nil {
			return errors.Join(err, n.ended(ctx))
		}
		return nil
	})
	c.Took[n.Name()] = time.Since(begin)
	return err
}

func (c *Cluster) joined(ctx context.Context, n *Node, via *Server) error {
	if n.hasKubelet() {
		if err := via.NodesReady(ctx, n.Name()); err != nil {
			return err
		}
	}
	if !n.hasDatastore() {
		return nil
	}
	members, err := via.Members(ctx)
	if err != nil {
		return err
	}
	if m, ok := members[n.Name()]; !ok || m.Learner {
		return fmt.Errorf("%s is no voter: %+v", n.Name(), members)
	}
	return nil
}

func (n *Node) hasDatastore() bool {
	return n.Role == ServerRole && !slices.Contains(n.Flags, "--disable-etcd") && !slices.Contains(n.Flags, "--datastore-endpoint")
}

func (n *Node) hasKubelet() bool { return !slices.Contains(n.Flags, "--disable-agent") }

// WaitReady waits until the cluster is serving and all components of all nodes say to be ready. A new leader of the controllers
// may have to wait until the lease of the last one is over.
func (c *Cluster) WaitReady(ctx context.Context) error {
	return c.wait(ctx, "the whole cluster to be ready", func(ctx context.Context) error {
		for _, n := range c.started() {
			st, err := n.Status(ctx)
			if err == nil {
				err = st.Problems()
			}
			if err != nil {
				return fmt.Errorf("%s: %w", n.Name(), err)
			}
		}
		return c.serving(ctx)
	})
}

// WaitServing waits until all nodes are Ready and exactly the servers vote in the datastore, on every server's own word.
func (c *Cluster) WaitServing(ctx context.Context) error {
	return c.wait(ctx, "all nodes and servers to be there", c.serving)
}

// wait gives up when Kedge ends somewhere.
func (c *Cluster) wait(ctx context.Context, what string, cond func(context.Context) error) error {
	return testbed.Wait(ctx, what, func(ctx context.Context) error {
		err := cond(ctx)
		if err == nil {
			return nil
		}
		for _, n := range c.started() {
			err = errors.Join(err, n.ended(ctx))
		}
		return err
	})
}

// started are the nodes that were ever started.
func (c *Cluster) started() []*Node {
	return slices.DeleteFunc(c.Nodes(), func(n *Node) bool { return n.proc == nil })
}

func (c *Cluster) serving(ctx context.Context) error {
	var names, voters []string
	for _, n := range c.started() {
		if n.hasKubelet() {
			names = append(names, n.Name())
		}
		if n.hasDatastore() {
			voters = append(voters, n.Name())
		}
	}
	for _, s := range c.Servers {
		if s.proc == nil {
			continue
		}
		if err := errors.Join(s.NodesReady(ctx, names...), s.Voters(ctx, voters...)); err != nil {
			return fmt.Errorf("says %s: %w", s.Name(), err)
		}
	}
	return nil
}

// Leader is the server whose member leads the datastore.
func (c *Cluster) Leader(ctx context.Context) (*Server, error) {
	var leader *Server
	err := testbed.Wait(ctx, "a leader of the datastore", func(ctx context.Context) error {
		var errs []error
		for _, s := range c.Servers {
			leads, err := s.LeadsDatastore(ctx)
			if leads {
				leader = s
				return nil
			}
			errs = append(errs, err)
		}
		return errors.Join(append(errs, errors.New("nobody says to be it"))...)
	})
	return leader, err
}

// Repair undoes what a test did to the machines that were ever started, power, network and frozen or killed processes, and
// waits until all is ready.
func (c *Cluster) Repair(ctx context.Context) error {
	if err := c.Bed.Heal(ctx); err != nil {
		return err
	}
	for _, n := range c.started() {
		state, err := n.State(ctx)
		if err != nil {
			return err
		}
		if state == "frozen" {
			if err := n.Thaw(ctx); err != nil {
				return err
			}
		}
		if state != "dead" {
			if _, err := n.Shell(ctx, "pkill -CONT -f kedge || true"); err != nil {
				return err
			}
		}
		if err := n.Restart(ctx); err != nil {
			return err
		}
	}
	return c.WaitReady(ctx)
}
