// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/manifests"
	"github.com/kedge-io/kedge/tests/golden"
)

func testConfig() Config {
	return Config{
		NodeName: "n1", EtcdSocket: "/run/kedge/etcd.sock", BindAddress: netip.MustParseAddr("0.0.0.0"), Port: 6443,
		AdvertiseAddress: netip.MustParseAddr("192.0.2.1"), ClusterCIDR: netip.MustParsePrefix("10.42.0.0/16"),
		ServiceCIDR: netip.MustParsePrefix("10.43.0.0/16"), ServiceNodePortRange: "30000-32767", ClusterDomain: "cluster.local",
		ClusterDNS: netip.MustParseAddr("10.43.0.10"), Single: true,
		Files: Files{
			ServerCA: "/pki/server-ca.crt", ServerCAKey: "/pki/server-ca.key", ClientCA: "/pki/client-ca.crt", ClientCAKey: "/pki/client-ca.key",
			RequestHeaderCA: "/pki/request-header-ca.crt", APIServer: "/pki/apiserver.pem", KubeletClient: "/pki/apiserver-kubelet-client.pem",
			FrontProxyClient: "/pki/front-proxy-client.pem", FrontProxyName: "front-proxy-client", ServiceAccountKey: "/pki/service-account.key",
			EncryptionConfig: "/pki/encryption.yaml", Kubeconfig: "/pki/kedge-controller.kubeconfig",
		},
	}
}

func TestCommandLines(t *testing.T) {
	c := testConfig()
	c.APIServerArgs = []string{"audit-log-path=/a", "--feature-gates=A=true"}
	c.SchedulerArgs = []string{"v=2", "feature-gates=A=true"}
	c.ControllerManagerArgs = []string{"feature-gates=B=false"}
	golden.Compare(t, "testdata/flags.txt", "kube-apiserver\n"+strings.Join(c.apiserverFlags(), "\n")+
		"\n\nkube-controller-manager\n"+strings.Join(c.controllerManagerFlags(), "\n")+
		"\n\nkube-scheduler\n"+strings.Join(c.schedulerFlags(), "\n")+"\n")
}

// TestCheckArgs is about the components' own flag sets. Options can be built several times before gates are set.
func TestCheckArgs(t *testing.T) {
	if err := CheckArgs(testConfig()); err != nil {
		t.Errorf("Kedge's own flags are refused: %v", err)
	}
	for name, set := range map[string]func(*Config){
		"kube-apiserver-arg: unknown flag: --nope":          func(c *Config) { c.APIServerArgs = []string{"nope=1"} },
		"kube-controller-manager-arg: unknown flag: --nope": func(c *Config) { c.ControllerManagerArgs = []string{"nope=1"} },
		"kube-scheduler-arg: unknown flag: --nope":          func(c *Config) { c.SchedulerArgs = []string{"nope=1"} },
		`kube-apiserver-arg: invalid argument "x"`:          func(c *Config) { c.APIServerArgs = []string{"secure-port=x"} },
	} {
		c := testConfig()
		set(&c)
		if err := CheckArgs(c); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("got %v, want %q", err, name)
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
		objects, err := render(e.Name(), testConfig())
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
