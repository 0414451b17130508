// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"fmt"
	"os"
	"path/filepath"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/keyring"
	"github.com/kedge-io/kedge/pkg/pki"
)

// connection is to the datastore of this server.
type connection struct {
	*clientv3.Client
	ring ring
}

func openRing(s Settings) (*connection, error) {
	if !s.Member {
		return nil, fmt.Errorf("server %s has no datastore member: run this on a server that has one", s.Node)
	}
	if _, err := os.Stat(s.Socket); err != nil {
		return nil, fmt.Errorf("the datastore does not run on this machine: start Kedge here, or do it on another server: %w", err)
	}
	client, err := datastore.NewClient([]string{datastore.Endpoint(s.Socket)}, datastore.TLSFiles{})
	if err != nil {
		return nil, err
	}
	secret, err := pki.KeyringSecret(filepath.Join(s.PKIDir, keyringFile))
	if err != nil {
		client.Close()
		return nil, err
	}
	r, err := keyring.Open(client, secret)
	if err != nil {
		client.Close()
		return nil, err
	}
	return &connection{client, r}, nil
}
