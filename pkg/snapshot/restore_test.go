// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/pki"
)

// TestChooseKeys: which keys a restored server gets.
func TestChooseKeys(t *testing.T) {
	ensure := func() string {
		dir := filepath.Join(t.TempDir(), "pki")
		if _, err := pki.Ensure(t.Context(), pki.Config{Dir: dir, NodeName: "s1", NodeIPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	own, other := ensure(), ensure()
	files, err := readKeys(own)
	if err != nil {
		t.Fatal(err)
	}
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	m := &Metadata{Name: "x", Keys: digests(files), Recipients: []string{id.Recipient().String()}}
	if m.Cluster, err = localCluster(own); err != nil {
		t.Fatal(err)
	}
	sealed, err := sealKeys(files, m.Recipients)
	if err != nil {
		t.Fatal(err)
	}
	changed := func(names ...string) string {
		dir := filepath.Join(t.TempDir(), "pki")
		if err := pki.Import(dir, files); err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if err := os.WriteFile(filepath.Join(dir, name), []byte("changed"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	const given = "given"
	for _, c := range []struct {
		what, dir string
		sealed    []byte
		o         RestoreOptions
		keys      bool   // the snapshot's are used
		want      string // in the error
	}{
		{"the server has them", own, sealed, RestoreOptions{}, false, ""},
		{"the server has them, and the key is given all the same", own, sealed, RestoreOptions{RecoveryKey: given}, false, ""},
		{"the server has them, and the key is another one", own, sealed, RestoreOptions{RecoveryKey: "AGE"}, false, "what was given is none"},
		{"and the snapshot does not", own, nil, RestoreOptions{}, false, ""},
		{"other keys for Secrets: those are in the keyring", changed("encryption.yaml"), sealed, RestoreOptions{}, false, ""},
		{"another key for the keyring, too", changed("encryption.yaml", "keyring.key"), sealed, RestoreOptions{}, false, "encryption.yaml, keyring.key. They are in the snapshot"},
		{"an empty disk", t.TempDir(), sealed, RestoreOptions{}, false, "give --recovery-key FILE"},
		{"an empty disk, a snapshot without keys", t.TempDir(), nil, RestoreOptions{RecoveryKey: given}, false, "the snapshot has none"},
		{"an empty disk and the key", t.TempDir(), sealed, RestoreOptions{RecoveryKey: given}, true, ""},
		{"an empty disk and another key", t.TempDir(), sealed, RestoreOptions{RecoveryKey: "AGE"}, false, "what was given is none"},
		{"another cluster's, and the key", other, sealed, RestoreOptions{RecoveryKey: given}, true, ""},
		{"another cluster's are not kept", other, sealed, RestoreOptions{KeepKeys: true}, false, "give --recovery-key FILE"},
		{"the cluster's own are kept", changed("service-account.key"), sealed, RestoreOptions{KeepKeys: true}, false, ""},
	} {
		if c.o.RecoveryKey == given {
			c.o.RecoveryKey = id.String()
		}
		r := &Restored{}
		keys, err := Settings{PKIDir: c.dir}.chooseKeys(m, c.sealed, c.o, r)
		if (err != nil) != (c.want != "") || err != nil && !strings.Contains(err.Error(), c.want) || (keys != nil) != c.keys || err == nil && r.Keys == "" {
			t.Errorf("%s: %d keys, %v, %q; want %t, %q", c.what, len(keys), err, r.Keys, c.keys, c.want)
		}
	}
}

// TestMayRestore: servers of the cluster that run, and machines of other clusters, are left alone.
func TestMayRestore(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.2:0") // not an address of an interface
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	m := &Metadata{Cluster: "c1", Data: datastore.Copy{Members: []datastore.Member{
		{Name: "s1", PeerURLs: []string{"https://127.0.0.1:1"}}, {Name: "s2", PeerURLs: []string{"https://" + l.Addr().String()}}, {Name: "s3", PeerURLs: []string{"https://127.0.0.2:1", "x:y:z"}}}}}
	s := Settings{PKIDir: t.TempDir(), EtcdDir: t.TempDir()}
	if err := s.mayRestore(t.Context(), m, RestoreOptions{}); !errors.Is(err, ErrOthers) || !strings.Contains(err.Error(), "s2 (127.0.0.2:") || strings.Contains(err.Error(), "s3") {
		t.Error(err)
	}
	if err := s.mayRestore(t.Context(), m, RestoreOptions{Force: true}); err != nil {
		t.Error(err)
	}
	l.Close()
	if err := s.mayRestore(t.Context(), m, RestoreOptions{}); err != nil {
		t.Error(err)
	}
}
