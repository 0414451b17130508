// SPDX-License-Identifier: Apache-2.0

// Package singlenode tests what pods and the network of one node can do, on one server that all its tests share.
package singlenode

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/image"
	"github.com/kedge-io/kedge/tests/registry"
	"github.com/kedge-io/kedge/tests/testbed"
)

const (
	registryUser     = "reader"
	registryPassword = "secret"
	mirroredImage    = "docker.io/library/course:1"  // only the mirror of docker.io has it
	privateImage     = "registry.example/team/app:2" // only in a registry with TLS and credentials
	directImagePath  = "team/app:2"                  // the same one under the registry's own address
)

// registries are what the node pulls from. They run in this process, on the host's address of the machines' network.
var (
	shared     = cluster.Shared{Name: "singlenode", Options: options} //policy:allow variable one server for the package
	registries = struct{ mirror, private *registry.Server }{}         //policy:allow variable they are made with the server
)

func TestMain(m *testing.M) {
	code := shared.Main(m)
	for _, r := range []*registry.Server{registries.mirror, registries.private} {
		if r == nil {
			continue
		}
		if err := r.Close(); err != nil {
			fmt.Println("close a registry:", err)
			code = max(code, 1)
		}
	}
	os.Exit(code)
}

func options(bed *testbed.Bed, dir string) (cluster.Options, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	archives, err := cluster.Images(ctx, bed, dir)
	if err != nil {
		return cluster.Options{}, err
	}
	root, err := bed.Template()
	if err != nil {
		return cluster.Options{}, err
	}
	mirrored, private := filepath.Join(dir, "mirrored.tar"), filepath.Join(dir, "private.tar")
	if err := errors.Join(image.Busybox(ctx, mirrored, mirroredImage, root), image.Server(ctx, private, privateImage)); err != nil {
		return cluster.Options{}, err
	}
	if registries.mirror, err = registry.Start(bed.Gateway()+":0", registry.Config{Archives: []string{mirrored}}); err != nil {
		return cluster.Options{}, err
	}
	registries.private, err = registry.Start(bed.Gateway()+":0", registry.Config{
		Archives: []string{private}, User: registryUser, Password: registryPassword, TLS: true,
	})
	if err != nil {
		return cluster.Options{}, err
	}
	return cluster.Options{
		Images: archives,
		Files:  map[string]string{"/etc/kedge/ca.pem": string(registries.private.CA())},
		Registries: fmt.Sprintf(`
mirrors:
  docker.io:
    endpoint: ["http://%s"]
  registry.example:
    endpoint: ["https://%[2]s"]
configs:
  %[2]q:
    auth: {username: %q, password: %q}
    tls: {ca_file: /etc/kedge/ca.pem}
`, registries.mirror.Addr(), registries.private.Addr(), registryUser, registryPassword),
	}, nil
}
