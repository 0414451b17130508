// SPDX-License-Identifier: Apache-2.0

// Package embed carries the programs that Kedge needs but cannot link in: runc, containerd's shim, the CNI plugins, the
// network tools of Debian with their libraries, and the pause image. They are embedded as one compressed archive and
// staged once per content into a directory of the data directory.
//
// The life of a stage: Stage makes or checks it, which everything else waits for; Settle, when the node is up, makes it
// safe against power loss and clears away what former versions left.
package embed

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"

	"github.com/kedge-io/kedge/pkg/embed/archive"
)

// Names of staged programs that are referred to by path.
const (
	Runc = "runc"
	Shim = "containerd-shim-runc-v2"
)

// pauseImage changes with the program in it. The build reads it from here.
const pauseImage = "kedge.io/pause:1.0"

// ErrNoAssets is returned by Stage in a binary that was linked before its assets were built.
var ErrNoAssets = errors.New("this binary was built without the programs it has to bring along: build it by `make build`")

// Tree is a staged directory.
type Tree struct {
	// Dir holds runc, the shim and the network tools. It comes first in the PATH of everything that runs them.
	Dir string

	stager *stager
}

// Path is the path of a staged program.
func (t *Tree) Path(name string) string { return filepath.Join(t.Dir, name) }

// CNIDir is the directory of the CNI plugins.
func (t *Tree) CNIDir() string { return filepath.Join(t.Dir, "cni") }

// PauseImage is the archive of the pause image (OCI layout in a tar) and the reference it is imported under.
func (t *Tree) PauseImage() (archive, name string) {
	return filepath.Join(t.Dir, "pause.tar"), pauseImage
}

// source is what was embedded: a directory with the two files of package archive.
type source struct {
	files fs.FS
}

func (s source) manifest() (*archive.Manifest, error) {
	data, err := fs.ReadFile(s.files, archive.ManifestName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoAssets
	}
	if err != nil {
		return nil, fmt.Errorf("embedded files: %w", err)
	}
	return archive.ParseManifest(data)
}

func (s source) open() (io.ReadCloser, error) {
	f, err := s.files.Open(archive.ArchiveName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoAssets
	}
	return f, err
}
