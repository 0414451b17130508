// SPDX-License-Identifier: Apache-2.0

// Package encryption changes the key that encrypts Secrets in the datastore while the cluster runs, on all servers.
//
// What the configuration is, and where a change stands, is one value in the keyring ([State]). Each API server follows it ([Keeper]) and
// tells which one it has loaded; the command goes from stage to stage when all have ([Driver]). Nothing depends on the command's life: a
// change that was cut off stays where it is, every object readable, and the command goes on from there.
package encryption

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	apiserverv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"sigs.k8s.io/yaml"
)

// Identity is the provider that stores objects in the clear.
const Identity = "identity"

// Action is a change of the configuration.
type Action string

// The changes.
const (
	Rotate  Action = "rotate-key" // a new key, and all objects by it
	Enable  Action = "enable"     // from the clear to a new key
	Disable Action = "disable"    // all objects in the clear
)

// Stage of a change.
type Stage string

// The stages. Each begins when all servers have loaded the one before.
const (
	Stable  Stage = ""        // no change goes on
	Prepare Stage = "prepare" // every server can read what the new provider writes
	Write   Stage = "write"   // every server writes by the new provider; objects are written again
)

// State is the configuration of all servers.
type State struct {
	// Generation counts the changes of the value: a server that has loaded one can be asked for it.
	Generation int64  `json:"generation"`
	Action     Action `json:"action,omitempty"`
	Stage      Stage  `json:"stage,omitempty"`
	// Target is the provider that is going to write, by name.
	Target  string     `json:"target,omitempty"`
	Started *time.Time `json:"started,omitempty"`

	Resources []string   `json:"resources"` // encrypted ones, as in an EncryptionConfiguration
	Providers []Provider `json:"providers"` // the first one writes
	LastKey   int        `json:"lastKey"`   // number of the newest key: a name is never used again
}

// Provider is a key of secretbox, or Identity.
type Provider struct {
	Name    string     `json:"name"`
	Secret  string     `json:"secret,omitempty"` // base64
	Created *time.Time `json:"created,omitempty"`
}

// ID tells keys apart without giving them away; empty for Identity.
func (p Provider) ID() string {
	if p.Secret == "" {
		return ""
	}
	sum := sha256.Sum256([]byte("kedge key id " + p.Secret))
	return hex.EncodeToString(sum[:4])
}

// ErrForeign says that a configuration is none that Kedge has made, so that Kedge leaves it alone.
var ErrForeign = errors.New("the encryption configuration was changed by hand")

// Adopt takes over the configuration in an EncryptionConfiguration. ErrForeign: it has more in it than a State.
func Adopt(data []byte) (*State, error) {
	var c apiserverv1.EncryptionConfiguration
	if err := yaml.UnmarshalStrict(data, &c); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrForeign, err)
	}
	if len(c.Resources) != 1 {
		return nil, fmt.Errorf("%w: it has %d lists of resources", ErrForeign, len(c.Resources))
	}
	s := &State{Generation: 1, Resources: c.Resources[0].Resources}
	for _, p := range c.Resources[0].Providers {
		switch {
		case p.Secretbox != nil && p.AESCBC == nil && p.AESGCM == nil && p.KMS == nil && p.Identity == nil:
			for _, k := range p.Secretbox.Keys {
				s.Providers = append(s.Providers, Provider{Name: k.Name, Secret: k.Secret})
				if n, err := strconv.Atoi(strings.TrimPrefix(k.Name, "key")); err == nil {
					s.LastKey = max(s.LastKey, n)
				}
			}
		case p.Identity != nil && p.AESCBC == nil && p.AESGCM == nil && p.KMS == nil:
			s.Providers = append(s.Providers, Provider{Name: Identity})
		default:
			return nil, fmt.Errorf("%w: it has providers beside secretbox and identity", ErrForeign)
		}
	}
	if !slices.Equal(s.Resources, []string{"secrets"}) {
		return nil, fmt.Errorf("%w: it is for %s", ErrForeign, strings.Join(s.Resources, ", "))
	}
	if err := s.validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrForeign, err)
	}
	return s, nil
}

// Parse reads a value of the keyring.
func Parse(data []byte) (*State, error) {
	var s State
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("the encryption keys in the keyring: %w", err)
	}
	if err := s.validate(); err != nil {
		return nil, fmt.Errorf("the encryption keys in the keyring: %w", err)
	}
	return &s, nil
}

func (s *State) validate() error {
	if len(s.Providers) == 0 || len(s.Resources) == 0 {
		return errors.New("there are no providers or no resources")
	}
	seen := map[string]bool{}
	for _, p := range s.Providers {
		if p.Name == "" || seen[p.Name] {
			return fmt.Errorf("provider %q is there twice, or has no name", p.Name)
		}
		seen[p.Name] = true
		if p.Name == Identity {
			continue
		}
		if secret, err := base64.StdEncoding.DecodeString(p.Secret); err != nil || len(secret) != 32 {
			return fmt.Errorf("key %s is not 32 bytes in base64", p.Name)
		}
	}
	switch s.Stage {
	case Stable:
	case Prepare, Write:
		if !seen[s.Target] {
			return fmt.Errorf("the new provider %q is not there", s.Target)
		}
	default:
		return fmt.Errorf("stage %q is unknown: is it of a newer version?", s.Stage)
	}
	return nil
}

// Config gives the EncryptionConfiguration for the API server.
func (s *State) Config() ([]byte, error) {
	resources := apiserverv1.ResourceConfiguration{Resources: s.Resources}
	for _, p := range s.Providers {
		if p.Name == Identity {
			resources.Providers = append(resources.Providers, apiserverv1.ProviderConfiguration{Identity: &apiserverv1.IdentityConfiguration{}})
			continue
		}
		key := apiserverv1.Key{Name: p.Name, Secret: p.Secret}
		// Keys that follow each other are one provider's.
		if n := len(resources.Providers); n > 0 && resources.Providers[n-1].Secretbox != nil {
			box := resources.Providers[n-1].Secretbox
			box.Keys = append(box.Keys, key)
			continue
		}
		resources.Providers = append(resources.Providers, apiserverv1.ProviderConfiguration{Secretbox: &apiserverv1.SecretboxConfiguration{Keys: []apiserverv1.Key{key}}})
	}
	config := apiserverv1.EncryptionConfiguration{Resources: []apiserverv1.ResourceConfiguration{resources}}
	config.SetGroupVersionKind(apiserverv1.SchemeGroupVersion.WithKind("EncryptionConfiguration"))
	return yaml.Marshal(config)
}

// Writer is the provider that writes.
func (s *State) Writer() Provider { return s.Providers[0] }

// Begin gives the state in which a change begins. The same change that goes on already is nil without error.
func (s *State) Begin(a Action, now time.Time) (*State, error) {
	off := s.Writer().Name == Identity
	switch {
	case s.Stage != Stable && s.Action == a:
		return nil, nil //nolint:nilnil // there is nothing to do
	case s.Stage != Stable:
		return nil, fmt.Errorf("%s has not ended yet: `kedge secrets-encrypt %s` goes on with it; after that this can begin", s.Action, s.Action)
	case a == Rotate && off:
		return nil, errors.New("encryption is off, there is no key to rotate: kedge secrets-encrypt enable")
	case a == Enable && !off:
		return nil, fmt.Errorf("encryption is on already, with key %s", s.Writer().Name)
	case a == Disable && off:
		return nil, errors.New("encryption is off already")
	case a != Rotate && a != Enable && a != Disable:
		return nil, fmt.Errorf("%q is no change of the encryption; there are %s, %s, %s", a, Rotate, Enable, Disable)
	}
	next := s.clone()
	next.Action, next.Stage, next.Started = a, Prepare, &now
	if a == Disable {
		next.Target = Identity
		if !slices.ContainsFunc(next.Providers, func(p Provider) bool { return p.Name == Identity }) {
			next.Providers = append(next.Providers, Provider{Name: Identity})
		}
		return next, nil
	}
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return nil, err
	}
	next.LastKey++
	key := Provider{Name: "key" + strconv.Itoa(next.LastKey), Secret: base64.StdEncoding.EncodeToString(secret), Created: &now}
	next.Target = key.Name
	next.Providers = slices.Insert(next.Providers, 1, key)
	return next, nil
}

// Advance gives the state after the present stage of a change.
func (s *State) Advance() (*State, error) {
	next := s.clone()
	i := slices.IndexFunc(next.Providers, func(p Provider) bool { return p.Name == s.Target })
	switch s.Stage {
	case Prepare:
		target := next.Providers[i]
		next.Providers = slices.Insert(slices.Delete(next.Providers, i, i+1), 0, target)
		next.Stage = Write
	case Write:
		next.Providers = []Provider{next.Providers[i]}
		if s.Target != Identity {
			// What comes from elsewhere in the clear, as from a snapshot of before, stays readable.
			next.Providers = append(next.Providers, Provider{Name: Identity})
		}
		next.Action, next.Stage, next.Target, next.Started = "", Stable, "", nil
	default:
		return nil, errors.New("no change of the encryption goes on")
	}
	return next, nil
}

func (s *State) clone() *State {
	next := *s
	next.Generation++
	next.Resources, next.Providers = slices.Clone(s.Resources), slices.Clone(s.Providers)
	return &next
}
