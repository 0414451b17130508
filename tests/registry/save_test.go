// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	layout "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/platforms"

	kedge "github.com/kedge-io/kedge/pkg/images"
	"github.com/kedge-io/kedge/pkg/registries"
	"github.com/kedge-io/kedge/scripts/image"
	"github.com/kedge-io/kedge/tests/registry"
)

// An image goes from a registry with credentials into an archive, complete and under its name.
func TestSaveFromRegistry(t *testing.T) {
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "hello"), []byte("hello"), 0o644); err != nil {
		t.Fatal(err)
	}
	archives := filepath.Join(dir, "app.tar")
	f, err := os.Create(archives)
	if err != nil {
		t.Fatal(err)
	}
	if err := image.Write(f, image.Config{Name: "registry.example/team/app:2", Architecture: "arm64", Rootfs: root, Entrypoint: []string{"/hello"}}); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	server, err := registry.Start("127.0.0.1:0", registry.Config{Archives: []string{archives}, User: "reader", Password: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	_, port, err := net.SplitHostPort(server.Addr())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "registries.yaml")
	name := "localhost:" + port + "/team/app:2"
	write := func(password string) kedge.Saver {
		text := "configs:\n  'localhost:" + port + "':\n    auth: {username: reader, password: " + password + "}\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		config, err := registries.Load(file)
		if err != nil {
			t.Fatal(err)
		}
		return kedge.Saver{Registries: config, Platform: "linux/arm64", Dir: dir, Say: func(line string) { t.Log(line) }}
	}

	bundle := filepath.Join(dir, "bundle.tar.zst")
	out, err := os.Create(bundle)
	if err != nil {
		t.Fatal(err)
	}
	if err := write("secret").Save(t.Context(), out, []string{name}); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	checkBundle(t, bundle, name)

	for want, s := range map[string]kedge.Saver{
		"401": write("wrong"),
		"not for that platform, but for linux/arm64": func() kedge.Saver { s := write("secret"); s.Platform = "linux/amd64"; return s }(),
	} {
		// The last written file has the right password; the first saver has read the wrong one.
		if err := s.Save(t.Context(), out, []string{name}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".kedge-images-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func checkBundle(t *testing.T, bundle, name string) {
	t.Helper()
	ctx := t.Context()
	in, err := os.Open(bundle)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	stream, err := compression.DecompressStream(in)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if stream.GetCompression() != compression.Zstd {
		t.Errorf("compression %v", stream.GetCompression())
	}
	store, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	index, err := layout.ImportIndex(ctx, store, stream)
	if err != nil {
		t.Fatal(err)
	}
	manifests, err := images.Children(ctx, store, index)
	if err != nil || len(manifests) != 1 || manifests[0].Annotations[images.AnnotationImageName] != name {
		t.Fatalf("%+v, %v", manifests, err)
	}
	complete, _, _, missing, err := images.Check(ctx, store, manifests[0], platforms.Only(platforms.MustParse("linux/arm64")))
	if err != nil || !complete {
		t.Errorf("missing %v, %v", missing, err)
	}
}
