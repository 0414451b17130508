// SPDX-License-Identifier: Apache-2.0

package uninstall

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/kedge-io/kedge/pkg/embed"
	"github.com/kedge-io/kedge/pkg/node"
)

func (p Places) node() node.Config {
	return node.Config{Name: p.NodeName, RunDir: p.RunDir, DataDir: p.DataDir, RootDir: p.KubeletRootDir, ClusterCIDR: p.ClusterCIDR, ClusterDNS: p.ClusterDNS}
}

func findNetwork(p Places) ([]Item, error) {
	remains, err := node.NetworkRemains(p.node())
	if err != nil {
		return nil, fmt.Errorf("look for rules, links and routes: %w", err)
	}
	var items []Item
	for _, r := range remains {
		items = append(items, Item{Kind: Kind(r.Kind), Name: r.Name})
	}
	return items, nil
}

// cleanNetwork removes rules, sets, links, routes and addresses. It needs the programs that Kedge brings along: the staged ones may be gone
// after an earlier run that was interrupted.
func (u *run) cleanNetwork(ctx context.Context) (err error) {
	found, err := findNetwork(u.places)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, node.RestoreSysctls(u.places.RunDir, func(text string) { u.say("%s", text) }))
	}()
	if len(found) == 0 {
		return nil
	}
	dir, err := os.MkdirTemp(filepath.Dir(stagingDirs), filepath.Base(stagingDirs))
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	stage, err := embed.Stage(ctx, dir, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	path := os.Getenv("PATH")
	defer os.Setenv("PATH", path) //nolint:errcheck // it was accepted before
	if err := os.Setenv("PATH", stage.Dir+":"+path); err != nil {
		return err
	}
	if err := node.CleanupNetwork(ctx, u.places.node()); err != nil {
		return err
	}
	u.say("%d rules, links, routes and the like removed from the network", len(found))
	return nil
}
