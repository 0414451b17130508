// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"
	"k8s.io/apimachinery/pkg/types"
)

// customConfig is the content of the ConfigMap coredns-custom. The zero value means that there is none.
type customConfig struct {
	hash  string            // of files; empty for none
	dir   string            // where files are, once staged
	files map[string]string // by key

	uid         types.UID // of the ConfigMap, if it came from the API
	forwardsAll bool      // set once staged
}

// newCustomConfig takes a ConfigMap's data. Keys that are no file names are left out; the API does not let them pass.
func newCustomConfig(data map[string]string, binary map[string][]byte) customConfig {
	c := customConfig{files: map[string]string{}}
	maps.Copy(c.files, data)
	for name, content := range binary {
		c.files[name] = string(content)
	}
	maps.DeleteFunc(c.files, func(name, _ string) bool {
		return name != filepath.Base(name) || name == "." || name == ".." || name == "/"
	})
	if len(c.files) == 0 {
		return customConfig{}
	}
	h := sha256.New()
	for _, name := range c.names() {
		fmt.Fprintf(h, "%d %s %d %s", len(name), name, len(c.files[name]), c.files[name])
	}
	c.hash = hex.EncodeToString(h.Sum(nil))[:12]
	return c
}

func (c customConfig) empty() bool { return c.hash == "" }

// names returns all keys, sorted.
func (c customConfig) names() []string { return slices.Sorted(maps.Keys(c.files)) }

// keys returns the keys with a suffix, sorted: the order in the Corefile.
func (c customConfig) keys(suffix string) []string {
	var out []string
	for _, name := range c.names() {
		if strings.HasSuffix(name, suffix) {
			out = append(out, name)
		}
	}
	return out
}

// root is the directory that relative file names in a Corefile refer to.
func (c customConfig) root(otherwise string) string {
	if c.dir == "" {
		return otherwise
	}
	return c.dir
}

// customStore keeps custom configurations on disk, each in a directory of its own: plugins like hosts re-read their files, so those of the
// running configuration must not change before the new one is in use. The symlink "custom" leads to the last good one, which is used at
// the next start until the API answers.
type customStore struct{ dir string }

const (
	customPrefix = "custom-"
	customLink   = "custom"
)

// stage writes c's files and returns c with its directory.
func (s customStore) stage(c customConfig) (customConfig, error) {
	if c.empty() {
		return c, nil
	}
	c.dir = filepath.Join(s.dir, customPrefix+c.hash)
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return c, fmt.Errorf("stage the custom DNS configuration: %w", err)
	}
	for name, content := range c.files {
		if err := os.WriteFile(filepath.Join(c.dir, name), []byte(content), 0o600); err != nil {
			return c, fmt.Errorf("stage the custom DNS configuration: %w", err)
		}
	}
	return c, nil
}

// discard removes what stage wrote, unless it is in use.
func (s customStore) discard(c, inUse customConfig) {
	if c.dir != "" && c.dir != inUse.dir {
		os.RemoveAll(c.dir) // keep removes leftovers
	}
}

// keep marks c as the last good configuration and removes the others.
func (s customStore) keep(c customConfig) error {
	link := filepath.Join(s.dir, customLink)
	if c.empty() {
		if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	} else if err := renameio.Symlink(filepath.Base(c.dir), link); err != nil {
		return err
	}
	all, err := filepath.Glob(filepath.Join(s.dir, customPrefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range all {
		if dir != c.dir {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}
	return err
}

// lastGood returns the last good configuration, none if there is none.
func (s customStore) lastGood() (customConfig, error) {
	link := filepath.Join(s.dir, customLink)
	entries, err := os.ReadDir(link)
	if errors.Is(err, fs.ErrNotExist) {
		return customConfig{}, nil
	}
	if err != nil {
		return customConfig{}, err
	}
	data := map[string]string{}
	for _, e := range entries {
		content, err := os.ReadFile(filepath.Join(link, e.Name()))
		if err != nil {
			return customConfig{}, err
		}
		data[e.Name()] = string(content)
	}
	return newCustomConfig(data, nil), nil
}
