// SPDX-License-Identifier: Apache-2.0

package datastore

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
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
	"go.etcd.io/etcd/server/v3/storage/wal"
)

// What callers have to tell apart. The errors that wrap them say what is the matter and what to do.
var (
	// ErrBusy: another server is joining; try again later.
	ErrBusy = errors.New("another server is joining")
	// ErrExists: a member has that name and is alive, or that peer address.
	ErrExists = errors.New("there is such a member already")
	// ErrQuorum: the change would leave the cluster without a majority.
	ErrQuorum = errors.New("the cluster would lose its majority")
	// ErrNotReady: the learner cannot be promoted yet.
	ErrNotReady = errors.New("not caught up yet")
	// ErrNotMember: there is no member of that name or ID (any more).
	ErrNotMember = errors.New("not a member of the cluster")
	// ErrRemoved: this server's member has been removed from the cluster.
	ErrRemoved = errors.New("removed from the cluster")
	// ErrNoLeader: no member that was asked has a leader, so nobody can say what holds.
	ErrNoLeader = errors.New("no member with a leader answers")
	// ErrNoData: the data directory is empty, and nothing says how to fill it.
	ErrNoData = errors.New("no data")
	// ErrAlive: other members answer.
	ErrAlive = errors.New("other members are alive")
	// ErrNoSpace: there is no room for a copy of the data.
	ErrNoSpace = errors.New("not enough space")
)

// Member is one member of the cluster.
type Member struct {
	Name string `json:"name"`
	// ID is hexadecimal, as etcd prints it.
	ID       string   `json:"id"`
	PeerURLs []string `json:"peerURLs"`
	// Learner is true while the member does not vote.
	Learner bool `json:"learner"`
}

// label is how a message calls a member: one that never started has no name.
func (m Member) label() string {
	switch {
	case m.Name != "":
		return m.Name
	case len(m.PeerURLs) > 0:
		return m.PeerURLs[0]
	}
	return m.ID
}

func (m Member) is(nameOrID string) bool {
	return m.ID == nameOrID || m.Name != "" && m.Name == nameOrID
}

func fromEtcd(m *membership.Member) Member {
	return Member{Name: m.Name, ID: m.ID.String(), PeerURLs: slices.Clone(m.PeerURLs), Learner: m.IsLearner}
}

// Identity says whose data a directory holds.
type Identity struct {
	ID        string `json:"id"`
	ClusterID string `json:"clusterID"`
	Name      string `json:"name"`
}

// Removal says that a member has been removed from the cluster.
type Removal struct {
	ID   string    `json:"id"`
	Time time.Time `json:"time"`
}

// MemberFile is where Run notes whose data is in the data directory dir. It is beside the directory, which is etcd's own.
func MemberFile(dir string) string { return filepath.Clean(dir) + ".member.json" }

// RemovedFile is where Run notes that the member whose data is in dir has been removed from the cluster.
func RemovedFile(dir string) string { return filepath.Clean(dir) + ".removed.json" }

// ReadMember returns what Run noted of the data in dir; nil if there is nothing.
func ReadMember(dir string) (*Identity, error) { return readFile(MemberFile(dir), parseIdentity) }

// ReadRemoved returns the note that the member in dir has been removed; nil if there is none. A note whose ID is not that of
// ReadMember is about an earlier member.
func ReadRemoved(dir string) (*Removal, error) { return readFile(RemovedFile(dir), parseRemoval) }

// HasMember tells whether a data directory holds a member.
func HasMember(dir string) bool { return wal.Exist(walDir(dir)) }

func walDir(dir string) string { return filepath.Join(dir, "member", "wal") }

func readFile[T any](path string, parse func([]byte) (*T, error)) (*T, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	v, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; remove the file, the next start writes it again", path, err)
	}
	return v, nil
}

func parseIdentity(data []byte) (*Identity, error) {
	var id Identity
	if err := json.Unmarshal(data, &id); err != nil {
		return nil, err
	}
	if err := errors.Join(checkID(id.ID), checkID(id.ClusterID)); err != nil {
		return nil, err
	}
	return &id, nil
}

func parseRemoval(data []byte) (*Removal, error) {
	var r Removal
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, err
	}
	return &r, checkID(r.ID)
}

func checkID(id string) error {
	n, err := types.IDFromString(id)
	if err != nil || n.String() != id {
		return fmt.Errorf("%q is not an ID", id)
	}
	return nil
}

// writeFile replaces a JSON file so that after a power loss it is there in its old or its new form.
func writeFile(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(path, append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes what has been renamed in a directory safe against power loss; of a file, its contents.
func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// MoveAside renames the data of a member that is no longer part of the cluster to DIR.stale-TIME and returns that name; it is
// empty if there was nothing to move. What says whose data it was goes with it. Nothing is ever deleted: which of several old
// copies holds something that somebody misses, only a person can tell.
func MoveAside(dir string) (string, error) {
	dir = filepath.Clean(dir)
	moved, err := renameUnique(dir, dir+".stale-")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		moved = ""
	case err != nil:
		return "", fmt.Errorf("move the data of the former member aside: %w", err)
	}
	// After a power loss here the files are about a member that has no data. The next start of a member replaces them.
	if moved != "" {
		err = os.Rename(MemberFile(dir), filepath.Join(moved, "member.json"))
	} else {
		err = os.Remove(MemberFile(dir))
	}
	for _, err := range []error{err, os.Remove(RemovedFile(dir))} {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return moved, err
		}
	}
	return moved, syncDir(filepath.Dir(dir))
}

// renameUnique renames path to a name that starts with prefix, goes on with the time, and is not taken.
func renameUnique(path, prefix string) (string, error) {
	name := prefix + time.Now().UTC().Format("20060102T150405Z")
	for n := 2; ; n++ {
		if _, err := os.Lstat(name); err != nil {
			break
		}
		name = fmt.Sprintf("%s%s-%d", prefix, time.Now().UTC().Format("20060102T150405Z"), n)
	}
	return name, os.Rename(path, name)
}
