// SPDX-License-Identifier: Apache-2.0

package embed

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kedge-io/kedge/pkg/embed/archive"
)

// sleeper is a program to run from a stage.
const sleeper = "/bin/sleep"

// testSource has a program, a plugin, a library and a link.
func testSource(t *testing.T, version string) source {
	t.Helper()
	program, err := os.ReadFile(sleeper)
	if err != nil {
		t.Fatal(err)
	}
	src := t.TempDir()
	for name, content := range map[string]string{
		"sleep": string(program), "runc": "runc " + version, "cni/ptp": "ptp", "lib/libc.so.6": "libc", "pause.tar": "image",
	} {
		p := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("libc.so.6", filepath.Join(src, "lib/libc.so")); err != nil {
		t.Fatal(err)
	}
	data, manifest, err := archive.Pack(src)
	if err != nil {
		t.Fatal(err)
	}
	return source{files: fstest.MapFS{archive.ArchiveName: {Data: data}, archive.ManifestName: {Data: manifest}}}
}

func mustStage(t *testing.T, src source, dataDir string) *Tree {
	t.Helper()
	tree, err := stage(t.Context(), src, dataDir, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func mustSettle(t *testing.T, tree *Tree) {
	t.Helper()
	if err := tree.Settle(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// complete fails the test unless the tree has all files with their contents, and nothing else but perhaps the marker.
func complete(t *testing.T, tree *Tree) {
	t.Helper()
	var want, got []string
	for _, f := range tree.stager.manifest.Files {
		want = append(want, f.Name)
		if err := f.Check(tree.Dir, true); err != nil {
			t.Error(err)
		}
	}
	err := filepath.WalkDir(tree.Dir, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if st, err := d.Info(); err != nil || st.Mode().Perm() != 0o755 {
				t.Errorf("directory %s: %v, %v", p, st.Mode(), err)
			}
		} else if d.Name() != marker {
			rel, _ := filepath.Rel(tree.Dir, p)
			got = append(got, rel)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files in %s (-want +got):\n%s", tree.Dir, diff)
	}
}

// names lists what is in dataDir/bin, without the lock.
func names(t *testing.T, dataDir string) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dataDir, "bin"))
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		if e.Name() != ".lock" {
			list = append(list, e.Name())
		}
	}
	return list
}

func inodeOf(t *testing.T, name string) uint64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestStage(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077)) // of a service or of a careful administrator
	dataDir := t.TempDir()
	tree := mustStage(t, testSource(t, "1"), dataDir)
	complete(t, tree)
	if diff := cmp.Diff([]string{filepath.Base(tree.Dir)}, names(t, dataDir)); diff != "" {
		t.Errorf("left beside the stage (-want +got):\n%s", diff)
	}
	if want := tree.Dir + "/runc"; tree.Path(Runc) != want {
		t.Errorf("Path(Runc) = %s, want %s", tree.Path(Runc), want)
	}
	if _, err := os.Stat(filepath.Join(tree.CNIDir(), "ptp")); err != nil {
		t.Error(err)
	}
	if image, _ := tree.PauseImage(); image != tree.Dir+"/pause.tar" {
		t.Errorf("PauseImage() = %s", image)
	}
}

func TestStageTwiceChangesNothing(t *testing.T) {
	src, dataDir := testSource(t, "1"), t.TempDir()
	for _, settle := range []bool{false, true} {
		tree := mustStage(t, src, dataDir)
		if settle {
			mustSettle(t, tree)
		}
		before := inodeOf(t, tree.Path("sleep"))
		again := mustStage(t, src, dataDir)
		if again.Dir != tree.Dir || inodeOf(t, again.Path("sleep")) != before {
			t.Errorf("settled %v: staged again although it was there", settle)
		}
		complete(t, again)
	}
}

func TestStageRepairs(t *testing.T) {
	truncate := func(name string) func(dir string) error {
		return func(dir string) error { return os.Truncate(filepath.Join(dir, name), 0) }
	}
	tests := map[string]struct {
		unsettledOnly bool
		damage        func(dir string) error
	}{
		"truncated file":    {damage: truncate("sleep")},
		"missing file":      {damage: func(dir string) error { return os.Remove(filepath.Join(dir, "cni/ptp")) }},
		"missing directory": {damage: func(dir string) error { return os.RemoveAll(filepath.Join(dir, "lib")) }},
		"missing link":      {damage: func(dir string) error { return os.Remove(filepath.Join(dir, "lib/libc.so")) }},
		"wrong mode":        {damage: func(dir string) error { return os.Chmod(filepath.Join(dir, "runc"), 0o600) }},
		"directory instead of a file": {damage: func(dir string) error {
			p := filepath.Join(dir, "runc")
			return errors.Join(os.Remove(p), os.Mkdir(p, 0o755), os.WriteFile(filepath.Join(p, "x"), nil, 0o644))
		}},
		"everything missing": {damage: func(dir string) error {
			return errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o755))
		}},
		// After a power cut: the size is there, the content is not.
		"zeros": {unsettledOnly: true, damage: func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "runc"), make([]byte, len("runc 1")), 0o755)
		}},
	}
	for name, tt := range tests {
		for _, settled := range []bool{false, true} {
			if settled && tt.unsettledOnly {
				continue
			}
			t.Run(name+map[bool]string{true: " settled"}[settled], func(t *testing.T) {
				src, dataDir := testSource(t, "1"), t.TempDir()
				tree := mustStage(t, src, dataDir)
				if settled {
					mustSettle(t, tree)
				}
				if err := tt.damage(tree.Dir); err != nil {
					t.Fatal(err)
				}
				again := mustStage(t, src, dataDir)
				complete(t, again)
				if _, err := os.Stat(filepath.Join(again.Dir, marker)); err == nil {
					t.Error("a repaired stage counts as settled")
				}
				mustSettle(t, again)
				complete(t, mustStage(t, src, dataDir))
			})
		}
	}
}

// start runs the staged program until the test ends or stop is called.
func start(t *testing.T, program string) (stop func()) {
	t.Helper()
	cmd := exec.Command(program, "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	stop = func() {
		if !ended {
			ended = true
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
	t.Cleanup(stop)
	return stop
}

func TestRepairLeavesRunningProgramsAlone(t *testing.T) {
	src, dataDir := testSource(t, "1"), t.TempDir()
	tree := mustStage(t, src, dataDir)
	mustSettle(t, tree)
	start(t, tree.Path("sleep"))
	running := inodeOf(t, tree.Path("sleep"))
	if err := os.Remove(tree.Path(Runc)); err != nil {
		t.Fatal(err)
	}
	mustStage(t, src, dataDir)
	if inodeOf(t, tree.Path("sleep")) != running {
		t.Error("a program that was not damaged was replaced")
	}
	// Even a damaged program is replaced and not overwritten: writing to one that runs fails with ETXTBSY.
	if err := os.Chmod(tree.Path("sleep"), 0o700); err != nil {
		t.Fatal(err)
	}
	complete(t, mustStage(t, src, dataDir))
}

func TestStageAfterCrash(t *testing.T) {
	src, dataDir := testSource(t, "1"), t.TempDir()
	half := filepath.Join(dataDir, "bin", tempPrefix+"123")
	if err := os.MkdirAll(filepath.Join(half, "lib"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(half, "runc"), []byte("ru"), 0o755); err != nil {
		t.Fatal(err)
	}
	tree := mustStage(t, src, dataDir)
	complete(t, tree)
	if diff := cmp.Diff([]string{filepath.Base(tree.Dir)}, names(t, dataDir)); diff != "" {
		t.Errorf("left beside the stage (-want +got):\n%s", diff)
	}
}

func TestSettleRemovesFormerStages(t *testing.T) {
	dataDir := t.TempDir()
	unused := mustStage(t, testSource(t, "1"), dataDir)
	used := mustStage(t, testSource(t, "2"), dataDir)
	stop := start(t, used.Path("sleep"))
	foreign := filepath.Join(dataDir, "bin", "my-scripts")
	if err := os.Mkdir(foreign, 0o755); err != nil {
		t.Fatal(err)
	}

	current := mustStage(t, testSource(t, "3"), dataDir)
	mustSettle(t, current)
	for dir, want := range map[string]bool{unused.Dir: false, used.Dir: true, current.Dir: true, foreign: true} {
		if _, err := os.Stat(dir); (err == nil) != want {
			t.Errorf("%s exists: %v, want %v", dir, err == nil, want)
		}
	}
	complete(t, used)

	stop()
	mustSettle(t, current)
	if _, err := os.Stat(used.Dir); err == nil {
		t.Error("a former stage is still there after its last process")
	}
}

func TestStageErrors(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	good := testSource(t, "1")
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		src     source
		dataDir string
		want    string
	}{
		"nothing embedded":          {source{files: fstest.MapFS{".gitkeep": {}}}, t.TempDir(), "make build"},
		"manifest without archive":  {source{files: fstest.MapFS{archive.ManifestName: good.files.(fstest.MapFS)[archive.ManifestName]}}, t.TempDir(), "make build"},
		"data directory is a file":  {good, file, "not a directory"},
		"path with a colon":         {good, filepath.Join(t.TempDir(), "a:b"), "characters"},
		"manifest leads out of it":  {source{files: fstest.MapFS{archive.ManifestName: {Data: []byte(`{"files":[{"name":"../../evil"}]}`)}}}, t.TempDir(), "../../evil"},
		"manifest is not a listing": {source{files: fstest.MapFS{archive.ManifestName: {Data: []byte(`[]`)}}}, t.TempDir(), "manifest"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := stage(t.Context(), tt.src, tt.dataDir, log)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
			if entries, err := os.ReadDir(filepath.Join(tt.dataDir, "bin")); err == nil {
				for _, e := range entries {
					if e.Name() != ".lock" {
						t.Errorf("%s was left", e.Name())
					}
				}
			}
		})
	}
}

func TestStageWaitsForAnother(t *testing.T) {
	dataDir := t.TempDir()
	base := filepath.Join(dataDir, "bin")
	if err := os.Mkdir(base, 0o755); err != nil {
		t.Fatal(err)
	}
	unlock, err := lock(t.Context(), base)
	if err != nil {
		t.Fatal(err)
	}
	src := testSource(t, "1")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := stage(ctx, src, dataDir, slog.New(slog.DiscardHandler)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v while another process stages, want the end of the context", err)
	}
	unlock()
	complete(t, mustStage(t, src, dataDir))
}

// TestEmbedded checks the real thing when it was built.
func TestEmbedded(t *testing.T) {
	tree, err := Stage(t.Context(), t.TempDir(), slog.New(slog.NewTextHandler(t.Output(), nil)))
	if errors.Is(err, ErrNoAssets) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	complete(t, tree)
	image, _ := tree.PauseImage()
	for _, name := range []string{tree.Path(Runc), tree.Path(Shim), tree.Path("nft"), tree.Path("iptables"), tree.Path("ip6tables-restore"),
		tree.Path("iptables-legacy-save"), tree.Path("ipset"), tree.Path("conntrack"), tree.CNIDir() + "/ptp", tree.CNIDir() + "/host-local",
		tree.CNIDir() + "/portmap", tree.CNIDir() + "/bandwidth", tree.CNIDir() + "/loopback", image} {
		if _, err := os.Stat(name); err != nil {
			t.Error(err)
		}
	}
}
