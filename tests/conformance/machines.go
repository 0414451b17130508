// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/registry"
	"github.com/kedge-io/kedge/tests/testbed"
)

// size of the cluster. Tests that spread pods need two nodes; a third shows what two hide.
const size = 3

// machines are a cluster on a bed, and the registry from which it pulls.
type machines struct {
	bed        *testbed.Bed
	registry   *registry.Server
	kubeconfig string // for this host
}

// start starts the cluster. Images are pulled rather than imported, because some tests insist on it.
func start(ctx context.Context, o options) (_ *machines, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	m := &machines{kubeconfig: filepath.Join(o.results, "kubeconfig.yaml")}
	if m.bed, err = testbed.Open(ctx, "conformance"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close(true))
		}
	}()
	archives, err := filepath.Glob(filepath.Join(o.kit, "images", "*.tar"))
	if err != nil {
		return nil, err
	}
	if m.registry, err = registry.Start(m.bed.Gateway()+":0", registry.Config{Archives: archives}); err != nil {
		return nil, err
	}
	c, err := cluster.New(ctx, m.bed, cluster.Spec{Servers: o.servers, Agents: size - o.servers, Options: cluster.Options{
		Flags:      o.flags,
		Registries: fmt.Sprintf("mirrors: {registry.k8s.io: {endpoint: [%q]}}\n", "http://"+m.registry.Addr()),
	}})
	if err != nil {
		return nil, err
	}
	fmt.Printf("start %d servers and %d agents\n", o.servers, size-o.servers)
	if err := c.Start(ctx); err != nil {
		return nil, err
	}
	credentials, err := c.Servers[0].ReadFile(cluster.Kubeconfig)
	if err != nil {
		return nil, err
	}
	const inside = "https://127.0.0.1:6443"
	if !bytes.Contains(credentials, []byte(inside)) {
		return nil, fmt.Errorf("%s does not mention %s", cluster.Kubeconfig, inside)
	}
	return m, os.WriteFile(m.kubeconfig, bytes.ReplaceAll(credentials, []byte(inside), []byte(c.Servers[0].URL())), 0o600)
}

// close removes the machines. If the run failed it keeps their logs and says where.
func (m *machines) close(failed bool) error {
	if failed {
		fmt.Fprintln(os.Stderr, "logs of the machines are kept in", m.bed.KeepLogs())
	}
	err := m.bed.Close()
	if m.registry != nil {
		err = errors.Join(err, m.registry.Close())
	}
	return err
}
