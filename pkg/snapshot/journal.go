// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/renameio/v2"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/datastore"
)

// journal says what is to be done after the point of no return. It is a file in the data directory; while it is there in phaseSwap, the
// directories may be in the middle of being exchanged, and Resume goes on.
type journal struct {
	Snapshot string `json:"snapshot"`
	Stamp    string `json:"stamp"` // in the names of what is moved aside
	Phase    string `json:"phase"`
	EtcdDir  string `json:"etcdDir"`
	PKIDir   string `json:"pkiDir"`
	// Membership goes to cluster.json.
	Membership json.RawMessage `json:"membership"`
	Pending    Pending         `json:"pending"`
}

// Pending is what the restored server does when its API answers.
type Pending struct {
	Revision     int64    `json:"revision"`         // the last one of the snapshot: what is older was written by the former servers
	Forget       []string `json:"forget,omitempty"` // servers that do not come back
	ForgetOthers bool     `json:"forgetOthers,omitempty"`
}

const (
	phaseSwap    = "swap"    // put the new directories in their place
	phasePending = "pending" // Pending is left, for the first start
)

func journalFile(dataDir string) string { return filepath.Join(dataDir, "restore.json") }

func newJournal(s Settings, m *Metadata, o RestoreOptions) (*journal, error) {
	known, err := json.MarshalIndent(membership{Cluster: m.Settings, Joined: true}, "", "  ")
	j := &journal{Membership: known, Snapshot: m.Name, Phase: phaseSwap, EtcdDir: filepath.Clean(s.EtcdDir), PKIDir: filepath.Clean(s.PKIDir),
		Pending: Pending{Revision: m.Data.Revision, Forget: o.Forget, ForgetOthers: o.ForgetOthers}}
	now := time.Now().UTC().Format("20060102T150405Z")
	j.Stamp = now
	for n := 2; exists(j.formerData()) || exists(j.formerKeys()); n++ {
		j.Stamp = fmt.Sprintf("%s-%d", now, n)
	}
	return j, err
}

// membership is what agent.Recall reads: that this machine is part of the cluster, and what all nodes agree on.
type membership struct {
	Cluster config.Cluster `json:"cluster"`
	Joined  bool           `json:"joined"` // without its data it must not make a cluster of its own
}

func (j *journal) newData() string    { return j.EtcdDir + ".restore" }
func (j *journal) newKeys() string    { return j.PKIDir + ".restore" }
func (j *journal) formerData() string { return j.EtcdDir + ".stale-" + j.Stamp }
func (j *journal) formerKeys() string { return j.PKIDir + ".stale-" + j.Stamp }
func (j *journal) copyFile() string   { return j.EtcdDir + ".restore.db" + temporary }

// leftovers are what a restore that did not come to its point of no return may have left.
func (j *journal) leftovers() []string {
	return []string{j.copyFile(), j.newData(), j.newData() + temporary, j.newKeys(), j.newKeys() + temporary}
}

func (j *journal) write(dataDir string) error {
	b, err := json.MarshalIndent(j, "", "  ")
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(journalFile(dataDir), append(b, '\n'), 0o600); err != nil {
		return err
	}
	return syncPath(dataDir)
}

func readJournal(dataDir string) (*journal, error) {
	b, err := os.ReadFile(journalFile(dataDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var j journal
	if err := json.Unmarshal(b, &j); err != nil {
		return nil, fmt.Errorf("%s: %w", journalFile(dataDir), err)
	}
	return &j, nil
}

// Interrupted says whether there is something for Resume or Tidy to do.
func Interrupted(s Settings) bool {
	j := &journal{EtcdDir: filepath.Clean(s.EtcdDir), PKIDir: filepath.Clean(s.PKIDir)}
	return exists(journalFile(s.DataDir)) || slices.ContainsFunc(j.leftovers(), exists)
}

// Resume completes a restore that came to its point of no return and was interrupted. It returns the snapshot's name, empty if there was
// nothing to do. Kedge must not run; a server calls it before it looks at its data.
func Resume(dataDir string) (string, error) {
	j, err := readJournal(dataDir)
	if err != nil || j == nil || j.Phase != phaseSwap {
		return "", err
	}
	if err := datastore.Replace(j.EtcdDir, j.newData(), j.formerData()); err != nil {
		return "", err
	}
	if exists(j.newKeys()) {
		if err := os.Rename(j.PKIDir, j.formerKeys()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("move the former keys aside: %w", err)
		}
		if err := errors.Join(os.Rename(j.newKeys(), j.PKIDir), syncPath(filepath.Dir(j.PKIDir))); err != nil {
			return "", err
		}
	}
	if err := renameio.WriteFile(filepath.Join(dataDir, "cluster.json"), append(j.Membership, '\n'), 0o600); err != nil {
		return "", err
	}
	if err := removeAll(j.leftovers()...); err != nil {
		return "", err
	}
	j.Phase = phasePending
	return j.Snapshot, j.write(dataDir)
}

// Unfinished is what a restored server still has to do; nil if there is nothing.
func Unfinished(dataDir string) (*Pending, error) {
	j, err := readJournal(dataDir)
	if err != nil || j == nil || j.Phase != phasePending {
		return nil, err
	}
	return &j.Pending, nil
}

// Finish notes that it has been done.
func Finish(dataDir string) error {
	if err := os.Remove(journalFile(dataDir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncPath(dataDir)
}

// Tidy removes what a restore has left that was interrupted before its point of no return. Kedge calls it at its start.
func Tidy(s Settings) error {
	if j, err := readJournal(s.DataDir); err != nil || j != nil {
		return err
	}
	j := &journal{EtcdDir: filepath.Clean(s.EtcdDir), PKIDir: filepath.Clean(s.PKIDir)}
	return removeAll(j.leftovers()...)
}
