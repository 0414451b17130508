// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func entries(t *testing.T, data []byte) (map[string][]byte, map[string]*tar.Header) {
	t.Helper()
	content, headers := map[string][]byte{}, map[string]*tar.Header{}
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return content, headers
		}
		if err != nil {
			t.Fatal(err)
		}
		if content[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
		headers[h.Name] = h
	}
}

func decode[T any](t *testing.T, data []byte) T {
	t.Helper()
	var v T
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestWrite(t *testing.T) {
	rootfs := t.TempDir()
	if err := errors.Join(
		os.Mkdir(filepath.Join(rootfs, "bin"), 0o755),
		os.WriteFile(filepath.Join(rootfs, "bin/sh"), []byte("shell"), 0o755),
		os.Symlink("sh", filepath.Join(rootfs, "bin/ash")),
		os.Mkdir(filepath.Join(rootfs, "tmp"), 0o700),
		os.Chmod(filepath.Join(rootfs, "tmp"), 0o777|os.ModeSticky),
	); err != nil {
		t.Fatal(err)
	}
	c := Config{Name: "example.org:5000/a/shell:1.2", Architecture: "arm64", Rootfs: rootfs, Entrypoint: []string{"/bin/sh", "-c"},
		Cmd: []string{"true"}, User: "7:8", WorkingDir: "/tmp"}
	var first, second bytes.Buffer
	if err := errors.Join(Write(&first, c), Write(&second, c)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("the same image twice is not the same file")
	}

	files, _ := entries(t, first.Bytes())
	get := func(d v1.Descriptor) []byte {
		t.Helper()
		data := files["blobs/sha256/"+d.Digest.Encoded()]
		if digest.FromBytes(data) != d.Digest || int64(len(data)) != d.Size {
			t.Errorf("%s %s is not what its descriptor says", d.MediaType, d.Digest)
		}
		return data
	}
	index := decode[v1.Index](t, files[v1.ImageIndexFile])
	if len(index.Manifests) != 1 {
		t.Fatalf("%d manifests", len(index.Manifests))
	}
	entry := index.Manifests[0]
	wantNames := map[string]string{"io.containerd.image.name": c.Name, v1.AnnotationRefName: "1.2"}
	if diff := cmp.Diff(wantNames, entry.Annotations); diff != "" {
		t.Errorf("annotations (-want +got):\n%s", diff)
	}
	manifest := decode[v1.Manifest](t, get(entry))
	config := decode[v1.Image](t, get(manifest.Config))
	want := v1.ImageConfig{User: "7:8", Env: []string{defaultPath}, Entrypoint: c.Entrypoint, Cmd: c.Cmd, WorkingDir: "/tmp"}
	if diff := cmp.Diff(want, config.Config); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
	if config.Architecture != "arm64" || config.OS != "linux" {
		t.Errorf("platform %s/%s", config.OS, config.Architecture)
	}
	layer := get(manifest.Layers[0])
	if config.RootFS.DiffIDs[0] != digest.FromBytes(layer) {
		t.Error("diff ID and layer differ")
	}
	docker := decode[[]dockerManifest](t, files["manifest.json"])
	if docker[0].RepoTags[0] != c.Name || files[docker[0].Config] == nil || files[docker[0].Layers[0]] == nil {
		t.Errorf("docker's manifest: %+v", docker)
	}

	content, headers := entries(t, layer)
	if string(content["bin/sh"]) != "shell" || headers["bin/sh"].Mode != 0o755 || headers["bin/ash"].Linkname != "sh" {
		t.Errorf("layer: %v", headers)
	}
	if h := headers["tmp/"]; h == nil || h.Mode != 0o1777 {
		t.Errorf("/tmp in the layer: %+v", h)
	}
}

func TestWriteErrors(t *testing.T) {
	if err := Write(io.Discard, Config{Name: "x:1", Rootfs: "/does/not/exist"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v for a directory that does not exist", err)
	}
}
