// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/version"
)

// SaveOptions are what a single snapshot is asked for with.
type SaveOptions struct {
	Name    string // default: TRIGGER-NODE-TIME
	Trigger Trigger
}

// Saved is what became of it.
type Saved struct {
	Entry
	Took    time.Duration `json:"took"`
	Remarks []string      `json:"remarks,omitempty"` // that the operator should know
}

// Save takes a snapshot of the datastore through this server's member and keeps it in the directory of the settings. When it returns without
// error, the snapshot is on the disk under its name, has been read back from there, and is intact. Before that there is no file of that name.
func Save(ctx context.Context, s Settings, o SaveOptions, log *slog.Logger) (*Saved, error) {
	begin := time.Now()
	db, err := openRing(s)
	if err != nil {
		return nil, err
	}
	defer db.Close()
	name := o.Name
	if name == "" {
		name = newName(o.Trigger, s.Node, begin)
	}
	if err := CheckName(name); err != nil {
		return nil, err
	}
	dir := Directory(s.Snapshots.Dir)
	unlock, err := dir.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := os.Lstat(dir.Path(name)); !errors.Is(err, fs.ErrNotExist) {
		return nil, errors.Join(fmt.Errorf("there is a snapshot %s already: choose another name, or delete it", dir.Path(name)), err)
	}
	size, err := datastore.Size(ctx, db.Client)
	if err != nil {
		return nil, err
	}
	if err := datastore.Room(string(dir), "a snapshot", 2*size); err != nil {
		return nil, fmt.Errorf("%w; make room, or choose another disk (snapshot-dir)", err)
	}
	saved := &Saved{}
	m := &Metadata{Format: format, Name: name, Created: begin.UTC().Truncate(time.Second), Trigger: o.Trigger, Node: s.Node, Version: version.Version, Settings: s.Cluster}
	keys, remarks, err := s.keys(ctx, db, m)
	if err != nil {
		return nil, err
	}
	saved.Remarks = remarks
	data := filepath.Join(string(dir), "."+name+".db"+temporary)
	defer os.Remove(data) //nolint:errcheck // the next snapshot removes it
	c, err := datastore.Fetch(ctx, db.Client, data)
	if err != nil {
		return nil, err
	}
	m.Data = *c
	log.Debug("datastore copied and verified", "revision", c.Revision, "keys", c.Keys, "bytes", c.Size, "took", time.Since(begin))
	if err := s.write(ctx, dir, m, keys, data); err != nil {
		return nil, err
	}
	saved.Entry = readEntry(dir.Path(name))
	saved.Took = time.Since(begin).Round(time.Millisecond)
	return saved, nil
}

// keys seals the cluster's keys, and notes in the metadata what is in them.
func (s Settings) keys(ctx context.Context, db *connection, m *Metadata) (sealed []byte, remarks []string, err error) {
	if m.Cluster, err = localCluster(s.PKIDir); err != nil {
		return nil, nil, err
	}
	files, err := readKeys(s.PKIDir)
	if err != nil {
		return nil, nil, err
	}
	m.Keys = digests(files)
	key, err := changeKey(ctx, db.ring, func(*RecoveryKey) (bool, error) { return false, nil })
	if err != nil {
		// The data are worth more than what is missing: a server that still has its keys can be restored.
		return nil, []string{"without the cluster's keys, as there is no recovery key: " + err.Error()}, nil
	}
	if m.Recipients, err = key.Recipients(); err != nil {
		return nil, nil, err
	}
	if key.WrittenOut.IsZero() {
		remarks = append(remarks, "nobody has the recovery key yet, without which a snapshot cannot be restored on new hardware: "+
			"print it with `kedge snapshot recovery-key`, and keep it away from these machines")
	}
	if sealed, err = sealKeys(files, m.Recipients); err != nil {
		return nil, nil, err
	}
	// As the data are, they are verified by opening them.
	if _, err := openKeys(m, sealed, key.Identity); err != nil {
		return nil, nil, fmt.Errorf("the keys in the snapshot could not be decrypted again: %w", err)
	}
	return sealed, remarks, nil
}

// write makes the file, reads it back from the disk, and gives it its name.
func (s Settings) write(ctx context.Context, dir Directory, m *Metadata, keys []byte, data string) error {
	tmp := filepath.Join(string(dir), "."+m.Name+Suffix+temporary)
	out, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer os.Remove(tmp) //nolint:errcheck // it has been renamed, or the next snapshot removes it
	defer out.Close()
	in, err := os.Open(data)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := writeArchive(ctx, out, m, keys, in, s.Snapshots.Compress); err != nil {
		return fmt.Errorf("write the snapshot: %w", err)
	}
	if err := out.Sync(); err != nil {
		return fmt.Errorf("write the snapshot: %w", err)
	}
	// What is read now comes from the disk, and does not take the place of what the node needs in memory.
	if err := unix.Fadvise(int(out.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	if _, err := out.Seek(0, 0); err != nil {
		return err
	}
	if _, _, err := readArchive(ctx, out, io.Discard); err != nil {
		return fmt.Errorf("the snapshot was read back from %s and is not as it was written (is the disk failing?): %w", dir, err)
	}
	return errors.Join(os.Rename(tmp, dir.Path(m.Name)), syncPath(string(dir)))
}
