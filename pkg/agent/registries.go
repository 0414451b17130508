// SPDX-License-Identifier: Apache-2.0

package server

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
func (s *server) certsDir() string { return filepath.Join(s.cfg.RunDir, "registries") }

// writeRegistries brings registries.yaml into the form that containerd reads. It returns the credentials, which are part of
// containerd's own configuration.
func (s *server) writeRegistries() (auth string, err error) {
	cfg, err := registries.Load(s.cfg.PrivateRegistry)
	if err != nil {
		return "", err
	}
	if _, err := cfg.Write(s.certsDir()); err != nil {
		return "", err
	}
	return string(cfg.AuthTOML()), nil
}

// watchRegistries takes up changes of registries.yaml while the server runs. A file that cannot be read changes nothing.
func (s *server) watchRegistries(ctx context.Context) {
	version := fileVersion(s.cfg.PrivateRegistry)
	auth := ""
	if cfg, err := registries.Load(s.cfg.PrivateRegistry); err == nil {
		auth = string(cfg.AuthTOML())
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(registriesInterval):
		}
		now := fileVersion(s.cfg.PrivateRegistry)
		if now == version {
			continue
		}
		version = now
		log := s.log.With("component", "registries", "file", s.cfg.PrivateRegistry)
		newAuth, err := s.writeRegistries()
		if err != nil {
			log.Error("change not taken over, the former configuration stays in use", "error", err)
			continue
		}
		log.Info("change taken over")
		if newAuth != auth {
			auth = newAuth
			err = s.supervisor.Restart(containerd, "it reads credentials of registries only when it starts")
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
