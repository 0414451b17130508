// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/snapshot"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// SnapshotSettings are what snapshots of a server with this configuration are made with.
func SnapshotSettings(cfg *config.Config) snapshot.Settings {
	s := &server{cfg: cfg}
	return snapshot.SettingsOf(cfg, s.etcdSocket(), s.etcdDir(), s.peerURL())
}

// completeRestore finishes a restore that a power loss interrupted, before anything looks at the data.
func completeRestore(cfg *config.Config) (name string, err error) {
	settings := SnapshotSettings(cfg)
	if !snapshot.Interrupted(settings) {
		return "", nil
	}
	unlock, err := agent.Lock(cfg.RunDir)
	if err != nil {
		return "", err
	}
	defer unlock()
	if name, err = snapshot.Resume(cfg.DataDir); err != nil {
		return "", fmt.Errorf("a restore was interrupted and cannot be completed: %w", err)
	}
	return name, snapshot.Tidy(settings)
}

// snapshots tells the commands on this machine how snapshots are made here, and takes the scheduled ones.
func (s *server) snapshots(ctx context.Context) error {
	settings := SnapshotSettings(s.cfg)
	if err := settings.Announce(); err != nil {
		return fmt.Errorf("settings of snapshots: %w", err)
	}
	if settings.Member {
		snapshot.RunSchedule(ctx, settings, s.takeSnapshot, s.log.With("component", "snapshot"))
	}
	<-ctx.Done()
	return nil
}

// takeSnapshot takes a scheduled one.
func (s *server) takeSnapshot(ctx context.Context) error {
	t, err := s.runSnapshot(ctx, snapshot.Scheduled)
	if err != nil && t.Name != "" {
		// To take another one would not help the bucket, and displace older ones here.
		s.log.Error("not everything that belongs to a snapshot could be done; the next one tries again", "component", "snapshot", "name", t.Name, "error", err)
		return nil
	}
	return err
}

// runSnapshot does it in a process of its own: its memory is given back when it ends, and it cannot take anything along.
func (s *server) runSnapshot(ctx context.Context, trigger snapshot.Trigger) (*snapshot.Taken, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "snapshot", "save", "--trigger", string(trigger), "--run-dir", s.cfg.RunDir, "-o", "json")
	cmd.Args[0] = "kedge"
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	cmd.Env = slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "KEDGE_") || strings.HasPrefix(e, "NOTIFY_SOCKET=") })
	var out, problem bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problem
	err := cmd.Run()
	log := s.log.With("component", "snapshot")
	var t snapshot.Taken
	if json.Unmarshal(out.Bytes(), &t) == nil && t.Name != "" {
		log.Info("snapshot taken", "name", t.Name, "location", t.Location, "revision", t.Data.Revision, "bytes", t.Bytes, "copied", t.Copied, "pruned", len(t.Pruned), "took", t.Took)
		for _, remark := range t.Remarks {
			log.Warn("snapshot", "name", t.Name, "remark", remark)
		}
	}
	if text := strings.TrimSpace(problem.String()); err != nil && text != "" {
		err = errors.New(strings.TrimPrefix(text, "kedge: "))
	}
	return &t, err
}

// finishRestore takes servers out of a restored cluster that do not come back, as soon as its API answers. Then the restore is over.
func (s *server) finishRestore(ctx context.Context) error {
	pending, err := snapshot.Unfinished(s.cfg.DataDir)
	if err != nil || pending == nil {
		return err
	}
	said := ""
	_ = supervise.Poll(ctx, func() error { // ends with ctx
		err := s.forget(ctx, pending)
		if err != nil && err.Error() != said && ctx.Err() == nil {
			said = err.Error()
			s.log.Info("servers that do not come back are still part of the restored cluster", "component", "snapshot", "reason", err)
		}
		return err
	})
	return nil
}

func (s *server) forget(ctx context.Context, pending *snapshot.Pending) error {
	config, err := clientcmd.BuildConfigFromFlags("", s.pki.KubeconfigFile(pki.KedgeController))
	if err != nil {
		return err
	}
	config.Timeout = 30 * time.Second
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	api, err := join.NewAPI(config)
	if err != nil {
		return err
	}
	servers, err := authority.ListServers(ctx, client) // also to see that the control plane runs, which has its part of this, too
	if err != nil {
		return err
	}
	names := slices.Clone(pending.Forget)
	if pending.ForgetOthers {
		members, err := api.Members(ctx)
		if err != nil {
			return err
		}
		for name := range servers {
			// Who has joined since then is here to stay.
			if name != s.cfg.NodeName && !slices.ContainsFunc(members, func(m join.Member) bool { return m.Name == name }) {
				names = append(names, name)
			}
		}
	}
	remover := &authority.Remover{Client: client, API: api}
	for _, name := range names {
		if name == s.cfg.NodeName {
			continue
		}
		if err := remover.Remove(ctx, name, false); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		s.log.Info("a server that does not come back was taken out of the restored cluster", "component", "snapshot", "server", name)
	}
	return snapshot.Finish(s.cfg.DataDir)
}
