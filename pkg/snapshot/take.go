// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"
)

// Taken is what became of a snapshot and of what belongs to it.
type Taken struct {
	Saved
	Copied string   `json:"copied,omitempty"` // where in the bucket it is
	Pruned []string `json:"pruned,omitempty"` // locations of older ones that were removed
}

// Take saves a snapshot, copies it to the bucket if there is one, removes scheduled ones that are too many, and shows in the cluster what there is.
// A snapshot that could be saved is returned also with an error: something after it failed.
func Take(ctx context.Context, s Settings, o SaveOptions, log *slog.Logger) (*Taken, error) {
	if o.Name != "" && s.Snapshots.S3.Used() {
		// Of a bucket that cannot be reached is told when the snapshot is here.
		if b, err := NewBucket(s.Snapshots.S3); err == nil && CheckName(o.Name) == nil {
			if err := b.free(ctx, o.Name); errors.Is(err, ErrTaken) {
				return nil, err
			}
		}
	}
	saved, err := Save(ctx, s, o, log)
	if err != nil {
		return nil, err
	}
	t := &Taken{Saved: *saved}
	var errs []error
	stores := []Store{Directory(s.Snapshots.Dir)}
	if s.Snapshots.S3.Used() {
		bucket, err := s.copy(ctx, t)
		if err != nil {
			errs = append(errs, fmt.Errorf("the snapshot %s is on this machine, but not in the bucket: %w", t.Name, err))
		} else {
			stores = append(stores, bucket)
		}
	}
	if t.Trigger == Scheduled {
		for _, store := range stores {
			p, err := Prune(ctx, store, t.identity(), s.Snapshots.Retention, false)
			if err != nil {
				errs = append(errs, fmt.Errorf("older snapshots in %s: %w", store, err))
			}
			if p == nil {
				continue
			}
			for _, e := range p.Removed {
				t.Pruned = append(t.Pruned, e.Location)
			}
			for _, e := range p.Broken {
				t.Remarks = append(t.Remarks, fmt.Sprintf("%s is of no use and does not count: %s", e.Location, e.Problem))
			}
		}
	}
	if err := Publish(ctx, s); err != nil {
		t.Remarks = append(t.Remarks, "the list of snapshots in the cluster is not up to date: "+err.Error())
	}
	return t, errors.Join(errs...)
}

// copy puts a snapshot into the bucket. Of the scheduled ones of all servers, which say the same, the first is enough.
func (s Settings) copy(ctx context.Context, t *Taken) (*Bucket, error) {
	b, err := NewBucket(s.Snapshots.S3)
	if err != nil {
		return nil, err
	}
	if t.Trigger == Scheduled {
		list, err := b.List(ctx)
		if err != nil {
			return nil, err
		}
		for _, e := range list {
			if age := t.Created.Sub(e.Created); e.Problem == "" && e.Trigger == Scheduled && e.Of(t.identity()) && e.Node != s.Node && age.Abs() < s.gap(time.Now())/2 {
				t.Copied = e.Location
				return b, nil
			}
		}
	}
	if err := b.Upload(ctx, Directory(s.Snapshots.Dir), t.Name); err != nil {
		return nil, err
	}
	t.Copied = b.location(t.Name)
	return b, nil
}

func (b *Bucket) location(name string) string { return s3Scheme + b.bucket + "/" + b.key(name) }

// Stores are those of the settings.
func (s Settings) Stores() ([]Store, error) {
	stores := []Store{Directory(s.Snapshots.Dir)}
	if !s.Snapshots.S3.Used() {
		return stores, nil
	}
	b, err := NewBucket(s.Snapshots.S3)
	if err != nil {
		return nil, err
	}
	return append(stores, b), nil
}

// ThisCluster is what the snapshots of this machine's cluster are told by from those of others.
func (s Settings) ThisCluster() (Identity, error) { return localIdentity(s.PKIDir) }

// Find opens a snapshot by what an operator calls it, see RestoreOptions.Source, and reads it: to its end if whole, otherwise what it says
// of itself.
func Find(ctx context.Context, s Settings, text string, whole bool) (*Metadata, string, error) {
	src, err := openSource(s, text)
	if err != nil {
		return nil, "", err
	}
	if !whole {
		m, err := src.metadata(ctx)
		return m, src.location, err
	}
	m, _, err := src.read(ctx, io.Discard)
	return m, src.location, err
}

// StoreOf is the place and the name of a snapshot that an operator names.
func StoreOf(s Settings, text string) (Store, string, error) {
	if strings.HasPrefix(text, s3Scheme) {
		b, name, err := bucketFor(s.Snapshots.S3, text)
		return b, name, err
	}
	name := strings.TrimSuffix(text, Suffix)
	return Directory(s.Snapshots.Dir), name, CheckName(name)
}
