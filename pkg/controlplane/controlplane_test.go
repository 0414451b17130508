// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/manifests"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/tests/golden"
)

func testConfig(t *testing.T) Config {
	ca := filepath.Join(t.TempDir(), "server-ca.crt")
	if err := os.WriteFile(ca, []byte("the CA"), 0o600); err != nil {
		t.Fatal(err)
	}
	return Config{
		NodeName: "n1", RunDir: "/run/kedge", Datastore: Datastore{Endpoints: []string{"unix:///run/kedge/etcd.sock"}, Own: true},
		BindAddress: netip.MustParseAddr("0.0.0.0"), Port: 6443, AdvertiseAddress: netip.MustParseAddr("192.0.2.1"), Egress: config.EgressAuto,
		Cluster: config.Cluster{
			ClusterCIDR: config.Prefixes{netip.MustParsePrefix("10.42.0.0/16")}, ServiceCIDR: config.Prefixes{netip.MustParsePrefix("10.43.0.0/16")},
			ServiceNodePortRange: config.PortRange{First: 30000, Last: 32767}, ClusterDomain: "cluster.local", ClusterDNS: netip.MustParseAddr("10.43.0.10"),
		},
		Files: Files{
			TrustedServerCA: ca, TrustedClientCA: "/pki/client-ca-trusted.crt", ServiceAccountTrusted: "/pki/service-account-trusted.key",
			ServerCA: "/pki/server-ca.crt", ServerCAKey: "/pki/server-ca.key", ClientCA: "/pki/client-ca.crt", ClientCAKey: "/pki/client-ca.key",
			RequestHeaderCA: "/pki/request-header-ca.crt", APIServer: "/pki/apiserver.pem", KubeletClient: "/pki/apiserver-kubelet-client.pem",
			FrontProxyClient: "/pki/front-proxy-client.pem", FrontProxyName: "front-proxy-client", ServiceAccountKey: "/pki/service-account.key",
			EncryptionConfig: "/pki/encryption.yaml", Kubeconfig: "/pki/kedge-controller.kubeconfig",
		},
	}
}

func TestCommandLines(t *testing.T) {
	c := testConfig(t)
	c.Files.TrustedServerCA = "/pki/server-ca-trusted.crt"
	c.APIServerArgs = []string{"audit-log-path=/a", "--feature-gates=A=true"}
	c.SchedulerArgs = []string{"v=2", "feature-gates=A=true"}
	c.ControllerManagerArgs = []string{"feature-gates=B=false"}
	golden.Compare(t, "testdata/flags.txt", "kube-apiserver\n"+strings.Join(c.apiserverFlags(), "\n")+
		"\n\nkube-controller-manager\n"+strings.Join(c.controllerManagerFlags(), "\n")+
		"\n\nkube-scheduler\n"+strings.Join(c.schedulerFlags(), "\n")+"\n")
}

// TestCheckArgs is about the components' own flag sets. Options can be built several times before gates are set.
func TestCheckArgs(t *testing.T) {
	if err := CheckArgs(testConfig(t)); err != nil {
		t.Errorf("Kedge's own flags are refused: %v", err)
	}
	for name, set := range map[string]func(*Config){
		"kube-apiserver-arg: unknown flag: --nope":          func(c *Config) { c.APIServerArgs = []string{"nope=1"} },
		"kube-controller-manager-arg: unknown flag: --nope": func(c *Config) { c.ControllerManagerArgs = []string{"nope=1"} },
		"kube-scheduler-arg: unknown flag: --nope":          func(c *Config) { c.SchedulerArgs = []string{"nope=1"} },
		`kube-apiserver-arg: invalid argument "x"`:          func(c *Config) { c.APIServerArgs = []string{"secure-port=x"} },
	} {
		c := testConfig(t)
		set(&c)
		if err := CheckArgs(c); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("got %v, want %q", err, name)
		}
	}
}

// An etcd that is not Kedge's is reached with the operator's files, and a direct egress needs no configuration.
func TestExternalDatastore(t *testing.T) {
	c := testConfig(t)
	c.Datastore = Datastore{Endpoints: []string{"https://e1:2379", "https://e2:2379"}, CAFile: "/e/ca.crt", CertFile: "/e/c.crt", KeyFile: "/e/c.key"}
	c.Egress = config.EgressDirect
	line := strings.Join(c.apiserverFlags(), " ")
	for _, want := range []string{"--etcd-servers=https://e1:2379,https://e2:2379 ", "--etcd-cafile=/e/ca.crt ", "--etcd-certfile=/e/c.crt ", "--etcd-keyfile=/e/c.key "} {
		if !strings.Contains(line, want) {
			t.Errorf("no %s in %s", want, line)
		}
	}
	if strings.Contains(line, "egress") {
		t.Errorf("an egress configuration in %s", line)
	}
}

func TestRoles(t *testing.T) {
	servers := map[string]authority.Server{"s1": {ControlPlane: true, Etcd: true}, "s2": {ControlPlane: true}, "s3": {Etcd: true}}
	for name, want := range map[string]string{"s1": "control-plane etcd", "s2": "control-plane", "s3": "etcd", "a1": "worker"} {
		var got []string
		for label, has := range rolesOf(name, servers) {
			if has {
				got = append(got, strings.TrimPrefix(label, "node-role.kubernetes.io/"))
			}
		}
		slices.Sort(got)
		if strings.Join(got, " ") != want {
			t.Errorf("%s is %v, want %s", name, got, want)
		}
	}
}

func TestManifests(t *testing.T) {
	entries, err := manifests.FS.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, e := range entries {
		objects, err := render(e.Name(), testConfig(t))
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects {
			got.WriteString(e.Name() + ": " + o.GetAPIVersion() + " " + o.GetKind() + " " + o.GetNamespace() + "/" + o.GetName() + "\n")
			if o.GetKind() == "Service" && o.GetName() == "kube-dns" {
				if ip := o.Object["spec"].(map[string]any)["clusterIP"]; ip != "10.43.0.10" {
					t.Errorf("kube-dns has the address %v", ip)
				}
			}
		}
	}
	golden.Compare(t, "testdata/manifests.txt", got.String())
}
