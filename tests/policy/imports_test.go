// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/kedge-io/kedge/"

// owners says which of Kedge's packages may import what. The processes of a server have their own flags, loggers, feature
// gates and metric registries only as long as no other package links them in: see docs/decisions.
var owners = []struct {
	imports string   // a package and everything below it
	allowed []string // directories and everything below them
}{
	{"k8s.io/kubernetes/cmd/kube-apiserver", []string{"pkg/controlplane"}},
	{"k8s.io/kubernetes/cmd/kube-controller-manager", []string{"pkg/controlplane"}},
	{"k8s.io/kubernetes/cmd/kube-scheduler", []string{"pkg/controlplane"}},
	{"k8s.io/kubernetes/cmd/kubelet", []string{"pkg/node"}},
	{"k8s.io/kubernetes/cmd/kube-proxy", []string{"pkg/node"}},
	{"k8s.io/kubernetes/pkg/kubelet", []string{"pkg/node", "pkg/check/cis"}},
	{"k8s.io/kubernetes/pkg/proxy", []string{"pkg/node"}},
	{"github.com/flannel-io/flannel", []string{"pkg/node"}},
	{"github.com/containerd/containerd/v2/cmd/containerd", []string{"pkg/node"}},
	{"github.com/containerd/containerd/v2/cmd/ctr", []string{"cmd/tools"}},
	{"helm.sh/helm", []string{"pkg/helm/release"}},
	{"k8s.io/kubectl", []string{"cmd/tools", "pkg/drain"}},
	{"github.com/coredns", []string{"pkg/dns"}},
	{"github.com/miekg/dns", []string{"pkg/dns", "pkg/check", "tests"}},
	{"go.etcd.io/etcd/server/v3", []string{"pkg/datastore"}},
	{"go.etcd.io/etcd/etcdutl/v3", []string{"pkg/datastore"}},
	{"github.com/minio/minio-go/v7", []string{"pkg/snapshot"}},
	{"filippo.io/age", []string{"pkg/snapshot"}},
	{"github.com/urfave/cli/v2", []string{"cmd", "pkg/config"}},
	// They are files of their own, built beside the binary.
	{"github.com/opencontainers/runc", nil},
	{"github.com/containernetworking/plugins", nil},
	{"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2", nil},
	// Wiring imports domains, never the other way round; nothing that ships imports what does not.
	{module + "cmd", []string{"cmd"}},
	{module + "tests", []string{"tests"}},
	{module + "scripts", []string{"scripts", "tests"}},
	{"testing", []string{"tests"}},
	{"k8s.io/utils/pointer", nil}, // deprecated: new(value), or k8s.io/utils/ptr
	{"github.com/pkg/errors", nil},
	{"github.com/stretchr/testify", nil},
}

func TestImports(t *testing.T) {
	for _, f := range sources(t) {
		for _, spec := range f.ast.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			for _, rule := range owners {
				if within(imported, rule.imports) && !withinAny(f.dir, rule.allowed) {
					report(t, f, spec.Pos(), "imports", "%s may be imported by %v only", imported, rule.allowed)
				}
			}
		}
	}
}

func within(path, dir string) bool {
	dir = strings.TrimSuffix(dir, "/")
	return path == dir || strings.HasPrefix(path, dir+"/")
}

func withinAny(path string, dirs []string) bool {
	for _, d := range dirs {
		if within(path, d) {
			return true
		}
	}
	return false
}
