// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/kedge-io/kedge/pkg/registries"
)

// registriesInterval is how soon a change of registries.yaml takes effect at the latest.
const registriesInterval = 5 * time.Second

// certsDir is containerd's registry configuration, which it reads at each pull.
func (m *Machine) certsDir() string { return filepath.Join(m.cfg.RunDir, "registries") }

// writeRegistries brings registries.yaml into the form that containerd reads. It returns the credentials, which are part of
// containerd's own configuration.
func (m *Machine) writeRegistries() (auth string, err error) {
	cfg, err := registries.Load(m.cfg.PrivateRegistry)
	if err != nil {
		return "", err
	}
	if _, err := cfg.Write(m.certsDir()); err != nil {
		return "", err
	}
	return string(cfg.AuthTOML()), nil
}

// watchRegistries takes up changes of registries.yaml while the server runs. A file that cannot be read changes nothing.
func (m *Machine) watchRegistries(ctx context.Context) {
	version := fileVersion(m.cfg.PrivateRegistry)
	auth := ""
	if cfg, err := registries.Load(m.cfg.PrivateRegistry); err == nil {
		auth = string(cfg.AuthTOML())
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(registriesInterval):
		}
		now := fileVersion(m.cfg.PrivateRegistry)
		if now == version {
			continue
		}
		version = now
		log := m.log.With("component", "registries", "file", m.cfg.PrivateRegistry)
		newAuth, err := m.writeRegistries()
		if err != nil {
			log.Error("change not taken over, the former configuration stays in use", "error", err)
			continue
		}
		log.Info("change taken over")
		if newAuth != auth {
			auth = newAuth
			err = m.supervisor.Restart(Containerd, "it reads credentials of registries only when it starts")
		}
		if err != nil {
			log.Error("restart of containerd", "error", err)
		}
	}
}

// fileVersion changes when the file does.
func fileVersion(file string) string {
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return ""
	} else if err != nil {
		return err.Error()
	}
	return info.ModTime().String() + " " + info.Mode().String()
}
