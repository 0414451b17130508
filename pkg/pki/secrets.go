// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	apiserverv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"sigs.k8s.io/yaml"
)

// loadSecrets loads or makes the keys that have no certificate, and returns the files to write.
func (p *PKI) loadSecrets() ([]file, error) {
	serviceAccount, err := loadServiceAccountKey(p.KeyFile(ServiceAccount))
	if err != nil {
		return nil, err
	}
	if p.hasRun && serviceAccount != nil {
		p.log.Warn("service-account key was missing, made a new one: pods' tokens are refused until they are renewed within an hour")
	}
	keyring, err := loadKeyringSecret(p.KeyFile(Keyring), p.KeyFile(ServiceAccount))
	if err != nil {
		return nil, err
	}
	path := p.EncryptionConfigFile()
	encryption, err := loadEncryptionConfig(path)
	if err != nil {
		return nil, err
	}
	if p.hasRun && encryption != nil {
		return nil, fmt.Errorf("%s is missing, but this server has run before: without it the Secrets in the datastore cannot be read; "+
			"restore it from a backup or from another server of the cluster; only if all Secrets may be lost, remove %s too, "+
			"and the next start makes a new key", path, filepath.Join(p.cfg.Dir, "*.pem"))
	}
	return slices.Concat(serviceAccount, keyring, encryption), nil
}

// loadKeyringSecret checks the secret at path or, if there is none, makes one and returns it as a file to write. Where there is a
// service-account key already, this is a server of a cluster from before there was a keyring: all its servers have that key alike, and
// make the same secret of it, each for itself. From then on it is a file of its own, and the service-account key may change.
func loadKeyringSecret(path, serviceAccountPath string) ([]file, error) {
	_, err := KeyringSecret(path)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	secret := make([]byte, keyringSecretSize)
	old, err := readSecret(serviceAccountPath)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		_, err = rand.Read(secret)
	case err == nil:
		secret, err = hkdf.Key(sha256.New, old, nil, "kedge keyring secret v1", keyringSecretSize)
	}
	if err != nil {
		return nil, fmt.Errorf("make the secret of the keyring: %w", err)
	}
	return []file{{path: path, data: []byte(base64.StdEncoding.EncodeToString(secret) + "\n"), mode: 0o600}}, nil
}

const keyringSecretSize = 32 // bytes

// KeyringSecret reads the secret of package keyring that all servers of a cluster have on disk.
func KeyringSecret(path string) ([]byte, error) {
	text, err := readSecret(path)
	if err != nil {
		return nil, fmt.Errorf("load the secret of the keyring: %w", err)
	}
	secret, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(secret) != keyringSecretSize {
		return nil, fmt.Errorf("%s is damaged: it is not %d bytes in base64; restore it from a backup or from another server of the cluster", path, keyringSecretSize)
	}
	return secret, nil
}

// WriteEncryptionConfig replaces the EncryptionConfiguration at path, durable against power loss. One that says the same is not written.
func WriteEncryptionConfig(path string, data []byte) error {
	dir, err := lockDir(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("PKI directory: %w", err)
	}
	defer dir.Close()
	if err := checkEncryptionConfig(data); err != nil {
		return fmt.Errorf("new %s: %w", path, err)
	}
	f := file{path: path, data: data, mode: 0o600}
	if same, err := unchanged(f); same || err != nil {
		return err
	}
	return writeFiles([]file{f})
}

func loadServiceAccountKey(path string) ([]file, error) {
	data, err := readSecret(path)
	if errors.Is(err, fs.ErrNotExist) {
		if _, data, err = newKey(); err != nil {
			return nil, fmt.Errorf("make the service-account key: %w", err)
		}
		return []file{{path: path, data: data, mode: 0o600}}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("load the service-account key: %w", err)
	}
	if _, err := parseKey(data); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w; restore it from a backup or from another server of the cluster, or remove it to have "+
			"a new one made (pods' tokens are refused until they are renewed within an hour)", path, err)
	}
	return nil, nil
}

// loadEncryptionConfig checks the EncryptionConfiguration at path or, if there is none, makes one with a random key and returns it
// as a file to write. Secrets are encrypted by secretbox (XSalsa20 and Poly1305); what was stored in the clear can still be read.
func loadEncryptionConfig(path string) ([]file, error) {
	data, err := readSecret(path)
	if errors.Is(err, fs.ErrNotExist) {
		if data, err = newEncryptionConfig(); err != nil {
			return nil, fmt.Errorf("make the encryption configuration: %w", err)
		}
		return []file{{path: path, data: data, mode: 0o600}}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("load the encryption configuration: %w", err)
	}
	if err := checkEncryptionConfig(data); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w; the Secrets in the datastore cannot be read without it: restore it from a backup "+
			"or from another server of the cluster", path, err)
	}
	return nil, nil
}

func newEncryptionConfig() ([]byte, error) {
	key := make([]byte, 32)
	if _, err := rand.Read(key); err != nil {
		return nil, err
	}
	config := apiserverv1.EncryptionConfiguration{
		Resources: []apiserverv1.ResourceConfiguration{{
			Resources: []string{"secrets"},
			Providers: []apiserverv1.ProviderConfiguration{
				{Secretbox: &apiserverv1.SecretboxConfiguration{
					Keys: []apiserverv1.Key{{Name: "key1", Secret: base64.StdEncoding.EncodeToString(key)}},
				}},
				{Identity: &apiserverv1.IdentityConfiguration{}},
			},
		}},
	}
	config.SetGroupVersionKind(apiserverv1.SchemeGroupVersion.WithKind("EncryptionConfiguration"))
	return yaml.Marshal(config)
}

// checkEncryptionConfig finds what a broken disk or editor does; the API server itself checks the details at its start.
func checkEncryptionConfig(data []byte) error {
	var config apiserverv1.EncryptionConfiguration
	if err := yaml.UnmarshalStrict(data, &config); err != nil {
		return err
	}
	if config.Kind != "EncryptionConfiguration" || len(config.Resources) == 0 {
		return errors.New("it is not an EncryptionConfiguration with resources")
	}
	return nil
}
