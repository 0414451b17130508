// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"

	"github.com/kedge-io/kedge/tests/golden"
)

func TestEncryptionConfig(t *testing.T) {
	path := mustEnsure(t, testConfig(t.TempDir())).EncryptionConfigFile()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "testdata/encryption.golden", regexp.MustCompile(`secret: [A-Za-z0-9+/]{43}=\n`).ReplaceAllString(string(data), "secret: KEY\n"))

	// The API server's own code loads it, encrypts with it, and reads what was stored in the clear before.
	config, err := encryptionconfig.LoadEncryptionConfig(t.Context(), path, false, "")
	if err != nil {
		t.Fatal(err)
	}
	transformer := config.Transformers[schema.GroupResource{Resource: "secrets"}]
	where := value.DefaultContext("/registry/secrets/default/s")
	plain := []byte("k8s\x00secret")
	stored, err := transformer.TransformToStorage(t.Context(), plain, where)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(stored, []byte("k8s:enc:secretbox:v1:key1:")) || bytes.Contains(stored, plain) {
		t.Errorf("stored as %q", stored)
	}
	for _, in := range [][]byte{stored, plain} {
		if got, _, err := transformer.TransformFromStorage(t.Context(), in, where); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("read %q as %q, %v", in, got, err)
		}
	}
}

// TestKeyringSecret: servers of a cluster from before there was a keyring make the same secret, each for itself; a new cluster's is random.
func TestKeyringSecret(t *testing.T) {
	read := func(cfg Config) string {
		t.Helper()
		p := mustEnsure(t, cfg)
		secret, err := KeyringSecret(p.KeyFile(Keyring))
		if err != nil {
			t.Fatal(err)
		}
		return string(secret)
	}
	one, two := testConfig(t.TempDir()), testConfig(t.TempDir())
	first := read(one)
	if first != read(one) {
		t.Error("the secret does not stay")
	}
	if first == read(two) {
		t.Error("two clusters have one secret")
	}
	forget := func(cfg Config) {
		t.Helper()
		if err := os.Remove(filepath.Join(cfg.Dir, "keyring.key")); err != nil {
			t.Fatal(err)
		}
	}
	forget(one)
	forget(two)
	key, err := os.ReadFile(filepath.Join(one.Dir, "service-account.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(two.Dir, "service-account.key"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	if derived := read(one); derived != read(two) || derived == first {
		t.Error("two old servers of one cluster do not make the same secret")
	}
}

func TestWriteEncryptionConfig(t *testing.T) {
	p := mustEnsure(t, testConfig(t.TempDir()))
	path := p.EncryptionConfigFile()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := WriteEncryptionConfig(path, data[:10]); err == nil {
		t.Error("a broken configuration was written")
	}
	changed := strings.Replace(string(data), "key1", "key7", 1)
	if err := WriteEncryptionConfig(path, []byte(changed)); err != nil {
		t.Fatal(err)
	}
	if have, err := os.ReadFile(path); err != nil || string(have) != changed {
		t.Errorf("%s, %v", have, err)
	}
}
