// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"sync"

	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"

	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/encryption"
	"github.com/kedge-io/kedge/pkg/keyring"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// openKeyring makes what follows the keys of Secrets in the keyring.
func (p *plane) openKeyring() error {
	d := p.cfg.Datastore
	client, err := datastore.NewClient(d.Endpoints, datastore.TLSFiles{CA: d.CAFile, Cert: d.CertFile, Key: d.KeyFile})
	if err != nil {
		return err
	}
	p.store = client
	secret, err := pki.KeyringSecret(p.cfg.Files.Keyring)
	if err != nil {
		return err
	}
	ring, err := keyring.Open(client, secret)
	if err != nil {
		return err
	}
	cfg := encryption.Config{NodeName: p.cfg.NodeName, File: p.cfg.Files.EncryptionConfig, Ring: ring, Store: client,
		Prefix: p.apiserver.Etcd.StorageConfig.Prefix, Logger: p.log.With("component", "encryption")}
	if file := p.apiserver.Etcd.EncryptionProviderConfigFilepath; file != cfg.File {
		cfg.Foreign = "--kube-apiserver-arg encryption-provider-config=" + file
	}
	p.encryption = encryption.NewKeeper(cfg)
	return nil
}

// prepareEncryption waits for the configuration that the other servers have. It returns ctx's error.
func (p *plane) prepareEncryption(ctx context.Context) error {
	return supervise.Poll(ctx, func() error {
		err := p.encryption.Prepare(ctx)
		if err != nil && ctx.Err() == nil {
			p.child.Report(ComponentAPIServer, supervise.Waiting, "for the encryption keys: "+err.Error())
		}
		return err
	})
}

// followEncryption has the API server load each change of its encryption configuration. Upstream's own way, a controller that reads the
// file once a minute, is taken out. The returned function ends it.
func (p *plane) followEncryption(ctx context.Context, cfg *apiserver.Config) (stop func()) {
	generic := cfg.KubeAPIs.ControlPlane.Generic
	transformers, ok := generic.ResourceTransformers.(*encryptionconfig.DynamicTransformers)
	if !ok || !p.encryption.Follows() {
		return func() {}
	}
	delete(generic.PostStartHooks, "start-encryption-provider-config-automatic-reload")
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { p.encryption.Run(ctx, transformers) })
	return func() { cancel(); wg.Wait() }
}
