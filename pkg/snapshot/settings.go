// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"

	"github.com/kedge-io/kedge/pkg/config"
)

// Settings are what snapshots of a server are made with. There is nothing secret in them.
type Settings struct {
	Node      string          `json:"node"`
	DataDir   string          `json:"dataDir"`
	RunDir    string          `json:"runDir"`
	PKIDir    string          `json:"pkiDir"`
	EtcdDir   string          `json:"etcdDir"`
	Socket    string          `json:"socket"`  // of the datastore
	PeerURL   string          `json:"peerURL"` // of this server's member
	Cluster   config.Cluster  `json:"cluster"`
	Snapshots config.Snapshot `json:"snapshots"`
	Member    bool            `json:"member"` // a datastore member runs here
	// ElsewhereWAL is where etcd's write-ahead log is, if an etcd-arg says so.
	ElsewhereWAL string `json:"elsewhereWAL,omitempty"`
}

// SettingsOf takes them from the configuration.
func SettingsOf(c *config.Config, socket, etcdDir, peerURL string) Settings {
	wal, _ := c.EtcdArgs.Get("wal-dir")
	return Settings{ElsewhereWAL: wal, Node: c.NodeName, DataDir: c.DataDir, RunDir: c.RunDir, PKIDir: c.PKIDir(), EtcdDir: etcdDir, Socket: socket, PeerURL: peerURL,
		Cluster: c.Cluster, Snapshots: c.Snapshots(), Member: c.HasEtcd()}
}

func settingsFile(runDir string) string { return filepath.Join(runDir, "snapshot.json") }

// Announce tells the commands on this machine, by a file in the run directory, what its server goes by.
func (s Settings) Announce() error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return renameio.WriteFile(settingsFile(s.RunDir), b, 0o600)
}

// Announced reads what the server on this machine goes by; nil if none has run since the machine was switched on.
func Announced(runDir string) (*Settings, error) {
	b, err := os.ReadFile(settingsFile(runDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var s Settings
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("%s: %w; remove it, the server writes it when it starts", settingsFile(runDir), err)
	}
	return &s, nil
}
