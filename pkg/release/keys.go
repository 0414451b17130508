// SPDX-License-Identifier: Apache-2.0

package release

import (
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// PublicKey is the key of those who made this build, base64 of 32 bytes. The build sets it by -ldflags; nothing else writes it.
// Empty: only the keys of the machine count.
var PublicKey = ""

// DefaultKeyFile has the keys that the machine's operator trusts, PEM, one or several.
const DefaultKeyFile = "/etc/kedge/release.pub"

// maxKeyFile is far above what a file of keys has.
const maxKeyFile = 64 << 10

// Key is trusted to sign releases.
type Key struct {
	Public ed25519.PublicKey
	Source string // where it comes from, for people
}

// Fingerprint is short enough to compare by eye: the first 16 digits of the SHA-256 of the 32 bytes.
func (k Key) Fingerprint() string {
	sum := sha256.Sum256(k.Public)
	return hex.EncodeToString(sum[:8])
}

// TrustedKeys gives the key of this build and those of a file, which need not exist.
func TrustedKeys(file string) ([]Key, error) {
	var keys []Key
	if PublicKey != "" {
		b, err := base64.StdEncoding.DecodeString(PublicKey)
		if err != nil || len(b) != ed25519.PublicKeySize {
			return nil, errors.New("the release key that was linked into this build is none: build it again")
		}
		keys = append(keys, Key{b, "this build of kedge"})
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return keys, nil
	}
	if err != nil {
		return nil, err
	}
	more, err := ParseKeys(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	for _, k := range more {
		keys = append(keys, Key{k, file})
	}
	return keys, nil
}

// ParseKeys reads public ed25519 keys, PEM.
func ParseKeys(text []byte) ([]ed25519.PublicKey, error) {
	if len(text) > maxKeyFile {
		return nil, fmt.Errorf("%d bytes are no file of keys", len(text))
	}
	var keys []ed25519.PublicKey
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("key %d: %w", len(keys)+1, err)
		}
		public, ok := key.(ed25519.PublicKey)
		if !ok {
			return nil, fmt.Errorf("key %d is not an ed25519 key", len(keys)+1)
		}
		keys = append(keys, public)
	}
	if len(keys) == 0 {
		return nil, errors.New("there is no key in it (PEM, \"PUBLIC KEY\")")
	}
	return keys, nil
}

func describe(keys []Key) string {
	var list []string
	for _, k := range keys {
		list = append(list, k.Fingerprint()+" of "+k.Source)
	}
	return strings.Join(list, ", ")
}
