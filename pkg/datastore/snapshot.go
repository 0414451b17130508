// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/logging"
)

// revisionBump is how far a restore moves the revision on. No client that has seen a later state of the former cluster may ever be told a
// lower revision than it knows: its watch would silently miss changes. At a thousand changes a second this is eleven days of
// changes after the snapshot, and it can be restored nine thousand million times.
const revisionBump = 1_000_000_000

// A Copy is what is known of a copy of the datastore's database: etcd's snapshot, its digest at the end as etcdctl has it.
type Copy struct {
	ClusterID string   `json:"clusterID,omitempty"` // etcd's, of the cluster that it was taken of
	Revision  int64    `json:"revision"`
	Hash      uint32   `json:"hash"` // as `etcdutl snapshot status` has it
	Keys      int      `json:"keys"` // entries of all buckets, as there
	Size      int64    `json:"size"` // bytes of the file
	SHA256    string   `json:"sha256"`
	Storage   string   `json:"storage,omitempty"` // version of etcd's format
	Members   []Member `json:"members"`
}

// Fetch has the member of client write its database to the new file path and verifies it: its digest, its structure, and that it is as new
// as the cluster was when it was asked. The file is not synced: it is a step on the way.
func Fetch(ctx context.Context, client *clientv3.Client, path string) (*Copy, error) {
	// A linearizable read: what comes back is at least as new, and without a leader there is no snapshot of an outdated member.
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	now, err := client.Get(ask, "kedge", clientv3.WithCountOnly())
	cancel()
	if err != nil {
		return nil, explain("snapshot", err)
	}
	resp, err := client.SnapshotWithVersion(ctx)
	if err != nil {
		return nil, explain("snapshot", err)
	}
	defer resp.Snapshot.Close()
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	_, err = io.Copy(out, resp.Snapshot)
	if err := errors.Join(err, out.Close()); err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	c, err := Examine(ctx, path)
	if err != nil {
		return nil, err
	}
	if c.Revision < now.Header.Revision {
		return nil, fmt.Errorf("the snapshot ends at revision %d, and the datastore is at %d: it is incomplete", c.Revision, now.Header.Revision)
	}
	c.ClusterID = types.ID(now.Header.ClusterId).String()
	return c, nil
}

// Size is the size of a member's database, which a snapshot has as well.
func Size(ctx context.Context, client *clientv3.Client) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	st, err := client.Status(ctx, client.Endpoints()[0])
	if err != nil {
		return 0, explain("size of the database", err)
	}
	return st.DbSize, nil
}

// Examine opens a copy of the database: first its digest, as a damaged file must not be mapped into memory, then page by page.
func Examine(ctx context.Context, path string) (*Copy, error) {
	sum, size, err := checkDigest(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("copy of the datastore %s: %w", path, err)
	}
	st, err := snapshot.NewV3(zap.NewNop()).Status(path)
	if err != nil {
		return nil, fmt.Errorf("copy of the datastore %s: %w", path, err)
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return nil, fmt.Errorf("copy of the datastore %s: %w", path, err)
	}
	defer db.Close()
	members, err := readMembers(db)
	if err != nil {
		return nil, fmt.Errorf("copy of the datastore %s: %w", path, err)
	}
	if st.TotalKey == 0 || st.Revision == 0 {
		return nil, fmt.Errorf("copy of the datastore %s: it is empty", path)
	}
	return &Copy{Revision: st.Revision, Hash: st.Hash, Keys: st.TotalKey, Size: size, SHA256: sum, Storage: st.Version, Members: members}, nil
}

// checkDigest compares a copy with the digest at its end, and returns that of the whole file.
func checkDigest(ctx context.Context, path string) (sum string, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", 0, err
	}
	// etcd's pages are of 4 KiB at least, so the rest tells whether there is a digest.
	data := info.Size() - sha256.Size
	if data <= 0 || data%512 != 0 {
		return "", 0, errors.New("its digest is missing: it was cut off, or is no snapshot of etcd")
	}
	whole, inner := sha256.New(), sha256.New()
	if _, err := io.Copy(io.MultiWriter(whole, inner), io.LimitReader(&contextReader{ctx, f}, data)); err != nil {
		return "", 0, err
	}
	want, err := io.ReadAll(io.TeeReader(f, whole))
	if err != nil {
		return "", 0, err
	}
	if !bytes.Equal(want, inner.Sum(nil)) {
		return "", 0, errors.New("it does not have the digest that etcd gave it: it is damaged")
	}
	return hex.EncodeToString(whole.Sum(nil)), info.Size(), nil
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r *contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// Restore makes a data directory out of a copy of the database: that of the only member of a new cluster, with all data. dir must not
// exist. The cluster has an ID of its own, by which members of the former one see that they have to join afresh, and its revisions go on
// far beyond those that the former cluster can have reached, with all before them compacted: watches begin again instead of missing
// something. When it returns, the directory is safe against power loss.
func Restore(ctx context.Context, copyFile, dir, name, peerURL string, log *slog.Logger) error {
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("%s exists already", dir), err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	err := snapshot.NewV3(logging.Zap(log)).Restore(snapshot.RestoreConfig{
		SnapshotPath:        copyFile,
		Name:                name,
		OutputDataDir:       dir,
		PeerURLs:            []string{peerURL},
		InitialCluster:      name + "=" + peerURL,
		InitialClusterToken: "kedge-" + rand.Text(),
		RevisionBump:        revisionBump,
		MarkCompacted:       true,
	})
	if err != nil {
		return fmt.Errorf("restore the datastore: %w", err)
	}
	return errors.Join(syncTree(dir), syncDir(filepath.Dir(dir)))
}

// DeleteUpTo deletes an entry unless it was written after a revision: of a restored datastore that of the copy, so that only what was in there
// is deleted. It says whether it did.
func DeleteUpTo(ctx context.Context, c *clientv3.Client, key string, revision int64) (bool, error) {
	res, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "<", revision+1)).Then(clientv3.OpDelete(key)).Commit()
	if err != nil {
		return false, err
	}
	return res.Succeeded && res.Responses[0].GetResponseDeleteRange().Deleted > 0, nil
}

// Replace puts the data directory work in the place of dir, whose data, if there is any, is kept as former. What says whose data it was
// goes with it. It can be repeated after an interruption at any point: without work it has been done.
func Replace(dir, work, former string) error {
	dir = filepath.Clean(dir)
	if _, err := os.Lstat(work); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	parent := filepath.Dir(dir)
	if err := os.Rename(dir, former); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("move the former data aside: %w", err)
	}
	if err := syncDir(parent); err != nil {
		return err
	}
	if err := os.Rename(MemberFile(dir), filepath.Join(former, "member.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, note := range []string{MemberFile(dir), RemovedFile(dir), resetMark(dir)} {
		if err := os.Remove(note); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := os.Rename(work, dir); err != nil {
		return err
	}
	return syncDir(parent)
}

// LocalMembers are the members that the data in dir knows; nil without data.
func LocalMembers(dir string) ([]Member, error) {
	if _, err := os.Stat(filepath.Join(dir, "member", "snap", "db")); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	db, err := openReadOnly(dir)
	if err != nil {
		return nil, err
	}
	defer db.Close()
	return readMembers(db)
}

// Room refuses with ErrNoSpace when the file system of dir has less than need bytes free, beyond a margin.
func Room(dir, what string, need int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < need+roomMargin {
		return fmt.Errorf("%w for %s in %s: %d MiB are free on that disk, %d MiB are needed", ErrNoSpace, what, dir, free>>20, (need+roomMargin)>>20)
	}
	return nil
}

// roomMargin is what is left free for others.
const roomMargin = 32 << 20
