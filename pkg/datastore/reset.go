// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
	"golang.org/x/sys/unix"
)

// resetTimeout is how long a member that is alone may take until it leads itself; on a slow disk it replays a long log first.
const resetTimeout = 5 * time.Minute

// ResetOptions are what an operator has to ask for, and what a reset takes out.
type ResetOptions struct {
	// Force resets although other members answer. They go on as the former cluster: two clusters, with the same names and keys.
	Force bool
	// InPlace does without a copy of the data, for want of space.
	InPlace bool
	// Delete are keys of entries that make sense in the former cluster only.
	Delete []string
}

// Reset makes the member in cfg.Dir the only one of its cluster, with all data that it has. etcd must not be running there. The
// other servers find out that they have been removed when they reach this one, and join afresh.
//
// It works on a copy, which takes the place of the directory in one step at the end; the former one stays as
// DIR.before-reset-TIME. A power loss before that step has changed nothing, and Reset can be repeated at any time. In place it
// leaves a mark, with which Run refuses to start until Reset has been repeated. Errors: ErrNoData, ErrAlive, ErrNoSpace.
func Reset(ctx context.Context, cfg Config, opts ResetOptions, log *slog.Logger) error {
	dir := filepath.Clean(cfg.Dir)
	ec, err := etcdConfig(cfg, Disk{}, log)
	if err != nil {
		return err
	}
	switch {
	case ec.WalDir != "":
		return fmt.Errorf("the reset does not know of a write-ahead log elsewhere (%s): move it to %s and remove the etcd-arg first", ec.WalDir, walDir(dir))
	case !HasMember(dir):
		return fmt.Errorf("%w: %s holds no member of a cluster; run the reset on a server that does", ErrNoData, dir)
	}
	if err := keepInterrupted(dir); err != nil {
		return err
	}
	db, err := openReadOnly(dir)
	if err != nil {
		return err
	}
	defer db.Close() // may be closed twice
	others, err := checkResettable(cfg, db)
	if err != nil {
		return err
	}
	if err := refuseWhileAlive(ctx, cfg, others, opts.Force, log); err != nil {
		return err
	}
	if opts.InPlace {
		if err := db.Close(); err != nil {
			return err
		}
		return resetInPlace(ctx, cfg, ec, opts.Delete, log)
	}
	work := dir + ".reset.tmp"
	if err := copyData(ctx, dir, work); err != nil {
		return errors.Join(err, os.RemoveAll(work))
	}
	if err := db.Close(); err != nil {
		return err
	}
	ec.Dir = work
	id, err := makeSingle(ctx, cfg, ec, opts.Delete)
	if err != nil {
		return errors.Join(err, os.RemoveAll(work))
	}
	before, err := exchange(dir, work)
	if err != nil {
		return err
	}
	log.Info("this server is the only member of its cluster now", "member", id.ID, "formerData", before)
	return finishReset(dir, id)
}

// finishReset notes whose data it is now.
func finishReset(dir string, id Identity) error {
	if err := writeFile(MemberFile(dir), id); err != nil {
		return err
	}
	for _, path := range []string{RemovedFile(dir), resetMark(dir)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return syncDir(filepath.Dir(dir))
}

// resetMark is there while a reset in place is under way.
func resetMark(dir string) string { return filepath.Clean(dir) + ".resetting" }

// checkUnfinishedReset refuses to start a member that is half way between two clusters: entries that nobody has agreed on are in
// its log, and it would put them to the vote of the former cluster.
func checkUnfinishedReset(dir string) error {
	if _, err := os.Stat(resetMark(dir)); !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("a reset of this server was interrupted (%s): repeat it with kedge server --cluster-reset", resetMark(dir)), err)
	}
	return nil
}

func resetInPlace(ctx context.Context, cfg Config, ec *embed.Config, obsolete []string, log *slog.Logger) error {
	if err := writeFile(resetMark(cfg.Dir), time.Now().UTC()); err != nil {
		return err
	}
	id, err := makeSingle(ctx, cfg, ec, obsolete)
	if err != nil {
		return err
	}
	log.Info("this server is the only member of its cluster now", "member", id.ID, "formerData", "not kept")
	return finishReset(filepath.Clean(cfg.Dir), id)
}

// keepInterrupted cleans up after a reset that was interrupted. A copy without .tmp is complete, or it is the former data already:
// it is kept.
func keepInterrupted(dir string) error {
	if err := os.RemoveAll(dir + ".reset.tmp"); err != nil {
		return err
	}
	if _, err := renameUnique(dir+".reset", dir+".before-reset-"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// openReadOnly opens etcd's database. As long as it is open no etcd can start there.
func openReadOnly(dir string) (*bolt.DB, error) {
	path := filepath.Join(dir, "member", "snap", "db")
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("etcd is running on %s: stop Kedge on this server first", dir)
	case err != nil:
		return nil, fmt.Errorf("etcd's database %s: %w", path, err)
	}
	return db, nil
}

// readMembers lists the members that a database knows: etcd keeps each as JSON in one bucket (schema.MustSaveMemberToBackend).
func readMembers(db *bolt.DB) ([]Member, error) {
	var members []Member
	err := db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte("members"))
		if b == nil {
			return nil
		}
		return b.ForEach(func(_, v []byte) error {
			var m membership.Member
			if err := json.Unmarshal(v, &m); err != nil {
				return fmt.Errorf("a member in etcd's database: %w", err)
			}
			members = append(members, fromEtcd(&m))
			return nil
		})
	})
	return members, err
}

// checkResettable returns the other members. A member without a vote is refused: etcd takes all others out, and raft panics.
func checkResettable(cfg Config, db *bolt.DB) (others []Member, err error) {
	members, err := readMembers(db)
	if err != nil {
		return nil, err
	}
	who, err := ReadMember(cfg.Dir)
	if err != nil {
		return nil, err
	}
	self := slices.IndexFunc(members, func(m Member) bool { return who != nil && m.ID == who.ID || who == nil && m.Name == cfg.Name })
	if self < 0 || members[self].Learner {
		return nil, fmt.Errorf("the member in %s has no vote: it was still joining, or has been removed; reset a server that was a full member, "+
			"or restore a snapshot", cfg.Dir)
	}
	return slices.Delete(members, self, self+1), nil
}

// refuseWhileAlive asks the other members on their peer ports.
func refuseWhileAlive(ctx context.Context, cfg Config, others []Member, force bool, log *slog.Logger) error {
	tls, err := cfg.peerFiles().ClientConfig()
	if err != nil {
		return err
	}
	var alive []Member
	seen := newPeerClient(tls).probeAll(ctx, others)
	for _, m := range others {
		if seen[m.ID] != dead {
			alive = append(alive, m)
		}
	}
	if len(alive) == 0 {
		return nil
	}
	if force {
		log.Warn("other members answer; they will not be part of this server's cluster", "members", describe(alive))
		return nil
	}
	return fmt.Errorf("%w: %s; a reset would make two clusters; stop Kedge on those servers first, or start this one without the reset if they are "+
		"a majority", ErrAlive, describe(alive))
}

// makeSingle runs etcd on ec.Dir until it has taken all other members and obsolete entries out.
func makeSingle(ctx context.Context, cfg Config, ec *embed.Config, obsolete []string) (Identity, error) {
	ctx, cancel := context.WithTimeout(ctx, resetTimeout)
	defer cancel()
	ec.ForceNewCluster = true
	// Nobody is to meet it before its data is in place.
	ec.ListenClientUrls = ec.ListenClientUrls[:1]
	ec.ListenPeerUrls = []url.URL{{Scheme: "https", Host: "127.0.0.1:0"}}
	e, err := start(ec)
	if err != nil {
		return Identity{}, err
	}
	defer shut(e)
	s := e.Server
	id := Identity{ID: s.MemberID().String(), ClusterID: s.Cluster().ID().String(), Name: cfg.Name}
	for {
		select {
		case <-s.ReadyNotify():
			m := &member{cfg: cfg, etcd: e}
			if err := m.updatePeerURL(ctx, s.MemberID(), []string{cfg.peerURL()}); err != nil {
				return id, fmt.Errorf("reset: set the address of this server: %w", err)
			}
			for _, key := range obsolete {
				if _, err := s.DeleteRange(ctx, &etcdserverpb.DeleteRangeRequest{Key: []byte(key)}); err != nil {
					return id, fmt.Errorf("reset: delete %s: %w", key, err)
				}
			}
			return id, nil
		case err := <-e.Err():
			return id, fmt.Errorf("reset: etcd: %w", err)
		case <-s.StopNotify():
			return id, errors.New("reset: etcd stopped by itself")
		case <-ctx.Done():
			return id, fmt.Errorf("reset: etcd is not ready: %w", ctx.Err())
		}
	}
}

// exchange puts work in the place of dir and returns the name under which the former dir is kept.
func exchange(dir, work string) (string, error) {
	parent := filepath.Dir(dir)
	if err := syncTree(work); err != nil {
		return "", err
	}
	done := dir + ".reset"
	if err := errors.Join(os.Rename(work, done), syncDir(parent)); err != nil {
		return "", err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, done, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE); err == nil {
		before, err := renameUnique(done, dir+".before-reset-")
		return before, errors.Join(err, syncDir(parent))
	}
	// Some file systems cannot do it in one step.
	before, err := renameUnique(dir, dir+".before-reset-")
	if err != nil {
		return "", err
	}
	if err := errors.Join(os.Rename(done, dir), syncDir(parent)); err != nil {
		return before, fmt.Errorf("%w; the data of the reset is in %s, the former in %s: rename one of them to %s", err, done, before, dir)
	}
	return before, nil
}

// describe is a list of members for a message.
func describe(members []Member) string {
	var names []string
	for _, m := range members {
		names = append(names, fmt.Sprintf("%s (%s)", m.label(), strings.Join(m.PeerURLs, ", ")))
	}
	return strings.Join(names, ", ")
}
