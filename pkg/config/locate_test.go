// SPDX-License-Identifier: Apache-2.0

package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestLocate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.yaml")
	text := "data-dir: /srv/file\nnode-name: from-file\nshutdown-grace-period: 2m\nnode-ip: [not an address]\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args, env []string
		data      string
		role      Role
		fails     string
	}{
		"file":            {[]string{"server", "--config", file}, nil, "/srv/file", RoleServer, ""},
		"flag":            {[]string{"agent", "--config", file, "--server", "nonsense", "--data-dir", "/srv/flag"}, nil, "/srv/flag", RoleAgent, ""},
		"variable":        {[]string{"server", "--config", file}, []string{"KEDGE_DATA_DIR=/srv/env"}, "/srv/env", RoleServer, ""},
		"bad value":       {[]string{"server", "--config", file, "--data-dir", "relative"}, nil, DefaultDataDir, RoleServer, "relative"},
		"later version's": {[]string{"server", "--config", file, "--from-the-future"}, []string{"KEDGE_CONFIG=" + file}, "/srv/file", RoleServer, "from-the-future"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Locate(c.args, c.env)
			if got == nil || (err == nil) != (c.fails == "") || err != nil && !strings.Contains(err.Error(), c.fails) {
				t.Fatal(err)
			}
			if got.DataDir != c.data || got.Role != c.role || got.NodeName != "from-file" || got.RunDir != DefaultRunDir ||
				got.ShutdownGracePeriod != 2*time.Minute || got.ClusterDNS.String() != "10.43.0.10" && c.role == RoleServer {
				t.Errorf("%+v", got)
			}
		})
	}
	if got, err := Locate(nil, nil); err != nil || got.DataDir != DefaultDataDir || got.NodeName == "" {
		t.Errorf("%+v, %v", got, err)
	}
}
