// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/kedge-io/kedge/pkg/keyring"
	"github.com/kedge-io/kedge/pkg/pki"
)

// RecoveryKey is what snapshots' keys are encrypted with, the same for all servers of the cluster. It is in the keyring: a server that can
// read it there holds all those keys anyway, so that the operator may ask for it again at any time, on any server.
type RecoveryKey struct {
	Identity   string    `json:"identity"`             // AGE-SECRET-KEY-1…; secret
	Further    []string  `json:"recipients,omitempty"` // further ones that can decrypt, age1…, whose identities are elsewhere
	Created    time.Time `json:"created"`
	WrittenOut time.Time `json:"writtenOut,omitzero"` // when the operator was given it last
}

// ringName is the name of the recovery key in the keyring.
const ringName = "recovery-key"

// Recipients are all that can decrypt, the key's own first.
func (k *RecoveryKey) Recipients() ([]string, error) {
	id, err := age.ParseX25519Identity(k.Identity)
	if err != nil {
		return nil, fmt.Errorf("the recovery key in the keyring: %w", err)
	}
	return append([]string{id.Recipient().String()}, k.Further...), nil
}

// Text is the file that the operator keeps, in the form that age itself reads.
func (k *RecoveryKey) Text(cluster string) (string, error) {
	all, err := k.Recipients()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("# Kedge recovery key of the cluster with CA hash sha256:%s\n# made: %s\n# public key: %s\n%s\n", cluster, k.Created.Format(time.RFC3339), all[0], k.Identity), nil
}

// ring is the part of keyring.Ring that is used here.
type ring interface {
	Get(ctx context.Context, name string) (data []byte, revision int64, err error)
	Put(ctx context.Context, name string, data []byte, revision int64) error
}

var _ ring = (*keyring.Ring)(nil)

// changeKey makes the cluster's recovery key if there is none, and changes it. change returns whether it changed anything.
func changeKey(ctx context.Context, r ring, change func(*RecoveryKey) (bool, error)) (*RecoveryKey, error) {
	for {
		data, revision, err := r.Get(ctx, ringName)
		if err != nil {
			return nil, err
		}
		k := &RecoveryKey{}
		made := data == nil
		if made {
			if err := k.renew(); err != nil {
				return nil, err
			}
		} else if err := json.Unmarshal(data, k); err != nil {
			return nil, fmt.Errorf("the recovery key in the keyring: %w", err)
		}
		changed, err := change(k)
		if err != nil || !changed && !made {
			return k, err
		}
		text, err := json.Marshal(k)
		if err != nil {
			return nil, err
		}
		// Another server may make one at the same moment: one of the two wins, and all use that.
		if err = r.Put(ctx, ringName, text, revision); !errors.Is(err, keyring.ErrConflict) {
			return k, err
		}
	}
}

func (k *RecoveryKey) renew() error {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return err
	}
	k.Identity, k.Created, k.WrittenOut = id.String(), time.Now().UTC().Truncate(time.Second), time.Time{}
	return nil
}

// KeyChange is what is to become of the recovery key.
type KeyChange struct {
	New         bool     // make another one; snapshots taken before need the old one
	Add, Remove []string // further recipients
	WriteOut    bool     // the operator is given it
}

// ChangeKey reads the cluster's recovery key from the datastore on this server, makes it if there is none, and changes it.
func ChangeKey(ctx context.Context, s Settings, c KeyChange) (key *RecoveryKey, cluster string, err error) {
	for _, r := range c.Add {
		if _, err := parseRecipient(r); err != nil {
			return nil, "", err
		}
	}
	if cluster, err = localCluster(s.PKIDir); err != nil {
		return nil, "", err
	}
	db, err := openRing(s)
	if err != nil {
		return nil, "", err
	}
	defer db.Close()
	key, err = changeKey(ctx, db.ring, func(k *RecoveryKey) (bool, error) {
		changed := false
		if c.New {
			if err := k.renew(); err != nil {
				return false, err
			}
			changed = true
		}
		for _, r := range c.Add {
			if !slices.Contains(k.Further, r) {
				k.Further, changed = append(k.Further, r), true
			}
		}
		for _, r := range c.Remove {
			i := slices.Index(k.Further, r)
			if i < 0 {
				return false, fmt.Errorf("%s is not among the further recipients: %s", r, strings.Join(k.Further, ", "))
			}
			k.Further, changed = slices.Delete(k.Further, i, i+1), true
		}
		if c.WriteOut {
			k.WrittenOut, changed = time.Now().UTC().Truncate(time.Second), true
		}
		return changed, nil
	})
	return key, cluster, err
}

func parseRecipient(text string) (age.Recipient, error) {
	r, err := age.ParseRecipients(strings.NewReader(text))
	if err != nil || len(r) != 1 {
		return nil, fmt.Errorf("%q is not the public key of a recovery key: it begins with age1", text)
	}
	return r[0], nil
}

// localCluster is the hash of the CA in a PKI directory.
func localCluster(pkiDir string) (string, error) {
	cert, err := os.ReadFile(filepath.Join(pkiDir, string(pki.ServerCA)+".crt"))
	if err != nil {
		return "", err
	}
	return pki.HashOfCA(cert)
}

// localIdentity is that of the cluster that a PKI directory belongs to.
func localIdentity(pkiDir string) (Identity, error) {
	ca, err := localCluster(pkiDir)
	if err != nil {
		return Identity{}, err
	}
	files, err := readKeys(pkiDir)
	return Identity{Ring: digests(files)[keyringFile], CA: ca}, err
}

// readKeys reads the keys that all servers of the cluster share.
func readKeys(pkiDir string) (map[string][]byte, error) {
	files := map[string][]byte{}
	for _, name := range pki.SharedFiles() {
		data, err := os.ReadFile(filepath.Join(pkiDir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("keys of the cluster: %w", err)
		}
		files[name] = data
	}
	return files, nil
}

// digests of the keys: of long random content, so that they tell nothing about it.
func digests(files map[string][]byte) map[string]string {
	sums := map[string]string{}
	for name, data := range files {
		sum := sha256.Sum256(data)
		sums[name] = hex.EncodeToString(sum[:])
	}
	return sums
}

// sealKeys encrypts them.
func sealKeys(files map[string][]byte, recipients []string) ([]byte, error) {
	var to []age.Recipient
	for _, text := range recipients {
		r, err := parseRecipient(text)
		if err != nil {
			return nil, err
		}
		to = append(to, r)
	}
	text, err := json.Marshal(files)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	w, err := age.Encrypt(&out, to...)
	if err != nil {
		return nil, fmt.Errorf("encrypt the keys of the cluster: %w", err)
	}
	if _, err := w.Write(text); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// ErrRecoveryKey says that a recovery key is needed, or another one.
var ErrRecoveryKey = errors.New("the recovery key is needed")

// openKeys decrypts them. identities is the text of the operator's file.
func openKeys(m *Metadata, sealed []byte, identities string) (map[string][]byte, error) {
	ids, err := age.ParseIdentities(strings.NewReader(identities))
	if err != nil {
		return nil, fmt.Errorf("%w: what was given is none (AGE-SECRET-KEY-1…): %w", ErrRecoveryKey, err)
	}
	r, err := age.Decrypt(bytes.NewReader(sealed), ids...)
	if err != nil {
		if _, wrong := errors.AsType[*age.NoIdentityMatchError](err); wrong {
			return nil, fmt.Errorf("%w: the keys in the snapshot %s are encrypted to %s, and the key given is another one", ErrRecoveryKey, m.Name, strings.Join(m.Recipients, ", "))
		}
		return nil, damaged("keys: %w", err)
	}
	text, err := io.ReadAll(io.LimitReader(r, maxKeys))
	if err != nil {
		return nil, damaged("keys: %w", err)
	}
	var files map[string][]byte
	if err := json.Unmarshal(text, &files); err != nil {
		return nil, damaged("keys: %w", err)
	}
	for name := range files {
		// They become files: names of a newer Kedge's are fine, paths are not.
		if !regexp.MustCompile(`^[a-z0-9][a-z0-9-]*\.[a-z]+$`).MatchString(name) {
			return nil, damaged("a key called %q", name)
		}
	}
	for name, sum := range digests(files) {
		if m.Keys[name] != sum {
			return nil, damaged("the key %s does not have its digest", name)
		}
	}
	return files, nil
}
