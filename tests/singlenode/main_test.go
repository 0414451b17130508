// SPDX-License-Identifier: Apache-2.0

// Package singlenode tests what pods and the network of one node can do, on one server that all its tests share.
package singlenode

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
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
	mirroredImage    = "docker.io/library/course:1"         // only the mirror of docker.io has it
	privateImage     = "registry.example/team/app:2"        // only in a registry with TLS and credentials
	directImagePath  = "team/app:2"                         // the same one under the registry's own address
	course           = "busybox of the Docker Hub's mirror" // what the mirrored image says of itself
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

// node is the server with a namespace for one test.
type node struct {
	*cluster.Server
	t  *testing.T
	ns string
}

func newNode(t *testing.T) *node {
	t.Helper()
	s := shared.Server(t)
	return &node{Server: s, t: t, ns: s.Namespace(t)}
}

// within gives a context for one step.
func (n *node) within(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(n.t.Context(), d)
	n.t.Cleanup(cancel)
	return ctx
}

// apply creates what the YAML says. %[1]q and the like in it are for args.
func (n *node) apply(yaml string, args ...any) {
	n.t.Helper()
	if len(args) > 0 {
		yaml = fmt.Sprintf(yaml, args...)
	}
	if err := n.Apply(n.within(time.Minute), n.ns, yaml); err != nil {
		n.t.Fatal(err)
	}
}

// kubectl runs a command in the test's namespace, which must succeed within a minute.
func (n *node) kubectl(args ...string) string {
	n.t.Helper()
	out, err := n.try(args...)
	if err != nil {
		n.t.Fatal(err)
	}
	return out
}

func (n *node) try(args ...string) (string, error) {
	n.t.Helper()
	out, err := n.Server.Kubectl(n.within(time.Minute), append([]string{"-n", n.ns}, args...)...)
	return strings.TrimSpace(out), err
}

// ready waits until pods are Ready.
func (n *node) ready(pods ...string) {
	n.t.Helper()
	for _, p := range pods {
		n.kubectl("wait", "--for=condition=Ready", "--timeout=55s", "pod/"+p)
	}
}

// sh runs a line of shell in a pod.
func (n *node) sh(pod, line string) string {
	n.t.Helper()
	return n.kubectl("exec", pod, "--", "sh", "-c", line)
}

// eventually waits up to a minute until cond returns nil.
func (n *node) eventually(what string, cond func() error) {
	n.t.Helper()
	n.eventuallyWithin(time.Minute, what, cond)
}

func (n *node) eventuallyWithin(d time.Duration, what string, cond func() error) {
	n.t.Helper()
	if err := testbed.Wait(n.within(d), what, func(context.Context) error { return cond() }); err != nil {
		n.t.Fatal(err)
	}
}

// equal is for values that take a moment.
func (n *node) becomes(want string, args ...string) {
	n.t.Helper()
	n.eventually(fmt.Sprintf("kubectl %s to say %q", strings.Join(args, " "), want), func() error {
		got, err := n.try(args...)
		if err == nil && got != want {
			err = fmt.Errorf("it says %q", got)
		}
		return err
	})
}

const (
	// server is a pod with the test server; arguments: its name, more YAML for the container and for the pod's spec.
	server = `
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {app: %[1]s}}
spec:
  containers:
  - name: server
    image: kedge.test/server:1
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
%[2]s
%[3]s
`
	// client is a pod with busybox that does nothing by itself.
	client = `
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: client
    image: kedge.test/busybox:1
    command: [sleep, "100000"]
`
)
