// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	// The plugins that a Kubernetes node uses, one by one: containerd's own list also links btrfs, zfs, devmapper, blockfile
	// and erofs snapshotters and an OpenTelemetry exporter.
	_ "github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/cmd/containerd/command"
	_ "github.com/containerd/containerd/v2/core/metrics/cgroups"
	_ "github.com/containerd/containerd/v2/core/metrics/cgroups/v2"
	_ "github.com/containerd/containerd/v2/core/runtime/v2"
	_ "github.com/containerd/containerd/v2/plugins/content/local/plugin"
	_ "github.com/containerd/containerd/v2/plugins/cri"
	_ "github.com/containerd/containerd/v2/plugins/cri/images"
	_ "github.com/containerd/containerd/v2/plugins/cri/runtime"
	_ "github.com/containerd/containerd/v2/plugins/diff/walking/plugin"
	_ "github.com/containerd/containerd/v2/plugins/events"
	_ "github.com/containerd/containerd/v2/plugins/gc"
	_ "github.com/containerd/containerd/v2/plugins/leases"
	_ "github.com/containerd/containerd/v2/plugins/metadata"
	_ "github.com/containerd/containerd/v2/plugins/mount"
	_ "github.com/containerd/containerd/v2/plugins/nri"
	_ "github.com/containerd/containerd/v2/plugins/restart"
	_ "github.com/containerd/containerd/v2/plugins/sandbox"
	_ "github.com/containerd/containerd/v2/plugins/server/grpc"
	_ "github.com/containerd/containerd/v2/plugins/server/metrics"
	_ "github.com/containerd/containerd/v2/plugins/server/ttrpc"
	_ "github.com/containerd/containerd/v2/plugins/services/containers"
	_ "github.com/containerd/containerd/v2/plugins/services/content"
	_ "github.com/containerd/containerd/v2/plugins/services/diff"
	_ "github.com/containerd/containerd/v2/plugins/services/events"
	_ "github.com/containerd/containerd/v2/plugins/services/healthcheck"
	_ "github.com/containerd/containerd/v2/plugins/services/images"
	_ "github.com/containerd/containerd/v2/plugins/services/introspection"
	_ "github.com/containerd/containerd/v2/plugins/services/leases"
	_ "github.com/containerd/containerd/v2/plugins/services/mounts"
	_ "github.com/containerd/containerd/v2/plugins/services/namespaces"
	_ "github.com/containerd/containerd/v2/plugins/services/opt"
	_ "github.com/containerd/containerd/v2/plugins/services/sandbox"
	_ "github.com/containerd/containerd/v2/plugins/services/snapshots"
	_ "github.com/containerd/containerd/v2/plugins/services/streaming"
	_ "github.com/containerd/containerd/v2/plugins/services/tasks"
	_ "github.com/containerd/containerd/v2/plugins/services/transfer"
	_ "github.com/containerd/containerd/v2/plugins/services/version"
	_ "github.com/containerd/containerd/v2/plugins/services/warning"
	_ "github.com/containerd/containerd/v2/plugins/snapshots/native/plugin"
	_ "github.com/containerd/containerd/v2/plugins/snapshots/overlay/plugin"
	_ "github.com/containerd/containerd/v2/plugins/streaming"
	_ "github.com/containerd/containerd/v2/plugins/transfer"

	"github.com/kedge-io/kedge/pkg/images"
	"github.com/kedge-io/kedge/pkg/logging"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// ComponentContainerd is the name in `kedge status`.
const ComponentContainerd = "containerd"

// ContainerdConfig is the configuration of the [containerd] process.
type ContainerdConfig struct {
	Logging logging.Config `json:"logging"`
	// Root keeps images and snapshots, State sockets and mounts of running containers.
	Root  string `json:"root"`
	State string `json:"state"`
	// Runc and Shim are programs; CNIBinDir holds the CNI plugins.
	Runc        string `json:"runc"`
	Shim        string `json:"shim"`
	CNIBinDir   string `json:"cniBinDir"`
	CNIConfDir  string `json:"cniConfDir"`
	Snapshotter string `json:"snapshotter"`
	// CertsDir is containerd's registry configuration directory (hosts.toml files).
	CertsDir string `json:"certsDir"`
	// PauseImage is the name of the sandbox image; PauseArchive, if not empty, is imported to provide it.
	PauseImage   string `json:"pauseImage"`
	PauseArchive string `json:"pauseArchive,omitempty"`
	// ImagesDir holds image archives that are imported once each, by digest.
	ImagesDir string `json:"imagesDir"`
	// SystemdCgroup: systemd manages the cgroups (cgroup v2 with systemd as init), not containerd.
	SystemdCgroup bool `json:"systemdCgroup"`
	// RestrictOOMScoreAdj: the machine does not let root lower oom_score_adj (no CAP_SYS_RESOURCE).
	RestrictOOMScoreAdj bool `json:"restrictOOMScoreAdj"`
	// RegistryConfig is a fragment of TOML with credentials, part of the CRI images plugin's configuration; may be empty.
	RegistryConfig string `json:"registryConfig,omitempty"`
}

// Socket is where containerd answers CRI and its own API.
func (c ContainerdConfig) Socket() string { return filepath.Join(c.State, "containerd.sock") }

//go:embed containerd.toml.tmpl
var containerdTemplate string

// RunContainerd starts containerd, imports the images that belong to this node and blocks until ctx ends or containerd fails.
func RunContainerd(ctx context.Context, cfg ContainerdConfig, child *supervise.Child, log *slog.Logger) error {
	file := filepath.Join(cfg.Root, "config.toml")
	if err := writeContainerdConfig(cfg, file); err != nil {
		return err
	}
	child.Report(ComponentContainerd, supervise.Running, "")
	ended := make(chan error, 1)
	// Its command traps SIGTERM itself and then returns; ctx ends with the same signal.
	go func() {
		ended <- command.App().Run(context.WithoutCancel(ctx), []string{"containerd", "--config", file})
	}()

	ready, cancel := context.WithCancel(ctx)
	defer cancel()
	imported := make(chan error, 1)
	go func() { imported <- prepareImages(ready, cfg, child, log) }()
	for {
		select {
		case err := <-ended:
			if err == nil && ctx.Err() == nil {
				err = errors.New("containerd stopped by itself")
			}
			return err
		case err := <-imported:
			if err != nil && ctx.Err() == nil {
				return err
			}
			imported = nil
		}
	}
}

func writeContainerdConfig(cfg ContainerdConfig, file string) error {
	text, err := renderContainerdConfig(cfg)
	if err != nil {
		return err
	}
	for _, dir := range []string{cfg.Root, cfg.State, cfg.CNIConfDir} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	return os.WriteFile(file, []byte(text), 0o600)
}

func renderContainerdConfig(cfg ContainerdConfig) (string, error) {
	t, err := template.New("config.toml").Parse(containerdTemplate)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	if err := t.Execute(&b, cfg); err != nil {
		return "", fmt.Errorf("containerd configuration: %w", err)
	}
	return b.String(), nil
}

// prepareImages waits for containerd, provides the pause image, reports ready to run pods and imports archives.
func prepareImages(ctx context.Context, cfg ContainerdConfig, child *supervise.Child, log *slog.Logger) error {
	client, err := dialContainerd(ctx, cfg.Socket())
	if err != nil {
		return err
	}
	defer client.Close()
	im := images.Store{Client: client, Snapshotter: cfg.Snapshotter, Log: log}
	if cfg.PauseArchive != "" {
		if err := im.Ensure(ctx, cfg.PauseImage, cfg.PauseArchive); err != nil {
			return fmt.Errorf("pause image: %w", err)
		}
	}
	err = im.ImportDir(ctx, cfg.ImagesDir, filepath.Join(cfg.Root, "imported.json"), func(progress string) {
		child.Report(ComponentContainerd, supervise.Running, progress)
	})
	reason := ""
	if err != nil {
		// A bad archive must not keep the node down: say so and go on.
		reason = err.Error()
		log.Error("import of image archives", "error", err)
	}
	child.Report(ComponentContainerd, supervise.Ready, reason)
	return nil
}

// dialContainerd waits until containerd answers.
func dialContainerd(ctx context.Context, socket string) (client *containerd.Client, err error) {
	err = supervise.Poll(ctx, func() error {
		if _, err := os.Stat(socket); err != nil {
			return err
		}
		c, err := containerd.New(socket, containerd.WithDefaultNamespace("k8s.io"), containerd.WithTimeout(time.Second))
		if err != nil {
			return err
		}
		if serving, err := c.IsServing(ctx); err != nil || !serving {
			c.Close()
			return errors.Join(err, errors.New("containerd is not serving yet"))
		}
		client = c
		return nil
	})
	return client, err
}
