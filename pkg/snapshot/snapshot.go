// SPDX-License-Identifier: Apache-2.0

// Package snapshot saves a cluster and brings it back. A snapshot is one file, NAME.kedge: etcd's own snapshot of the datastore, what it
// is (cluster, revision, digest, count of keys, members, versions), and, encrypted to a recovery key, the keys of the cluster that a
// restore on new hardware needs.
//
// Save writes one, Open and Check read one, Catalogue lists and prunes a directory or a bucket full of them, Restore puts one in the
// place of a server's data. Format and rules are in docs/decisions/snapshots.md, the operator's view is in docs/backup.md.
package snapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/datastore"
)

// Suffix of the files.
const Suffix = ".kedge"

// format is the version of the file format that is written here.
const format = 1

// Trigger is why a snapshot was taken.
type Trigger string

// The triggers. Retention goes by it: only scheduled ones are removed by themselves.
const (
	Manual    Trigger = "manual"
	Scheduled Trigger = "scheduled"
	Upgrade   Trigger = "upgrade" // before an upgrade
)

// Metadata says what a snapshot is. It stands in the clear at the beginning of the file.
type Metadata struct {
	Format  int       `json:"format"`
	Name    string    `json:"name"` // of the file, without Suffix
	Created time.Time `json:"created"`
	Trigger Trigger   `json:"trigger"`
	Node    string    `json:"node"`    // the server that took it
	Version string    `json:"version"` // of Kedge
	// Cluster is the hash of the cluster's CA, by which join tokens know it.
	Cluster  string         `json:"cluster"`
	Settings config.Cluster `json:"settings"` // what all nodes of the cluster agree on
	Data     datastore.Copy `json:"data"`
	// Keys are the digests (SHA-256) of the cluster's keys by file name, whether the snapshot has them or not: by them a server sees that
	// its own are the right ones.
	Keys map[string]string `json:"keys"`
	// Recipients can decrypt the keys that the snapshot has; none: it has no keys.
	Recipients []string `json:"recipients,omitempty"`
}

// Identity is what a cluster is known by here: the secret of its keyring, by its digest, which stays the same when CAs are rotated; or
// the hash of its CA.
type Identity struct{ Ring, CA string }

// Of says whether a snapshot is of a cluster.
func (m *Metadata) Of(id Identity) bool {
	return m.Cluster == id.CA || id.Ring != "" && m.Keys[keyringFile] == id.Ring
}

func (m *Metadata) identity() Identity { return Identity{Ring: m.Keys[keyringFile], CA: m.Cluster} }

// HasKeys says whether the snapshot is enough for a restore on new hardware.
func (m *Metadata) HasKeys() bool { return len(m.Recipients) > 0 }

// Entry is a snapshot in a catalogue.
type Entry struct {
	Metadata
	Location string `json:"location"` // a path, or s3://BUCKET/KEY
	Bytes    int64  `json:"bytes"`    // of the file
	// Problem says why it cannot be used, as far as its beginning tells; of the metadata only the name is set then.
	Problem string `json:"problem,omitempty"`
}

// ErrDamaged is wrapped by all errors about the content of a snapshot.
var ErrDamaged = errors.New("the snapshot is damaged")

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrDamaged, fmt.Errorf(format, args...))
}

const maxName = 200

// CheckName refuses what cannot be the name of a snapshot: it becomes a file's name and a key in a bucket.
func CheckName(name string) error {
	if len(name) > maxName || !regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$`).MatchString(name) {
		return fmt.Errorf("%q cannot be the name of a snapshot: letters, digits, and . _ - between them, %d at most", name, maxName)
	}
	return nil
}

// newName is what a snapshot is called unless somebody names it.
func newName(t Trigger, node string, now time.Time) string {
	return fmt.Sprintf("%s-%s-%s", t, node, now.UTC().Format("20060102T150405Z"))
}

func parseMetadata(text []byte) (*Metadata, error) {
	var m Metadata
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, damaged("what it says of itself: %w", err)
	}
	if m.Format > format {
		return nil, fmt.Errorf("the snapshot is of a newer Kedge (%s, format %d): use that version to restore it", m.Version, m.Format)
	}
	switch {
	case m.Format < 1:
		return nil, damaged("it says nothing of its format")
	case m.Data.Size <= 0 || m.Data.Size > maxDatabase:
		return nil, damaged("a database of %d bytes", m.Data.Size)
	case CheckName(m.Name) != nil:
		return nil, damaged("%w", CheckName(m.Name))
	}
	return &m, nil
}
