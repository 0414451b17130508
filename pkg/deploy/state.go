// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
)

// stateFile is in the directory itself: who takes the directory away takes it along, and nobody then takes the missing files for removed ones.
const stateFile = ".kedge-sync.json"

// suffixConflict ends the names of files that were set aside.
const suffixConflict = ".conflict"

// state is what a server knew of its directory.
type state struct {
	// Cluster whose files these are, by the UID of kube-system.
	Cluster string           `json:"cluster"`
	Files   map[string]known `json:"files"`
}

// directory is a server's manifests directory.
type directory struct{ path string }

func (d directory) file(name string) string { return filepath.Join(d.path, name) }

// load reads the state. A missing or damaged one, or another cluster's, knows nothing.
func (d directory) load(cluster string) (state, error) {
	none := state{Cluster: cluster, Files: map[string]known{}}
	b, err := os.ReadFile(d.file(stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return none, nil
	}
	if err != nil {
		return none, err
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil || s.Cluster != cluster || s.Files == nil {
		return none, nil
	}
	return s, nil
}

// save writes the state if it is another one than before.
func (d directory) save(before, now state) error {
	if before.Cluster == now.Cluster && maps.Equal(before.Files, now.Files) {
		return nil
	}
	b, err := json.MarshalIndent(now, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(d.file(stateFile), append(b, '\n'), 0o600)
}

// localFile is one in the directory.
type localFile struct {
	hash    string
	content []byte
	err     error // it is there, but cannot be read
	settled bool  // nobody has written to it just now
}

// listing is what is in a directory.
type listing struct {
	files     map[string]localFile
	conflicts []string // that were set aside
}

// scan reads the directory. An error means that nothing is known about it, not that it is empty.
func (d directory) scan(now time.Time) (listing, error) {
	l := listing{files: map[string]localFile{}}
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return l, err
	}
	for _, e := range entries {
		if strings.Contains(e.Name(), suffixConflict) {
			l.conflicts = append(l.conflicts, e.Name())
		}
		if !isManifest(e.Name()) || e.IsDir() {
			continue
		}
		if f, ok := d.read(e.Name(), now); ok {
			l.files[e.Name()] = f
		}
	}
	return l, nil
}

func (d directory) read(name string, now time.Time) (localFile, bool) {
	fail := func(err error) (localFile, bool) {
		return localFile{err: err, settled: true}, !errors.Is(err, fs.ErrNotExist)
	}
	info, err := os.Stat(d.file(name))
	switch {
	case err != nil:
		return fail(err)
	case !info.Mode().IsRegular():
		return fail(fmt.Errorf("%s is no regular file", d.file(name)))
	case info.Size() > maxFile:
		return fail(fmt.Errorf("%s has %d MiB, more than %d: split it up", d.file(name), info.Size()>>20, maxFile>>20))
	}
	f, err := os.Open(d.file(name))
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return fail(err)
	}
	age := now.Sub(info.ModTime())
	return localFile{hash: hashOf(content), content: content, settled: age < 0 || age >= quiet}, true
}

func (d directory) write(name string, content []byte) error {
	return renameio.WriteFile(d.file(name), content, 0o600)
}

func (d directory) remove(name string) error {
	if err := os.Remove(d.file(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// aside keeps a file under a name that is not applied, and says which.
func (d directory) aside(name string) (string, error) {
	for i := 1; ; i++ {
		to := name + suffixConflict
		if i > 1 {
			to = fmt.Sprintf("%s.%d", to, i)
		}
		// A link fails where a rename would replace what is there.
		if err := os.Link(d.file(name), d.file(to)); errors.Is(err, fs.ErrExist) {
			continue
		} else if err != nil {
			return "", err
		}
		return to, os.Remove(d.file(name))
	}
}

// Copies lists the files of a manifests directory that are the cluster's as well, unchanged, and what Kedge keeps beside them: what a server
// that leaves its cluster need not keep.
func Copies(dir string) []string {
	d := directory{dir}
	b, err := os.ReadFile(d.file(stateFile))
	if err != nil {
		return nil
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return nil
	}
	var list []string
	for name, k := range s.Files {
		if !isManifest(name) {
			continue
		}
		if f, ok := d.read(name, time.Now()); ok && f.err == nil && f.hash == k.Hash {
			list = append(list, d.file(name))
		}
	}
	return append(list, d.file(stateFile))
}
