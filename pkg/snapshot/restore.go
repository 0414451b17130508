// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/pki"
)

// RestoreOptions are what an operator asks for.
type RestoreOptions struct {
	// Source is a file, the name of a snapshot in the directory of the settings, or s3://BUCKET/KEY.
	Source string
	// RecoveryKey is the text of the operator's file, empty if it was not given. A server that still has the cluster's keys needs none.
	RecoveryKey string
	// KeepKeys uses the keys that this server has although they are others than when the snapshot was taken.
	KeepKeys bool
	// Forget are servers that do not come back, by node name; ForgetOthers are all but this one.
	Forget       []string
	ForgetOthers bool
	Force        bool
	DryRun       bool
	Say          func(string) // gets a line for each step
}

// Restored is what a restore did, or would do.
type Restored struct {
	Snapshot Metadata `json:"snapshot"`
	// FormerData and FormerKeys are where those of this machine were moved to; empty if there were none, or they stay.
	FormerData string   `json:"formerData,omitempty"`
	FormerKeys string   `json:"formerKeys,omitempty"`
	Keys       string   `json:"keys"`             // where the cluster's keys come from
	Others     []string `json:"others,omitempty"` // the other servers that the snapshot knows
}

// diskForWAL is what etcd's write-ahead log takes, beside the database.
const diskForWAL = 192 << 20

// memberPatience is what another server may take to answer.
const memberPatience = 2 * time.Second

// ErrOthers says that other servers of the cluster are running.
var ErrOthers = errors.New("other servers of the cluster are running")

// Restore puts a snapshot in the place of this server's data. Kedge must not run here. Until everything that is to be put there is on the
// disk, nothing of what was there is touched; then one file is written that says what is to be done (see Resume), and from then on
// it is done to its end, by the next start of Kedge if need be. Nothing is deleted: former data and keys are moved aside.
func Restore(ctx context.Context, s Settings, o RestoreOptions, log *slog.Logger) (*Restored, error) {
	if !s.Member {
		return nil, errors.New("this server has no datastore member (disable-etcd, or a datastore of your own): restore on one that has")
	}
	if s.ElsewhereWAL != "" {
		return nil, fmt.Errorf("the restore does not know of a write-ahead log elsewhere (%s): remove the etcd-arg wal-dir first", s.ElsewhereWAL)
	}
	if !o.DryRun {
		if done, err := Resume(s.DataDir); err != nil {
			return nil, err
		} else if done != "" {
			o.Say("an earlier restore, of " + done + ", had been interrupted and has been completed")
		}
	}
	src, err := openSource(s, o.Source)
	if err != nil {
		return nil, err
	}
	m, err := src.metadata(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", src.location, err)
	}
	o.Say(fmt.Sprintf("snapshot %s of %s, taken on server %s by Kedge %s: revision %d, %d entries, %d KiB", m.Name, m.Created.Local().Format(time.RFC3339),
		m.Node, m.Version, m.Data.Revision, m.Data.Keys, m.Data.Size>>10))
	r := &Restored{Snapshot: *m, Others: othersOf(m, s.Node)}
	err = s.mayRestore(ctx, m, o)
	if err != nil && !o.DryRun {
		return nil, err
	}
	if o.DryRun {
		if err != nil {
			o.Say("at this moment it would be refused: " + err.Error())
		}
		_, sealed, err := src.read(ctx, io.Discard)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", src.location, err)
		}
		o.Say("the snapshot is intact")
		if _, err = s.chooseKeys(m, sealed, o, r); err != nil {
			return nil, err
		}
		o.Say("keys: " + r.Keys)
		if exists(s.EtcdDir) {
			r.FormerData = s.EtcdDir + ".stale-TIME"
			o.Say("the data in " + s.EtcdDir + " would be moved to " + r.FormerData)
		}
		o.Say("nothing was changed")
		return r, nil
	}
	return r, s.restore(ctx, src, m, o, r, log)
}

func (s Settings) restore(ctx context.Context, src *source, m *Metadata, o RestoreOptions, r *Restored, log *slog.Logger) error {
	if err := os.MkdirAll(s.DataDir, 0o711); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(s.EtcdDir), 0o700); err != nil {
		return err
	}
	j, err := newJournal(s, m, o)
	if err != nil {
		return err
	}
	if err := removeAll(j.leftovers()...); err != nil {
		return err
	}
	if err := datastore.Room(filepath.Dir(s.EtcdDir), "the restored data", 2*m.Data.Size+diskForWAL); err != nil {
		return fmt.Errorf("%w; make room, for instance by moving older copies (%s.stale-*) elsewhere", err, s.EtcdDir)
	}
	if err := s.prepare(ctx, src, m, o, r, j, log); err != nil {
		return errors.Join(err, removeAll(j.leftovers()...))
	}
	if r.FormerData = ""; exists(s.EtcdDir) {
		r.FormerData = j.formerData()
	}
	if r.FormerKeys = ""; exists(j.newKeys()) && exists(s.PKIDir) {
		r.FormerKeys = j.formerKeys()
	}
	// From here on there is no way back but forwards.
	if err := j.write(s.DataDir); err != nil {
		return err
	}
	if _, err := Resume(s.DataDir); err != nil {
		return fmt.Errorf("the restored data are ready but not in place: %w; run the command again, or start Kedge, to go on", err)
	}
	return nil
}

// prepare makes the new data and keys, complete and safe against power loss, beside the present ones.
func (s Settings) prepare(ctx context.Context, src *source, m *Metadata, o RestoreOptions, r *Restored, j *journal, log *slog.Logger) error {
	copied := j.copyFile()
	out, err := os.OpenFile(copied, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, sealed, err := src.read(ctx, out)
	if err := errors.Join(err, out.Close()); err != nil {
		return fmt.Errorf("%s: %w", src.location, err)
	}
	c, err := datastore.Examine(ctx, copied)
	if err != nil {
		return err
	}
	if c.Revision != m.Data.Revision || c.Hash != m.Data.Hash || c.Keys != m.Data.Keys {
		return damaged("the database has revision %d, hash %x and %d entries, not %d, %x and %d as it says", c.Revision, c.Hash, c.Keys, m.Data.Revision, m.Data.Hash, m.Data.Keys)
	}
	o.Say("the snapshot is intact")
	keys, err := s.chooseKeys(m, sealed, o, r)
	if err != nil {
		return err
	}
	o.Say("keys: " + r.Keys)
	if keys != nil {
		// Import writes them durably, in an order in which no certificate is without its key.
		if err := pki.Import(j.newKeys()+temporary, keys); err != nil {
			return err
		}
		if err := errors.Join(os.Rename(j.newKeys()+temporary, j.newKeys()), syncPath(filepath.Dir(j.newKeys()))); err != nil {
			return err
		}
	}
	o.Say("making the datastore")
	if err := datastore.Restore(ctx, copied, j.newData()+temporary, s.Node, s.PeerURL, log); err != nil {
		return err
	}
	return errors.Join(os.Rename(j.newData()+temporary, j.newData()), os.Remove(copied), syncPath(filepath.Dir(j.newData())))
}

// mayRestore refuses what would make two clusters, or end another one.
func (s Settings) mayRestore(ctx context.Context, m *Metadata, o RestoreOptions) error {
	if here, err := localIdentity(s.PKIDir); err == nil && !m.Of(here) && exists(s.EtcdDir) && !o.Force {
		return fmt.Errorf("this machine is part of another cluster (CA hash sha256:%s) than the snapshot (sha256:%s): with --force its data and keys are moved aside, "+
			"and it takes the snapshot's", here.CA, m.Cluster)
	}
	members, err := datastore.LocalMembers(s.EtcdDir)
	if err != nil && !o.Force {
		return fmt.Errorf("%w; with --force the present data are moved aside unread", err)
	}
	alive := answering(ctx, append(members, m.Data.Members...))
	if len(alive) == 0 || o.Force {
		return nil
	}
	return fmt.Errorf("%w, or something is at their addresses: %s; if they are a majority, start Kedge here without a restore: nothing is lost; "+
		"otherwise stop Kedge on them first (after the restore, start them as usual), or use --force if those addresses are somebody else's now",
		ErrOthers, strings.Join(alive, ", "))
}

// answering are those members on other machines whose peer port takes a connection.
func answering(ctx context.Context, members []datastore.Member) []string {
	own := map[netip.Addr]bool{}
	if list, err := net.InterfaceAddrs(); err == nil {
		for _, a := range list {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				own[p.Addr().Unmap()] = true
			}
		}
	}
	var mu sync.Mutex
	found := map[string]string{} // by address
	var wg sync.WaitGroup
	for _, m := range members {
		for _, text := range m.PeerURLs {
			u, err := url.Parse(text)
			if err != nil {
				continue
			}
			if a, err := netip.ParseAddr(u.Hostname()); err == nil && own[a.Unmap()] {
				continue
			}
			wg.Go(func() {
				conn, err := (&net.Dialer{Timeout: memberPatience}).DialContext(ctx, "tcp", u.Host)
				if err != nil {
					return
				}
				conn.Close()
				mu.Lock()
				defer mu.Unlock()
				found[u.Host] = m.Name
			})
		}
	}
	wg.Wait()
	var list []string
	for _, host := range slices.Sorted(maps.Keys(found)) {
		list = append(list, fmt.Sprintf("%s (%s)", found[host], host))
	}
	return list
}

// othersOf are the other servers that the snapshot knows.
func othersOf(m *Metadata, self string) []string {
	var names []string
	for _, o := range m.Data.Members {
		if o.Name != self && o.Name != "" {
			names = append(names, o.Name)
		}
	}
	slices.Sort(names)
	return names
}

const keyringFile = string(pki.Keyring) + ".key"

// chooseKeys decides which keys the restored server has: those on its disk, then the result is nil, or the snapshot's.
func (s Settings) chooseKeys(m *Metadata, sealed []byte, o RestoreOptions, r *Restored) (map[string][]byte, error) {
	files, err := readKeys(s.PKIDir)
	if err != nil {
		return nil, err
	}
	here := digests(files)
	var differ []string
	for _, name := range slices.Sorted(maps.Keys(m.Keys)) {
		// The keys of Secrets change during a cluster's life. The state of that moment is in the keyring, which is part of the datastore: the
		// server writes this file by it before its API server reads it.
		if name == string(pki.Encryption)+".yaml" && here[name] != "" && here[keyringFile] == m.Keys[keyringFile] {
			continue
		}
		if here[name] != m.Keys[name] {
			differ = append(differ, name)
		}
	}
	var keys map[string][]byte
	if o.RecoveryKey != "" && sealed != nil { // also where it is not needed: whoever gives it wants to know whether it is the right one
		if keys, err = openKeys(m, sealed, o.RecoveryKey); err != nil {
			return nil, err
		}
	}
	switch cluster, err := localIdentity(s.PKIDir); {
	case len(differ) == 0:
		r.Keys = "this server has them, in " + s.PKIDir
		if keys != nil {
			r.Keys += "; the recovery key opens those in the snapshot, too"
		}
		return nil, nil
	case o.KeepKeys && err == nil && m.Of(cluster):
		r.Keys = "those of this server are kept, although others were in use when the snapshot was taken: " + strings.Join(differ, ", ")
		return nil, nil
	case sealed == nil:
		return nil, fmt.Errorf("this machine lacks keys of the cluster (%s), and the snapshot has none: copy the directory pki of a server of the cluster, or its backup, to %s, "+
			"or restore on a server of the cluster", strings.Join(differ, ", "), s.PKIDir)
	case o.RecoveryKey == "":
		hint := ""
		if err == nil && m.Of(cluster) {
			hint = "; --keep-keys uses those of this server, and what was encrypted with others cannot be read then"
		}
		return nil, fmt.Errorf("%w: this machine does not have these keys of the cluster: %s. They are in the snapshot, encrypted: give --recovery-key FILE%s",
			ErrRecoveryKey, strings.Join(differ, ", "), hint)
	}
	for _, name := range pki.SharedFiles() {
		if len(keys[name]) == 0 {
			return nil, fmt.Errorf("the snapshot, of Kedge %s, has no key %s: use that version to restore it, and upgrade then", m.Version, name)
		}
	}
	r.Keys = "those in the snapshot"
	return keys, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// source is where a snapshot comes from.
type source struct {
	location string
	open     func(context.Context) (io.ReadCloser, error)
}

func (s *source) metadata(ctx context.Context) (*Metadata, error) {
	r, err := s.open(ctx)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return readMetadata(r)
}

func (s *source) read(ctx context.Context, db io.Writer) (*Metadata, []byte, error) {
	r, err := s.open(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	return readArchive(ctx, r, db)
}

// openSource finds a snapshot by what an operator calls it.
func openSource(s Settings, text string) (*source, error) {
	if strings.HasPrefix(text, s3Scheme) {
		bucket, name, err := bucketFor(s.Snapshots.S3, text)
		if err != nil {
			return nil, err
		}
		return &source{text, func(ctx context.Context) (io.ReadCloser, error) { return bucket.Open(ctx, name) }}, nil
	}
	path := text
	if !strings.ContainsRune(text, '/') && !exists(text) {
		name := strings.TrimSuffix(text, Suffix)
		if err := CheckName(name); err != nil {
			return nil, err
		}
		path = Directory(s.Snapshots.Dir).Path(name)
	}
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("no such snapshot: %w; see `kedge snapshot list`", err)
	}
	return &source{path, func(context.Context) (io.ReadCloser, error) { return os.Open(path) }}, nil
}
