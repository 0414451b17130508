// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"bytes"
	"encoding/binary"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/clientcmd"
)

// shared is what a server hands over to one that joins.
func shared(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for _, name := range SharedFiles() {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		files[name] = data
	}
	return files
}

// newCluster makes the keys of a cluster and returns their directory.
func newCluster(t *testing.T) string {
	t.Helper()
	cfg := testConfig(t.TempDir())
	mustEnsure(t, cfg)
	return cfg.Dir
}

func TestImport(t *testing.T) {
	files := shared(t, newCluster(t))
	cfg := testConfig(t.TempDir())
	cfg.NodeName = "node2"
	if err := Import(cfg.Dir, files); err != nil {
		t.Fatal(err)
	}
	imported := snapshot(t, cfg.Dir)
	if len(imported) != len(files) {
		t.Errorf("%d files instead of %d", len(imported), len(files))
	}
	for name, data := range files {
		if imported[name] != string(data) {
			t.Errorf("%s is not what was handed over", name)
		}
		if info, err := os.Stat(filepath.Join(cfg.Dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	if info, err := os.Stat(cfg.Dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v, %v", info.Mode(), err)
	}

	// A server goes on with what it has imported, and after its first start, too, a repetition changes nothing.
	p := mustEnsure(t, cfg)
	if hash, err := HashOfCA(files["server-ca.crt"]); err != nil || p.CAHash() != "sha256:"+hash {
		t.Errorf("the new server has the CA %s, the cluster %s (%v)", p.CAHash(), hash, err)
	}
	before := snapshot(t, cfg.Dir)
	if err := Import(cfg.Dir, files); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if diff := changed(before, snapshot(t, cfg.Dir)); len(diff) > 0 {
		t.Errorf("a second time changes %v", diff)
	}
}

// What was cut off is completed by the next try.
func TestImportAfterInterruption(t *testing.T) {
	files := shared(t, newCluster(t))
	dir := filepath.Join(t.TempDir(), "pki")
	if err := Import(dir, files); err != nil {
		t.Fatal(err)
	}
	whole := snapshot(t, dir)
	for name := range files {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		if err := Import(dir, files); err != nil {
			t.Errorf("without %s: %v", name, err)
		}
		if diff := changed(whole, snapshot(t, dir)); len(diff) > 0 {
			t.Errorf("without %s: %v differ", name, diff)
		}
	}
}

// Whatever is refused leaves the directory as it was.
func TestImportRefuses(t *testing.T) {
	files := shared(t, newCluster(t))
	for _, test := range []struct {
		name  string
		files func() map[string][]byte
		have  string // in the directory: a file of another cluster
		want  string
	}{
		{"nothing", func() map[string][]byte { return nil }, "", "did not hand over server-ca.key"},
		{"a missing file", func() map[string][]byte { f := maps.Clone(files); delete(f, "encryption.yaml"); return f }, "",
			"did not hand over encryption.yaml: is it of an older version? upgrade it first"},
		{"an empty file", func() map[string][]byte { f := maps.Clone(files); f["etcd-ca.crt"] = nil; return f }, "", "did not hand over etcd-ca.crt"},
		{"another cluster's CA", func() map[string][]byte { return files }, "server-ca.crt", "server-ca.crt is that of another cluster: this machine was part of one before; move "},
		{"another cluster's key", func() map[string][]byte { return files }, "service-account.key", "service-account.key is that of another cluster"},
		{"another cluster's encryption", func() map[string][]byte { return files }, "encryption.yaml", "encryption.yaml is that of another cluster"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "pki")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if test.have != "" {
				if err := os.WriteFile(filepath.Join(dir, test.have), []byte("another cluster's"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			before := snapshot(t, dir)
			if err := Import(dir, test.files()); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			if diff := changed(before, snapshot(t, dir)); len(diff) > 0 {
				t.Errorf("changed: %v", diff)
			}
		})
	}
}

// A server that was away while the keys of Secrets changed comes back with the old ones.
func TestImportNewEncryption(t *testing.T) {
	files := shared(t, newCluster(t))
	dir := filepath.Join(t.TempDir(), "pki")
	if err := Import(dir, files); err != nil {
		t.Fatal(err)
	}
	files["encryption.yaml"] = bytes.Replace(files["encryption.yaml"], []byte("key1"), []byte("key2"), 1)
	if err := Import(dir, files); err != nil {
		t.Fatal(err)
	}
	if have, err := os.ReadFile(filepath.Join(dir, "encryption.yaml")); err != nil || !bytes.Equal(have, files["encryption.yaml"]) {
		t.Errorf("%s, %v", have, err)
	}
}

// A crash at any moment leaves no certificate without its key. The kernel tells in which order the files came.
func TestImportWritesKeysFirst(t *testing.T) {
	files := shared(t, newCluster(t))
	dir := t.TempDir()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_MOVED_TO); err != nil {
		t.Fatal(err)
	}
	if err := Import(dir, files); err != nil {
		t.Fatal(err)
	}
	events := make([]byte, 64<<10)
	n, err := unix.Read(fd, events)
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for rest := events[:n]; len(rest) >= unix.SizeofInotifyEvent; {
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(rest[12:]))
		order = append(order, string(bytes.TrimRight(rest[unix.SizeofInotifyEvent:end], "\x00")))
		rest = rest[end:]
	}
	if len(order) != len(files) {
		t.Errorf("%d files came into the directory: %v", len(order), order)
	}
	isCert := func(name string) bool { return strings.HasSuffix(name, ".crt") }
	if first := slices.IndexFunc(order, isCert); slices.ContainsFunc(order[max(first, 0):], func(name string) bool { return !isCert(name) }) {
		t.Errorf("a key came after a certificate: %v", order)
	}
}

func TestHashOfCA(t *testing.T) {
	dir := newCluster(t)
	files := shared(t, dir)
	hash, err := HashOfCA(files["server-ca.crt"])
	if err != nil || len(hash) != 64 || strings.Trim(hash, "0123456789abcdef") != "" {
		t.Errorf("got %q, %v", hash, err)
	}
	// A bundle is known by its first certificate, and what is around it does not matter.
	if again, err := HashOfCA(slices.Concat([]byte("comment\n"), files["server-ca.crt"], files["client-ca.crt"])); again != hash {
		t.Errorf("in a bundle: %q, %v", again, err)
	}
	if other, err := HashOfCA(files["client-ca.crt"]); err != nil || other == hash {
		t.Errorf("another CA: %q, %v", other, err)
	}
	for name, text := range map[string][]byte{"nothing": nil, "no PEM": []byte("x"), "a key": files["server-ca.key"],
		"damaged": bytes.Replace(files["server-ca.crt"], []byte("\nMII"), []byte("\nAII"), 1)} {
		if hash, err := HashOfCA(text); err == nil || hash != "" {
			t.Errorf("%s: %q, %v", name, hash, err)
		}
	}
}

func agentOf(t *testing.T, dir string, files map[string][]byte) Agent {
	return Agent{Dir: filepath.Join(t.TempDir(), "pki"), ServerCA: files["server-ca.crt"], ClientCA: files["client-ca.crt"],
		Credentials: filepath.Join(dir, "kubelet-client.pem"), BalancerPort: 6444}
}

func TestAgentWrite(t *testing.T) {
	dir := newCluster(t)
	files := shared(t, dir)
	a := agentOf(t, dir, files)
	if err := a.Write(); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{a.ServerCAFile(), a.ClientCAFile(), a.KubeconfigFile()} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	for path, want := range map[string][]byte{a.ServerCAFile(): a.ServerCA, a.ClientCAFile(): a.ClientCA} {
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s holds %q, %v", path, got, err)
		}
	}
	config, err := clientcmd.BuildConfigFromFlags("", a.KubeconfigFile())
	if err != nil {
		t.Fatal(err)
	}
	if config.Host != "https://127.0.0.1:6444" || config.CAFile != a.ServerCAFile() || config.CertFile != a.Credentials || config.KeyFile != a.Credentials {
		t.Errorf("kubeconfig: %s, CA %s, certificate %s, key %s", config.Host, config.CAFile, config.CertFile, config.KeyFile)
	}
	if names := snapshot(t, a.Dir); len(names) != 3 {
		t.Errorf("%d files", len(names))
	}

	// A repetition writes nothing, and what was opened to others is closed again.
	written := modTimes(t, a)
	if err := os.Chmod(a.KubeconfigFile(), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := a.Write(); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if again := modTimes(t, a); !slices.Equal(again, written) {
		t.Errorf("written at %v, and again at %v", written, again)
	}
	if info, err := os.Stat(a.KubeconfigFile()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("kubeconfig: %v, %v", info.Mode(), err)
	}
	a.BalancerPort = 7444
	if err := a.Write(); err != nil {
		t.Errorf("another port: %v", err)
	}
	if config, err := clientcmd.BuildConfigFromFlags("", a.KubeconfigFile()); err != nil || config.Host != "https://127.0.0.1:7444" {
		t.Errorf("another port: %v, %v", config, err)
	}
}

func modTimes(t *testing.T, a Agent) []time.Time {
	t.Helper()
	var times []time.Time
	for _, path := range []string{a.ServerCAFile(), a.ClientCAFile(), a.KubeconfigFile()} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		times = append(times, info.ModTime())
	}
	return times
}

// A machine that was part of another cluster is not made part of this one unnoticed.
func TestAgentOfAnotherCluster(t *testing.T) {
	dir := newCluster(t)
	a := agentOf(t, dir, shared(t, dir))
	if err := a.Write(); err != nil {
		t.Fatal(err)
	}
	other := a
	other.ServerCA = shared(t, newCluster(t))["server-ca.crt"]
	for name, test := range map[string]struct {
		agent Agent
		have  []byte // instead of the server CA that is there
		want  string
	}{
		"another CA":     {other, nil, "server-ca.crt is that of another cluster, or from before this one changed its CAs: this machine was part of it before; move " + a.Dir + " away first"},
		"no CA":          {Agent{Dir: a.Dir}, nil, "is that of another cluster"},
		"a damaged file": {a, []byte("nonsense"), "server-ca.crt is damaged"},
	} {
		if test.have != nil {
			if err := os.WriteFile(a.ServerCAFile(), test.have, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		before := snapshot(t, a.Dir)
		if err := test.agent.Write(); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", name, err, test.want)
		}
		if diff := changed(before, snapshot(t, a.Dir)); len(diff) > 0 {
			t.Errorf("%s: changed %v", name, diff)
		}
		if err := os.WriteFile(a.ServerCAFile(), a.ServerCA, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
