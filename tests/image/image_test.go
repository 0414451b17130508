// SPDX-License-Identifier: Apache-2.0

package image_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/platforms"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kedge-io/kedge/tests/image"
)

// importArchive reads an archive as containerd does and returns the image's name, configuration and the files of its layer.
func importArchive(t *testing.T, file string) (string, v1.Image, map[string]*tar.Header) {
	t.Helper()
	store, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	indexDesc, err := archive.ImportIndex(t.Context(), store, f)
	if err != nil {
		t.Fatal(err)
	}
	var index v1.Index
	read := func(d v1.Descriptor) []byte {
		r, err := store.ReaderAt(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		b := make([]byte, r.Size())
		if _, err := r.ReadAt(b, 0); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		return b
	}
	if err := json.Unmarshal(read(indexDesc), &index); err != nil {
		t.Fatal(err)
	}
	manifest, err := images.Manifest(t.Context(), store, index.Manifests[0], platforms.Default())
	if err != nil {
		t.Fatal(err)
	}
	var config v1.Image
	if err := json.Unmarshal(read(manifest.Config), &config); err != nil {
		t.Fatal(err)
	}
	files := map[string]*tar.Header{}
	for tr := tar.NewReader(bytes.NewReader(read(manifest.Layers[0]))); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name] = h
	}
	return index.Manifests[0].Annotations[images.AnnotationImageName], config, files
}

func TestServer(t *testing.T) {
	file := filepath.Join(t.TempDir(), "server.tar")
	if err := image.Server(t.Context(), file, image.ServerName); err != nil {
		t.Fatal(err)
	}
	name, config, files := importArchive(t, file)
	if name != image.ServerName || len(config.Config.Entrypoint) != 1 {
		t.Errorf("name %q, config %+v", name, config.Config)
	}
	if f := files["server"]; f == nil || f.Mode&0o111 == 0 || f.Size == 0 {
		t.Errorf("no program in %v", files)
	}
}

func TestBusybox(t *testing.T) {
	templates, err := filepath.Glob("/var/lib/kedge-testbed/template-*/usr/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	if os.Getuid() != 0 || len(templates) == 0 {
		t.Skip("needs root and the test bed's template: tests/testbed/machines template")
	}
	file := filepath.Join(t.TempDir(), "busybox.tar")
	root := filepath.Dir(filepath.Dir(filepath.Dir(templates[0])))
	if err := image.Busybox(t.Context(), file, image.BusyboxName, root); err != nil {
		t.Fatal(err)
	}
	name, _, files := importArchive(t, file)
	if name != image.BusyboxName {
		t.Errorf("name %q", name)
	}
	for _, want := range []string{"bin/sh", "usr/bin/wget", "usr/bin/nslookup", "usr/bin/nc", "usr/sbin/httpd", "bin/ping", "bin/sleep", "bin/vi"} {
		if f := files[want]; f == nil || f.Linkname != "/bin/busybox" {
			t.Errorf("%s: %+v", want, f)
		}
	}
	if f := files["tmp/"]; f == nil || f.Mode != 0o1777 {
		t.Errorf("tmp: %+v", f)
	}
}
