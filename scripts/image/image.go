// SPDX-License-Identifier: Apache-2.0

// Package image writes container images without a registry and without a container tool.
package image

import (
	"archive/tar"
	"bytes"
	_ "crypto/sha256" // go-digest finds its algorithms at run time
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Config describes an image of one layer.
type Config struct {
	Name         string   // full reference with tag, as "kedge.io/pause:1.0"
	Architecture string   // in Go's words: amd64, arm64
	Rootfs       string   // directory that becomes the layer; empty for an image without files
	Entrypoint   []string // exec form
	Cmd          []string // exec form
	Env          []string // NAME=value; empty means a PATH of the usual four directories
	User         string   // user[:group], names or numbers; empty for root
	WorkingDir   string   // empty for /
}

const defaultPath = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"

// Write writes the image as a tar that is an OCI image layout (OCI image specification 1.1) and a `docker save` archive
// in one, so that containerd, docker and podman all import it. Files keep their owners (root's when built by another user)
// and have no times: the same input
// gives the same bytes. The layer is not compressed.
func Write(w io.Writer, c Config) error {
	layer, err := layerOf(c.Rootfs)
	if err != nil {
		return fmt.Errorf("image %s: layer from %s: %w", c.Name, c.Rootfs, err)
	}
	if err := write(w, c, layer); err != nil {
		return fmt.Errorf("image %s: %w", c.Name, err)
	}
	return nil
}

// dockerManifest is an entry of the manifest.json of `docker save`.
type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func write(w io.Writer, c Config, layer []byte) error {
	platform := v1.Platform{OS: "linux", Architecture: c.Architecture}
	if len(c.Env) == 0 {
		c.Env = []string{defaultPath}
	}
	epoch := time.Unix(0, 0).UTC()
	config, err := json.Marshal(v1.Image{
		Created:  &epoch,
		Platform: platform,
		Config:   v1.ImageConfig{Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env, User: c.User, WorkingDir: c.WorkingDir},
		RootFS:   v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(layer)}},
		History:  []v1.History{{Created: &epoch, CreatedBy: "kedge"}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageManifest,
		Config:    descriptor(v1.MediaTypeImageConfig, config),
		Layers:    []v1.Descriptor{descriptor(v1.MediaTypeImageLayer, layer)},
	})
	if err != nil {
		return err
	}
	entry := descriptor(v1.MediaTypeImageManifest, manifest)
	entry.Platform = &platform
	entry.Annotations = map[string]string{
		"io.containerd.image.name": c.Name, // what containerd takes as the name of the image
		v1.AnnotationRefName:       c.Name[strings.LastIndexByte(c.Name, ':')+1:],
	}
	index, err := json.Marshal(v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageIndex,
		Manifests: []v1.Descriptor{entry},
	})
	if err != nil {
		return err
	}
	docker, err := json.Marshal([]dockerManifest{{Config: blob(config), RepoTags: []string{c.Name}, Layers: []string{blob(layer)}}})
	if err != nil {
		return err
	}

	tw := tar.NewWriter(w)
	for _, f := range []struct {
		name    string
		content []byte
	}{
		{v1.ImageLayoutFile, []byte(`{"imageLayoutVersion":"` + v1.ImageLayoutVersion + `"}`)},
		{v1.ImageIndexFile, index},
		{blob(manifest), manifest},
		{blob(config), config},
		{blob(layer), layer},
		{"manifest.json", docker},
	} {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o644, Size: int64(len(f.content))}); err != nil {
			return err
		}
		if _, err := tw.Write(f.content); err != nil {
			return err
		}
	}
	return tw.Close()
}

func descriptor(mediaType string, data []byte) v1.Descriptor {
	return v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

func blob(data []byte) string {
	return path.Join(v1.ImageBlobsDir, "sha256", digest.FromBytes(data).Encoded())
}

// layerOf makes the tar of a directory. WalkDir gives the names in order.
func layerOf(dir string) ([]byte, error) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	if dir != "" {
		err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
			if err != nil || name == dir {
				return err
			}
			return add(tw, dir, name, d)
		})
		if err != nil {
			return nil, err
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

func add(tw *tar.Writer, dir, name string, d fs.DirEntry) error {
	st, err := d.Info()
	if err != nil {
		return err
	}
	var link string
	if d.Type() == fs.ModeSymlink {
		if link, err = os.Readlink(name); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(st, link)
	if err != nil {
		return err
	}
	rel, err := filepath.Rel(dir, name)
	if err != nil {
		return err
	}
	h.Name = filepath.ToSlash(rel)
	if d.IsDir() {
		h.Name += "/"
	}
	// The numbers stay, since an image may need files of other users; who builds it as root has made them so.
	if s, ok := st.Sys().(*syscall.Stat_t); ok && os.Geteuid() == 0 {
		h.Uid, h.Gid = int(s.Uid), int(s.Gid)
	} else {
		h.Uid, h.Gid = 0, 0
	}
	h.Uname, h.Gname = "", ""
	h.ModTime, h.AccessTime, h.ChangeTime = time.Unix(0, 0), time.Time{}, time.Time{}
	if err := tw.WriteHeader(h); err != nil || !d.Type().IsRegular() {
		return err
	}
	r, err := os.Open(name)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(tw, r)
	return err
}
