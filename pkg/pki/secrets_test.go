// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"bytes"
	"os"
	"regexp"
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
