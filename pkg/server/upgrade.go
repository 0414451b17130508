// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"slices"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/snapshot"
)

// administrator gives a client with an administrator's rights, of this server's API server.
func (s *server) administrator() (kubernetes.Interface, error) {
	config, err := clientcmd.BuildConfigFromFlags("", s.cfg.WriteKubeconfig)
	if err != nil {
		return nil, err
	}
	config.Timeout = 15 * time.Second
	return kubernetes.NewForConfig(config)
}

// saveTimeout bounds a snapshot before an upgrade, and savedBefore is how many of this server's are kept.
const (
	saveTimeout = 5 * time.Minute
	savedBefore = 3
)

// saveDatastore takes a snapshot before an upgrade and says where it is.
func (s *server) saveDatastore(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, saveTimeout)
	defer cancel()
	taken, err := s.runSnapshot(ctx, snapshot.Upgrade)
	if err != nil && taken.Location == "" {
		return "", err
	} else if err != nil { // a bucket that does not answer is no reason
		s.log.Warn("snapshot before an upgrade", "component", "snapshot", "snapshot", taken.Location, "error", err)
	}
	// The schedule leaves them alone, and a version that fails may be tried often.
	dir := snapshot.Directory(s.cfg.Snapshots().Dir)
	entries, err := dir.List(ctx)
	if err == nil {
		old := slices.DeleteFunc(entries, func(e snapshot.Entry) bool {
			return e.Problem != "" || e.Trigger != snapshot.Upgrade || e.Node != s.cfg.NodeName
		})
		slices.SortFunc(old, func(a, b snapshot.Entry) int { return a.Created.Compare(b.Created) })
		for _, e := range old[:max(0, len(old)-savedBefore)] {
			if err = dir.Delete(ctx, e.Name); err != nil {
				break
			}
		}
	}
	if err != nil {
		s.log.Warn("snapshots of earlier upgrades are left", "component", "snapshot", "error", err)
	}
	return taken.Location, nil
}
