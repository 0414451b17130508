// SPDX-License-Identifier: Apache-2.0

// Package keyring keeps small secrets that all servers of a cluster share and that change while it runs: the keys that encrypt Secrets,
// new certificate authorities. They are in the datastore, so that every server finds the same ones, and sealed with a key that is made
// of a secret on the servers' disks (pki.KeyringSecret): neither the datastore, nor a copy of its data, nor who may read it gives them away.
//
// A seal tells that a value was written by a server of this cluster under this name. It cannot tell that it is the latest one: who can
// write to the datastore can put back an older value.
package keyring

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"regexp"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Prefix of the keys in the datastore.
const Prefix = "/kedge/keyring/"

// Limits.
const (
	minSecret = 32        // bytes; 256 bits is what the seal is made for
	maxValue  = 256 << 10 // bytes; etcd takes requests up to 1.5 MiB
)

// Errors that callers tell apart.
var (
	// ErrConflict is returned by Put when the value has changed since it was read: Get it again.
	ErrConflict = errors.New("the value in the keyring has changed meanwhile")
	// ErrSealed says that a value was not sealed with this cluster's secret, under this name, or was changed since.
	ErrSealed = errors.New("it was not sealed by a server of this cluster, or has been damaged")
)

// Ring is the keyring of one cluster. Its methods may be called concurrently.
type Ring struct {
	client *clientv3.Client
	secret []byte
}

// Open gives the keyring in the datastore of client. secret is the same on all servers of the cluster, at least 32 bytes. No request
// is made yet. Closing the client is the caller's business.
func Open(client *clientv3.Client, secret []byte) (*Ring, error) {
	if len(secret) < minSecret {
		return nil, fmt.Errorf("the keyring's secret has %d bytes, it takes at least %d", len(secret), minSecret)
	}
	return &Ring{client, secret}, nil
}

// Get returns a value and its revision, which Put wants. A value that was never put is nil with revision 0. ErrSealed comes with the
// revision, so that a damaged value can be replaced by who knows what it was.
func (r *Ring) Get(ctx context.Context, name string) (data []byte, revision int64, err error) {
	if err := checkName(name); err != nil {
		return nil, 0, err
	}
	resp, err := r.client.Get(ctx, Prefix+name)
	if err != nil {
		return nil, 0, fmt.Errorf("read %s from the keyring: %w", name, err)
	}
	if len(resp.Kvs) == 0 {
		return nil, 0, nil
	}
	v := r.value(name, resp.Kvs[0])
	return v.Data, v.Revision, v.Err
}

// Put stores a value if its revision is still the given one, 0 for a value that is not there yet; else ErrConflict. When it returns nil, a
// majority of the datastore has it on disk. After another error it may have been stored or not.
func (r *Ring) Put(ctx context.Context, name string, data []byte, revision int64) error {
	if err := checkName(name); err != nil {
		return err
	}
	if len(data) == 0 || len(data) > maxValue {
		return fmt.Errorf("%s: a value of the keyring has 1 to %d bytes, not %d", name, maxValue, len(data))
	}
	aead, err := r.aead(name)
	if err != nil {
		return err
	}
	key := Prefix + name
	resp, err := r.client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).
		Then(clientv3.OpPut(key, string(aead.Seal(nil, nil, data, nil)))).Commit()
	if err != nil {
		return fmt.Errorf("write %s to the keyring: %w", name, err)
	}
	if !resp.Succeeded {
		return fmt.Errorf("%s: %w", name, ErrConflict)
	}
	return nil
}

// Value is what Watch tells.
type Value struct {
	Data     []byte // nil: there is none, or Err
	Revision int64
	Err      error // ErrSealed; others are tried again without being told
}

// Watch gives a value as it is now, also when there is none, and then each change, the last one at least when they come faster than they are
// taken. It costs nothing while nothing changes. The channel is closed when ctx ends.
func (r *Ring) Watch(ctx context.Context, name string) (<-chan Value, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	values := make(chan Value)
	go func() {
		defer close(values)
		r.watch(ctx, name, values)
	}()
	return values, nil
}

// sealed form: AES-256-GCM with a random nonce in front. The key is the value's own, so that none can stand for another.
func (r *Ring) aead(name string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, r.secret, nil, "kedge keyring v1 "+name, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

func (r *Ring) value(name string, kv *mvccpb.KeyValue) Value {
	v := Value{Revision: kv.ModRevision}
	aead, err := r.aead(name)
	if err == nil {
		if v.Data, err = aead.Open(nil, nil, kv.Value, nil); err != nil {
			err = fmt.Errorf("%s in the keyring: %w; is the file keyring.key of this server that of the others?", name, ErrSealed)
		}
	}
	v.Err = err
	return v
}

func checkName(name string) error {
	if !regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,62}[a-z0-9])?$`).MatchString(name) {
		return fmt.Errorf("%q is no name of a value in the keyring", name)
	}
	return nil
}
