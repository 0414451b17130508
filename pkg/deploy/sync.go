// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kedge-io/kedge/pkg/supervise"
)

const (
	// quiet is how long nobody may have written to a file before it is read: half a file is not what its writer meant.
	quiet = 500 * time.Millisecond
	// settle is how long changes of records are collected.
	settle = 100 * time.Millisecond
	// echo is how long to wait at the most until the watch shows what this server has written itself.
	echo = 10 * time.Second
	// unwatched is how often to look where the kernel has no watch for the directory.
	unwatched = time.Minute
)

// syncer is one run of Sync.
type syncer struct {
	*Deployer
	dir     directory
	cluster string
	written map[string]echoed // by this server, and not in the cache yet
	failed  retry
	say     string
}

type echoed struct {
	revision int64
	until    time.Time
}

// Sync keeps this server's directory and the cluster's records the same until ctx ends.
func (d *Deployer) Sync(ctx context.Context) error {
	s := &syncer{Deployer: d, dir: directory{d.cfg.Dir}, written: map[string]echoed{}}
	changed, stop := d.listen()
	defer stop()
	if !d.ready(ctx) {
		return nil
	}
	err := supervise.Poll(ctx, func() error {
		ns, err := d.cfg.Client.CoreV1().Namespaces().Get(ctx, recordNamespace, metav1.GetOptions{})
		if err == nil {
			s.cluster = string(ns.UID)
		}
		return err
	})
	if err != nil {
		return nil // ctx ended
	}
	return s.loop(ctx, changed)
}

// loop looks whenever something has changed, and again after errors.
func (s *syncer) loop(ctx context.Context, changed <-chan struct{}) error {
	watch, err := fsnotify.NewWatcher()
	if err != nil {
		s.log.Warn("the manifests directory is looked at once a minute only", "error", err)
		watch = &fsnotify.Watcher{}
	} else {
		defer watch.Close()
	}
	due := time.NewTimer(0)
	defer due.Stop()
	watched := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-watch.Events:
			if filepath.Clean(e.Name) == filepath.Clean(s.dir.path) && e.Has(fsnotify.Remove|fsnotify.Rename) {
				watched = false
			} else if !isManifest(filepath.Base(e.Name)) && !strings.Contains(e.Name, suffixConflict) {
				continue
			}
			due.Reset(quiet)
		case err := <-watch.Errors:
			s.log.Debug("watch of the manifests directory", "error", err)
			due.Reset(quiet) // events were lost
		case <-changed:
			due.Reset(settle)
		case <-due.C:
			if !watched {
				watched = s.watch(watch)
			}
			again := s.round(ctx)
			if !watched {
				again = cmp.Or(again, unwatched)
			}
			if again > 0 {
				due.Reset(again)
			}
		}
	}
}

// watch makes the directory and has the kernel tell about it.
func (s *syncer) watch(w *fsnotify.Watcher) bool {
	if err := os.MkdirAll(s.dir.path, 0o700); err != nil {
		return false // round fails, too, and says why
	}
	if w.Events == nil {
		return false
	}
	if err := w.Add(s.dir.path); err != nil {
		s.log.Warn("the manifests directory is looked at once a minute only", "error", err)
		return false
	}
	return true
}

// round does what there is to do, reports it, and says when to look again; 0: when something changes.
func (s *syncer) round(ctx context.Context) time.Duration {
	l, unsettled, err := s.reconcile(ctx)
	if ctx.Err() != nil {
		return 0
	}
	var remarks []string
	again := time.Duration(0)
	if unsettled {
		again = quiet
	}
	if err != nil {
		remarks = append(remarks, strings.ReplaceAll(err.Error(), "\n", "; "))
		again = s.failed.next()
	} else {
		s.failed = retry{}
	}
	if n := len(l.conflicts); n > 0 {
		remarks = append(remarks, fmt.Sprintf("%d set aside in %s: %s", n, s.dir.path, strings.Join(l.conflicts[:min(n, 3)], ", ")))
	}
	remark := strings.Join(remarks, "; ")
	if err != nil && remark != s.say {
		s.log.Warn("the manifests directory and the cluster do not agree yet", "error", err)
	}
	s.say = remark
	s.report(ofSync, remark)
	return again
}

// job is what is to be done about one file.
type job struct {
	name    string
	act     action
	local   localFile
	known   *known
	cluster *record
}

// reconcile makes directory and records the same, as far as it goes: what fails with one file does not stop the others.
func (s *syncer) reconcile(ctx context.Context) (l listing, unsettled bool, err error) {
	now := time.Now()
	if l, err = s.dir.scan(now); err != nil {
		return l, false, err
	}
	before, err := s.dir.load(s.cluster)
	if err != nil {
		return l, false, err
	}
	after := state{Cluster: s.cluster, Files: maps.Clone(before.Files)}
	jobs, unsettled, errs := s.plan(l, before, now)
	for _, j := range jobs {
		k, err := s.do(ctx, j)
		if errors.Is(err, errStale) {
			unsettled = true
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", j.name, err))
			continue
		}
		if k == nil {
			delete(after.Files, j.name)
		} else {
			after.Files[j.name] = *k
		}
	}
	return l, unsettled, errors.Join(append(errs, s.dir.save(before, after))...)
}

// plan decides about every file, in the order in which things are done: nothing is removed before what is new is there, as objects may have moved
// from one file to another.
func (s *syncer) plan(l listing, st state, now time.Time) (jobs []job, unsettled bool, errs []error) {
	records := s.records()
	names := slices.Collect(maps.Keys(l.files))
	names = slices.AppendSeq(names, maps.Keys(st.Files))
	names = slices.AppendSeq(names, maps.Keys(records))
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		local, there := l.files[name]
		if there && local.err != nil {
			errs = append(errs, local.err)
			continue
		}
		if there && !local.settled {
			unsettled = true
			continue
		}
		j := job{name: name, local: local}
		if k, ok := st.Files[name]; ok {
			j.known = &k
		}
		var c *inCluster
		if r, ok := records[name]; ok {
			j.cluster, c = &r, &inCluster{r.revision, r.hash, r.deleted}
		}
		if w, ok := s.written[name]; ok {
			if (c == nil || c.revision < w.revision) && now.Before(w.until) {
				unsettled = true
				continue
			}
			delete(s.written, name)
		}
		if j.act = decide(local.hash, j.known, c); j.act != nothing {
			jobs = append(jobs, j)
		}
	}
	slices.SortStableFunc(jobs, func(a, b job) int { return cmp.Compare(a.act.order(), b.act.order()) })
	return jobs, unsettled, errs
}

func (a action) order() int {
	if a == remove || a == pushDelete || a == asideOnly {
		return 1
	}
	return 0
}

// do carries out a decision and says what is known of the file afterwards; nil: nothing.
func (s *syncer) do(ctx context.Context, j job) (*known, error) {
	switch j.act {
	case push, pushDelete:
		return s.push(ctx, j)
	case asideWrite, asideOnly:
		aside, err := s.dir.aside(j.name)
		if err != nil {
			return nil, err
		}
		what := "changed"
		if j.act == asideOnly {
			what = "removed"
		}
		message := fmt.Sprintf("%s was %s by %s while it was changed on %s, too: the version of %s is kept there as %s; compare them, write what is to be in force to %s, and remove the other",
			j.name, what, j.cluster.by, s.cfg.NodeName, s.cfg.NodeName, s.dir.file(aside), s.dir.file(j.name))
		s.log.Warn(message)
		s.event(*j.cluster, corev1.EventTypeWarning, "Conflict", message)
		if j.act == asideOnly {
			return nil, nil
		}
		return s.fetch(j)
	case write:
		return s.fetch(j)
	case remove:
		s.log.Info("manifest removed", "file", j.name, "by", j.cluster.by)
		return nil, s.dir.remove(j.name)
	case remember:
		return &known{j.cluster.revision, j.cluster.hash}, nil
	case forget, nothing:
	}
	return nil, nil
}

// fetch writes the cluster's version into the directory.
func (s *syncer) fetch(j job) (*known, error) {
	content, err := j.cluster.content()
	if err != nil {
		return nil, err
	}
	if err := s.dir.write(j.name, content); err != nil {
		return nil, err
	}
	s.log.Info("manifest written", "file", j.name, "revision", j.cluster.revision, "by", j.cluster.by)
	return &known{j.cluster.revision, j.cluster.hash}, nil
}

// errStale says that the record is not any more what the decision was made by. The watch brings the news.
var errStale = errors.New("the record has changed")

// push makes the directory's version, or that there is none, the cluster's.
func (s *syncer) push(ctx context.Context, j job) (*known, error) {
	v := version{file: j.name, by: s.cfg.NodeName, at: time.Now(), revision: 1}
	if j.act == push {
		if v.content = j.local.content; v.content == nil {
			v.content = []byte{}
		}
	}
	if j.known != nil {
		v.revision = j.known.Revision + 1
	}
	if j.cluster != nil {
		v.revision = max(v.revision, j.cluster.revision+1)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	secrets := s.cfg.Client.CoreV1().Secrets(recordNamespace)
	have, err := secrets.Get(ctx, recordName(j.name), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		if j.cluster != nil {
			return nil, errStale
		}
		have = &corev1.Secret{}
		if err := v.put(have); err != nil {
			return nil, err
		}
		_, err = secrets.Create(ctx, have, metav1.CreateOptions{FieldManager: fieldManager})
	case err != nil:
		return nil, err
	default:
		if r, err := parseRecord(have); err != nil {
			return nil, err
		} else if j.cluster == nil || r.revision != j.cluster.revision || r.hash != j.cluster.hash || r.deleted != j.cluster.deleted {
			return nil, errStale
		}
		if err := v.put(have); err != nil {
			return nil, err
		}
		_, err = secrets.Update(ctx, have, metav1.UpdateOptions{FieldManager: fieldManager})
	}
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		return nil, errStale
	}
	if err != nil {
		return nil, err
	}
	s.written[j.name] = echoed{v.revision, time.Now().Add(echo)}
	if j.act == pushDelete {
		s.log.Info("manifest removed here", "file", j.name)
		return nil, nil
	}
	s.log.Info("manifest changed here", "file", j.name, "revision", v.revision)
	return &known{v.revision, j.local.hash}, nil
}
