// SPDX-License-Identifier: Apache-2.0

package encryption

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"

	"github.com/kedge-io/kedge/pkg/keyring"
	"github.com/kedge-io/kedge/pkg/pki"
)

// ringName is the name of the State in the keyring.
const ringName = "encryption"

// Config of a Keeper.
type Config struct {
	NodeName string
	// File is the EncryptionConfiguration that the API server reads.
	File  string
	Ring  *keyring.Ring
	Store *clientv3.Client
	// Prefix of the API server's objects in the datastore, as /registry.
	Prefix string
	// Foreign says why the keeper leaves the encryption alone, as the operator has a configuration of their own; empty: it keeps it.
	Foreign string
	Logger  *slog.Logger
}

// Keeper makes one API server follow the State in the keyring. Its life: Prepare before the API server reads its configuration, then Run.
type Keeper struct {
	Config

	mu      sync.Mutex
	loaded  Loaded
	foreign string
}

// Loaded is what an API server works with.
type Loaded struct {
	Generation int64  `json:"generation"` // of the State
	Hash       string `json:"hash"`       // of the configuration, 12 hexadecimal digits
	Error      string `json:"error,omitempty"`
}

// NewKeeper makes no request yet.
func NewKeeper(cfg Config) *Keeper { return &Keeper{Config: cfg, foreign: cfg.Foreign} }

// Prepare makes the file what the keyring says. The API server must not start before: it would not be able to read what others have
// written, or write what they do not read. Without a value in the keyring the file is as good as any.
func (k *Keeper) Prepare(ctx context.Context) error {
	if k.Foreign != "" {
		return nil
	}
	data, _, err := k.Ring.Get(ctx, ringName)
	switch {
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		// An operator's etcd whose user may not see more than the API server's objects: as before there was a keyring.
		k.leave("the datastore's user may not read " + keyring.Prefix)
		return nil
	case err != nil:
		return err
	case data == nil:
		return k.adopted()
	}
	state, err := Parse(data)
	if err != nil {
		return err
	}
	hash, err := k.write(state)
	if err == nil {
		k.setLoaded(Loaded{Generation: state.Generation, Hash: hash})
	}
	return err
}

// adopted takes the file as it is.
func (k *Keeper) adopted() error {
	text, err := os.ReadFile(k.File)
	if err != nil {
		return err
	}
	if _, err := Adopt(text); err != nil {
		k.leave(err.Error() + " (" + k.File + ")")
	}
	k.setLoaded(Loaded{Hash: hashOf(text)})
	return nil
}

// leave tells once that the encryption is the operator's own business.
func (k *Keeper) leave(why string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.foreign != why {
		k.Logger.Warn("Kedge does not manage the encryption of Secrets", "reason", why)
	}
	k.foreign = why
}

// Follows says whether Run has something to do.
func (k *Keeper) Follows() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.foreign == ""
}

// Run follows the keyring until ctx ends. It is the only one that changes the transformers.
func (k *Keeper) Run(ctx context.Context, transformers *encryptionconfig.DynamicTransformers) {
	values, err := k.Ring.Watch(ctx, ringName)
	if err != nil {
		k.Logger.Error("the keyring is not followed", "error", err)
		return
	}
	for v := range values {
		switch {
		case v.Err != nil:
			k.fail(v.Err)
		case v.Data == nil:
			k.put(ctx)
		default:
			k.reload(ctx, v.Data, transformers)
		}
	}
}

// put makes what the file says the State of a cluster that has none yet; another server may be faster. With it, a copy of the datastore has
// the keys that it was written with.
func (k *Keeper) put(ctx context.Context) {
	text, err := os.ReadFile(k.File)
	if err == nil {
		var state *State
		if state, err = Adopt(text); err == nil {
			err = k.store(ctx, state, 0)
		}
	}
	if err != nil && !errors.Is(err, keyring.ErrConflict) && ctx.Err() == nil {
		k.Logger.Warn("the encryption keys are not in the keyring yet; the next start tries again", "error", err)
	}
}

func (k *Keeper) store(ctx context.Context, state *State, revision int64) error {
	data, err := json.Marshal(state)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return k.Ring.Put(ctx, ringName, data, revision)
}

// reload makes the API server use a State. What was loaded before stays in use when that fails.
func (k *Keeper) reload(ctx context.Context, data []byte, transformers *encryptionconfig.DynamicTransformers) {
	state, err := Parse(data)
	if err != nil {
		k.fail(err)
		return
	}
	before := k.Loaded()
	hash, err := k.write(state)
	if err == nil && hash != before.Hash {
		err = load(ctx, k.File, transformers)
	}
	if err != nil {
		k.fail(err)
		return
	}
	k.setLoaded(Loaded{Generation: state.Generation, Hash: hash})
	if hash != before.Hash {
		k.Logger.Info("new configuration of the encryption of Secrets", "writes", state.Writer().Name, "stage", state.Stage, "hash", hash)
	}
}

// load is what upstream's controller does when it finds that the file has changed, for which it looks once a minute.
func load(ctx context.Context, file string, transformers *encryptionconfig.DynamicTransformers) error {
	ctx, cancel := context.WithCancel(ctx)
	c, err := encryptionconfig.LoadEncryptionConfig(ctx, file, true, "")
	if err == nil && len(c.HealthChecks) != 1 {
		err = fmt.Errorf("%d health checks instead of one", len(c.HealthChecks))
	}
	if err != nil {
		cancel()
		return fmt.Errorf("load %s: %w", file, err)
	}
	transformers.Set(c.Transformers, cancel, c.HealthChecks[0], c.KMSCloseGracePeriod)
	return nil
}

// write makes the file what a State says and returns its hash.
func (k *Keeper) write(state *State) (string, error) {
	text, err := state.Config()
	if err == nil {
		err = pki.WriteEncryptionConfig(k.File, text)
	}
	return hashOf(text), err
}

func (k *Keeper) fail(err error) {
	k.Logger.Error("the encryption keys in the keyring are not used, those loaded before stay", "error", err)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.loaded.Error = err.Error()
}

func (k *Keeper) setLoaded(l Loaded) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.loaded = l
}

// Loaded is what the API server works with.
func (k *Keeper) Loaded() Loaded {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.loaded
}

func hashOf(text []byte) string {
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:6])
}
