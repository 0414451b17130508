// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/kedge-io/kedge/pkg/release"
)

// Source is a release that this machine has checked.
type Source struct {
	release.Release
	Path string
	file *os.File // of a download, open for as long as it is used
}

// Sources checks releases from files, unpacked directories or URLs, one an architecture, all of the same version. Downloads go to the
// file system of dir, without a name: whatever ends this process, nothing is left of them.
func Sources(ctx context.Context, from []string, dir string, keys []release.Key, say func(string)) (map[string]Source, error) {
	sources := map[string]Source{}
	version := ""
	for _, place := range from {
		path := place
		var file *os.File
		if strings.Contains(place, "://") {
			var err error
			if file, err = download(ctx, place, dir, say); err != nil {
				return nil, fmt.Errorf("%w: %w", ErrNothingChanged, err)
			}
			path = fmt.Sprintf("/proc/self/fd/%d", file.Fd())
		}
		r, _, err := release.Open(path)
		if err != nil {
			return nil, err
		}
		rel, err := release.Extract(ctx, r, keys, func(release.Info) (io.Writer, error) { return io.Discard, nil })
		if err = errors.Join(err, r.Close()); err != nil {
			return nil, fmt.Errorf("%s: %w", place, err)
		}
		if version == "" {
			version = rel.Version
		}
		if _, double := sources[rel.Arch]; double || rel.Version != version {
			return nil, fmt.Errorf("%s: give one release an architecture, all of one version (%s for %s)", place, rel.Version, rel.Arch)
		}
		say(fmt.Sprintf("%s for %s, signed by %s", rel.Version, rel.Arch, rel.Signer))
		sources[rel.Arch] = Source{*rel, path, file}
	}
	return sources, nil
}

func download(ctx context.Context, from, dir string, say func(string)) (*os.File, error) {
	f, err := os.CreateTemp(dir, ".upgrade-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	say("downloading " + from)
	if err := release.Get(ctx, from, f, Steps(func(text string) { say("downloading: " + text) })); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Open gives the release as Send takes it; size is 0 when it is not known.
func (s Source) Open() (io.ReadCloser, int64, error) {
	r, size, err := release.Open(s.Path)
	if err == nil && size == 0 {
		if st, statErr := os.Stat(s.Path); statErr == nil && !st.IsDir() {
			size = st.Size()
		}
	}
	return r, size, err
}

// Steps makes a progress function that says something now and then: a quarter further, or five seconds later.
func Steps(say func(string)) func(done, total int64) {
	var last time.Time
	quarter := int64(-1)
	return func(done, total int64) {
		now, q := time.Now(), int64(-1)
		if total > 0 {
			q = done * 4 / total
		}
		if q == quarter && now.Sub(last) < 5*time.Second || last.IsZero() && q <= 0 {
			if last.IsZero() {
				last, quarter = now, q
			}
			return
		}
		last, quarter = now, q
		if total > 0 {
			say(fmt.Sprintf("%d of %d MiB", done>>20, total>>20))
		} else {
			say(fmt.Sprintf("%d MiB", done>>20))
		}
	}
}
