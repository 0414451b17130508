// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Store is a place full of snapshots: a directory or a bucket. Each snapshot says itself what it is, so there is no list beside them that
// could tell something else: what has been renamed, copied or deleted by hand is seen as it is.
type Store interface {
	// List gives the snapshots, newest first. One that cannot be read is there with its Problem.
	List(ctx context.Context) ([]Entry, error)
	// Open reads the snapshot of a name. An error that wraps fs.ErrNotExist says that there is none.
	Open(ctx context.Context, name string) (io.ReadCloser, error)
	// Delete removes it.
	Delete(ctx context.Context, name string) error
	// String names the place.
	String() string
}

// Directory is a store on this machine.
type Directory string

var _ Store = Directory("")

func (d Directory) String() string { return string(d) }

// Path of a snapshot.
func (d Directory) Path(name string) string { return filepath.Join(string(d), name+Suffix) }

// List reads the directory. One that is not there is empty.
func (d Directory) List(ctx context.Context) ([]Entry, error) {
	files, err := os.ReadDir(string(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var list []Entry
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), Suffix)
		if !ok || strings.HasPrefix(name, ".") || f.IsDir() {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		list = append(list, readEntry(d.Path(name)))
	}
	sortEntries(list)
	return list, nil
}

// readEntry reads the beginning of a file.
func readEntry(path string) Entry {
	name := strings.TrimSuffix(filepath.Base(path), Suffix)
	e := Entry{Metadata: Metadata{Name: name}, Location: path}
	f, err := os.Open(path)
	if err != nil {
		e.Problem = err.Error()
		return e
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil {
		e.Bytes, e.Created = info.Size(), info.ModTime().UTC()
		var m *Metadata
		if m, err = readMetadata(f); err == nil {
			e.Metadata = *m
			e.Name = name // it may have been renamed
		}
	}
	if err != nil {
		e.Problem = err.Error()
	}
	return e
}

func sortEntries(list []Entry) {
	slices.SortFunc(list, func(a, b Entry) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(b.Data.Revision, a.Data.Revision), cmp.Compare(a.Name, b.Name))
	})
}

// Open opens the file.
func (d Directory) Open(_ context.Context, name string) (io.ReadCloser, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	return os.Open(d.Path(name))
}

// Delete removes the file.
func (d Directory) Delete(_ context.Context, name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	return errors.Join(os.Remove(d.Path(name)), syncPath(string(d)))
}

// Check reads a snapshot to its end. Nil means that it is as it was written.
func Check(ctx context.Context, s Store, name string) (*Metadata, error) {
	r, err := s.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	m, _, err := readArchive(ctx, r, io.Discard)
	return m, err
}

// Pruned says what a pruning did.
type Pruned struct {
	Removed []Entry `json:"removed"`
	Broken  []Entry `json:"broken"` // they do not count, and stay until enough good ones are newer
}

// Prune removes the scheduled snapshots of a cluster beyond the newest keep that are intact: each is read to its end before it counts, so
// that a broken one never displaces a good one. Snapshots of other clusters, those that somebody asked for, and those that cannot be read
// and may be of another cluster, stay.
func Prune(ctx context.Context, s Store, cluster Identity, keep int, dryRun bool) (*Pruned, error) {
	list, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	// What cannot be read is only known by its name, and another cluster may have a server of the same name.
	ours, theirs := map[string]bool{}, map[string]bool{}
	for _, e := range list {
		switch {
		case e.Problem != "" || e.Trigger != Scheduled:
		case e.Of(cluster):
			ours[seriesOf(e.Name)] = true
		default:
			theirs[seriesOf(e.Name)] = true
		}
	}
	p := &Pruned{}
	good := 0
	for _, e := range list {
		mine := e.Trigger == Scheduled && e.Of(cluster)
		if e.Problem != "" {
			mine = strings.HasPrefix(e.Name, string(Scheduled)+"-") && ours[seriesOf(e.Name)] && !theirs[seriesOf(e.Name)]
		}
		if !mine {
			continue
		}
		if good < keep {
			if e.Problem == "" {
				if _, err := Check(ctx, s, e.Name); errors.Is(err, ErrDamaged) {
					e.Problem = err.Error()
				} else if err != nil {
					return p, fmt.Errorf("%s: %w", e.Location, err) // without knowing, nothing is removed
				}
			}
			if e.Problem == "" {
				good++
			} else {
				p.Broken = append(p.Broken, e)
			}
			continue
		}
		if !dryRun {
			if err := s.Delete(ctx, e.Name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return p, err
			}
		}
		p.Removed = append(p.Removed, e)
	}
	return p, nil
}

// seriesOf is the name of a scheduled snapshot without its time.
func seriesOf(name string) string { return name[:strings.LastIndexByte(name, '-')+1] }

// lock lets one process at a time write to the directory, and removes what interrupted ones have left.
func (d Directory) lock(ctx context.Context) (unlock func(), err error) {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(string(d), ".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			break
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("another snapshot is being taken: %w", ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
	if err == nil {
		var left []string
		left, err = filepath.Glob(filepath.Join(string(d), ".*"+temporary))
		err = errors.Join(err, removeAll(left...))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// temporary is the end of the names of files that are not finished; they begin with a dot.
const temporary = ".tmp"
