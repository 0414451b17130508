// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// fleet is a cluster of one side, on several machines that are ready to start: of Kedge as many as fleetSpec says, of stock a
// server and a machine with the parts of a node.
type fleet struct {
	first   side
	joiners []*joiner // in the order in which they join
	agent   *host
	node    *testbed.Machine // the agent's
	servers []*host          // Kedge's
	kedge   *cluster.Cluster // nil on the stock side
}

// fleetSpec says what a fleet is made of.
type fleetSpec struct {
	more    []cluster.Role // Kedge's machines besides the first server, in the order in which they join, one of them an agent
	images  []string       // archives for all machines, besides that of the first pod
	machine []testbed.Option
}

// highlyAvailable is a cluster that may lose a server. The agent joins while there is one server, as on the stock side.
func highlyAvailable(opts ...testbed.Option) fleetSpec {
	return fleetSpec{more: []cluster.Role{cluster.AgentRole, cluster.ServerRole, cluster.ServerRole}, machine: opts}
}

// operatorToken is as an operator gives it to all machines of a scripted installation.
const operatorToken = "token-of-the-benchmark"

func newFleet(ctx context.Context, o options, bed *testbed.Bed, name string, spec fleetSpec) (*fleet, error) {
	if name == "stock" {
		return newStockFleet(ctx, o, bed, spec)
	}
	return newKedgeFleet(ctx, o, bed, spec)
}

func newStockFleet(ctx context.Context, o options, bed *testbed.Bed, spec fleetSpec) (*fleet, error) {
	opts := slices.Clone(spec.machine)
	for _, archive := range spec.images {
		opts = append(opts, testbed.Bind(archive, path.Join(imagesDir, filepath.Base(archive))))
	}
	archive, err := podArchive(o)
	if err != nil {
		return nil, err
	}
	if err := warm(o.stock, o.units); err != nil {
		return nil, err
	}
	server, err := newStock(ctx, o, bed, archive, opts...)
	if err != nil {
		return nil, err
	}
	programs, err := ownPrograms(o, "stocknode", o.stock, nodePrograms()...)
	if err != nil {
		return nil, err
	}
	node, err := server.newNode(ctx, o, bed, programs, opts...)
	if err != nil {
		return nil, err
	}
	h, err := newHost(bed, node.m)
	if err != nil {
		return nil, err
	}
	return &fleet{first: server, agent: h, node: node.m, joiners: []*joiner{{host: h, figure: "join agent", start: node.start}}}, nil
}

func newKedgeFleet(ctx context.Context, o options, bed *testbed.Bed, spec fleetSpec) (*fleet, error) {
	flags := kedgeFlags(o)
	c, err := cluster.New(ctx, bed, cluster.Spec{Options: cluster.Options{Machine: spec.machine, Images: spec.images, Flags: flags}, AgentFlags: flags})
	if err != nil {
		return nil, err
	}
	f := &fleet{kedge: c}
	for _, role := range append([]cluster.Role{cluster.ServerRole}, spec.more...) {
		n, err := addNode(ctx, o, c, role)
		if err != nil {
			return nil, err
		}
		h, err := newHost(bed, n.Machine)
		if err != nil {
			return nil, err
		}
		if role == cluster.AgentRole {
			f.agent, f.node = h, n.Machine
		} else {
			f.servers = append(f.servers, h)
		}
		if f.first == nil {
			n.Flags = append(n.Flags, "--token", operatorToken)
			f.first = kedge{c.Servers[0]}
			continue
		}
		n.JoinThrough(c.Servers[0].URL(), operatorToken)
		f.joiners = append(f.joiners, &joiner{host: h, figure: "join " + string(role), votes: role == cluster.ServerRole,
			start: func(ctx context.Context) (*testbed.Process, error) {
				err := n.Run(ctx)
				return n.Process(), err
			}})
	}
	return f, nil
}

// addNode makes a machine with a binary of its own.
func addNode(ctx context.Context, o options, c *cluster.Cluster, role cluster.Role) (*cluster.Node, error) {
	dir, err := ownPrograms(o, fmt.Sprintf("kedge%d", len(c.Nodes())), filepath.Dir(o.kedge), filepath.Base(o.kedge))
	if err != nil {
		return nil, err
	}
	if err := os.Setenv("KEDGE_BIN", filepath.Join(dir, filepath.Base(o.kedge))); err != nil {
		return nil, err
	}
	if role == cluster.AgentRole {
		return c.AddAgent(ctx)
	}
	s, err := c.AddServer(ctx)
	if err != nil {
		return nil, err
	}
	return s.Node, nil
}

// nodePrograms are those of the stock side that a machine without a control plane needs.
func nodePrograms() []string {
	return []string{"kubelet", "kube-proxy", "flanneld", "containerd", "containerd-shim-runc-v2", "runc", "ctr", "cni", "tools"}
}

// ownPrograms copies files and directories, so that a machine runs programs that no other machine runs: on this host they
// would share the memory of a program's text, and each would only count for a part of it.
func ownPrograms(o options, machine, from string, names ...string) (string, error) {
	dir := filepath.Join(machinesDir(o), machine)
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	for _, name := range names {
		if err := copyTree(filepath.Join(from, name), filepath.Join(dir, name)); err != nil {
			return "", fmt.Errorf("programs for the machine %s: %w", machine, err)
		}
	}
	return dir, warm(dir)
}

func machinesDir(o options) string { return filepath.Join(filepath.Dir(o.units), "machines") }

// copyTree copies a directory, or a file.
func copyTree(from, to string) error {
	st, err := os.Stat(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if st.IsDir() {
		return os.CopyFS(to, os.DirFS(from))
	}
	text, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, text, st.Mode().Perm())
}

// betweenJoins is for what still has to be done after a start.
const betweenJoins = 5 * time.Second

// start starts the first server and lets the other machines join, one after the other.
func (f *fleet) start(ctx context.Context, bed *testbed.Bed, rec *recorder) (kubernetes.Interface, error) {
	h, err := newHost(bed, f.first.machine())
	if err != nil {
		return nil, err
	}
	c, err := startFirst(ctx, f.first, h)
	if err != nil {
		return nil, fmt.Errorf("start of the first server: %w", err)
	}
	for _, j := range f.joiners {
		if err := pause(ctx, betweenJoins); err != nil {
			return nil, err
		}
		if err := j.join(ctx, c, rec); err != nil {
			return nil, fmt.Errorf("%s joins: %w", j.host.name, err)
		}
	}
	return c, pause(ctx, betweenJoins)
}

// joins measures how long machines take to join, and how long writers wait when a server dies.
func joins(ctx context.Context, o options, bed *testbed.Bed, rec *recorder) error {
	f, err := newFleet(ctx, o, bed, rec.side, highlyAvailable())
	defer os.RemoveAll(machinesDir(o))
	if err != nil {
		return err
	}
	c, err := f.start(ctx, bed, rec)
	if err != nil || f.kedge == nil {
		return err
	}
	return failOvers(ctx, o, f, c, rec)
}

// idleClusters measures what the machines of a cluster use that has nothing to do.
func idleClusters(ctx context.Context, o options, bed *testbed.Bed, rec *recorder) error {
	f, err := newFleet(ctx, o, bed, rec.side, highlyAvailable(testbed.Disk(diskSize)))
	defer os.RemoveAll(machinesDir(o))
	if err != nil {
		return err
	}
	if _, err := f.start(ctx, bed, &recorder{results: &results{}}); err != nil { // its times are those of other disks
		return err
	}
	readings, err := observeIdle(ctx, o, append([]*host{f.agent}, f.servers...)...)
	if err != nil {
		return err
	}
	agent, servers := readings[0], readings[1:]
	rec.reading("agent", agent)
	for _, s := range servers {
		rec.reading("server", s)
	}
	if len(servers) > 0 {
		rec.reading("servers", together(servers))
	}
	rec.behind("agent", agent)
	for i, s := range servers {
		rec.behind("server "+f.servers[i].name, s)
	}
	return nil
}

// together is the sum of readings. Of the memory it has only the sum, without what stands behind.
func together(readings []reading) reading {
	sum := reading{memory: []Memory{{Name: "all"}}}
	for _, r := range readings {
		sum.use = sum.use.plus(r.use)
		sum.memory[0].Processes += r.memory[0].Processes
		sum.memory[0].PSS += r.memory[0].PSS
		sum.memory[0].Anonymous += r.memory[0].Anonymous
		if r.syncs != nil && sum.syncs == nil {
			sum.syncs = maps.Clone(r.syncs)
			continue
		}
		for call, n := range r.syncs {
			sum.syncs[call] += n
		}
	}
	return sum
}
