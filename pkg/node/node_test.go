// SPDX-License-Identifier: Apache-2.0

package node

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/tests/golden"
)

func testConfig() Config {
	return Config{
		Name: "n1", Address: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Labels: []string{"disk=ssd"}, Taints: []string{"a=b:NoSchedule"},
		Kubeconfig: "/pki/kubelet-client.kubeconfig", ServingCert: "/pki/kubelet-serving.pem", ClientCA: "/pki/client-ca.crt",
		ContainerdSocket: "/run/kedge/containerd/containerd.sock", RootDir: "/var/lib/kubelet", RunDir: "/run/kedge", DataDir: "/var/lib/kedge",
		CNIConfDir: "/run/kedge/cni/net.d", ClusterCIDR: config.Prefixes{netip.MustParsePrefix("10.42.0.0/16")},
		ClusterDNS: netip.MustParseAddr("10.43.0.10"), ClusterDomain: "cluster.local", ProxyMode: config.ProxyNFTables, Backend: config.FlannelVXLAN, DNS: true,
	}
}

func TestConflist(t *testing.T) {
	for name, podCIDRs := range map[string]string{"conflist.json": "10.42.1.0/24", "conflist-dual.json": "fd42:0:0:1::/64,10.42.1.0/24"} {
		var list config.Prefixes
		if err := list.UnmarshalText([]byte(podCIDRs)); err != nil {
			t.Fatal(err)
		}
		b, err := conflist(testConfig(), list, 1450)
		if err != nil {
			t.Fatal(err)
		}
		golden.Compare(t, "testdata/"+name, string(b)+"\n")
	}
}

func TestContainerdConfig(t *testing.T) {
	got, err := renderContainerdConfig(ContainerdConfig{
		Root: "/var/lib/kedge/containerd", State: "/run/kedge/containerd", Runc: "/b/runc", Shim: "/b/containerd-shim-runc-v2", CNIBinDir: "/b/cni", CNIConfDir: "/run/kedge/cni/net.d",
		Snapshotter: "overlayfs", CertsDir: "/run/kedge/registries", PauseImage: "kedge.io/pause:1.0", SystemdCgroup: true,
		RegistryConfig: "[plugins.'io.containerd.cri.v1.images'.registry.configs.\"r:5000\".auth]\nusername = 'u'\n",
	})
	if err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "testdata/containerd.toml", got)
}

func TestProxyFlags(t *testing.T) {
	cfg := testConfig()
	cfg.KubeletArgs = []string{"feature-gates=A=true", "max-pods=50"}
	cfg.ProxyArgs = []string{"--feature-gates=B=false", "v=2"}
	// What depends on the machine's capabilities is not for a golden file.
	got := slices.DeleteFunc(proxyFlags(cfg, config.ProxyNFTables), func(f string) bool {
		return strings.HasPrefix(f, "--oom-score-adj=") || strings.HasPrefix(f, "--conntrack-")
	})
	golden.Compare(t, "testdata/proxy.txt", strings.Join(got, "\n")+"\n")
}

func TestKubelet(t *testing.T) {
	cfg := testConfig()
	cfg.KubeletArgs = []string{"max-pods=50", "--eviction-hard=memory.available<1Gi"}
	k, err := newKubelet(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := k.server
	if s.MaxPods != 50 || s.EvictionHard["memory.available"] != "1Gi" {
		t.Errorf("the operator's arguments do not win: %d pods, eviction %v", s.MaxPods, s.EvictionHard)
	}
	if s.Authentication.Anonymous.Enabled || s.ReadOnlyPort != 0 || s.Authorization.Mode != kubeletconfig.KubeletAuthorizationModeWebhook {
		t.Error("the kubelet answers strangers")
	}
	if s.NodeLabels["disk"] != "ssd" || len(s.RegisterWithTaints) != 1 || s.NodeIP != "192.0.2.1" || s.ResolverConfig != "/run/kedge/resolv.conf" {
		t.Errorf("labels %v, taints %v, address %s, resolver %s", s.NodeLabels, s.RegisterWithTaints, s.NodeIP, s.ResolverConfig)
	}
}

func TestDiskThresholds(t *testing.T) {
	for _, tt := range []struct {
		size           uint64
		node, image    string
		imageHigh, low int32
	}{
		{8 << 30, "819Mi", "1228Mi", 81, 71},
		{32 << 30, "2048Mi", "3072Mi", 86, 76},
		{1 << 40, "2048Mi", "3072Mi", 95, 85},
	} {
		kc := &kubeletconfig.KubeletConfiguration{}
		setDiskThresholds(kc, tt.size)
		if kc.EvictionHard["nodefs.available"] != tt.node || kc.EvictionHard["imagefs.available"] != tt.image ||
			kc.ImageGCHighThresholdPercent != tt.imageHigh || kc.ImageGCLowThresholdPercent != tt.low {
			t.Errorf("%d GiB: %v, images %d to %d", tt.size>>30, kc.EvictionHard, kc.ImageGCHighThresholdPercent, kc.ImageGCLowThresholdPercent)
		}
		// Collecting has to start before eviction does.
		image := min(tt.size*15/100, 3<<30)
		if free := tt.size * uint64(100-kc.ImageGCHighThresholdPercent) / 100; free <= image {
			t.Errorf("%d GiB: images are collected at %d MiB free, eviction starts at %d MiB", tt.size>>30, free>>20, image>>20)
		}
	}
}

func TestComponents(t *testing.T) {
	cfg := testConfig()
	if got := cfg.Components(); !slices.Equal(got, []string{"kubelet", "kube-proxy", "flannel", "dns"}) {
		t.Errorf("got %v", got)
	}
	cfg.ProxyMode, cfg.Backend, cfg.DNS = "", config.FlannelNone, false
	if got := cfg.Components(); !slices.Equal(got, []string{"kubelet"}) {
		t.Errorf("got %v", got)
	}
}

func TestCheckArgs(t *testing.T) {
	if err := CheckArgs(testConfig()); err != nil {
		t.Errorf("Kedge's own values are refused: %v", err)
	}
	for _, tt := range []struct {
		want string
		set  func(*Config)
	}{
		{"kubelet-arg: unknown flag: --nope", func(c *Config) { c.KubeletArgs = []string{"nope=1"} }},
		{"kube-proxy-arg: unknown flag: --nope", func(c *Config) { c.ProxyArgs = []string{"nope=1"} }},
		{`kubelet-arg: invalid argument "many"`, func(c *Config) { c.KubeletArgs = []string{"max-pods=many"} }},
		{"kubelet-arg: invalid configuration", func(c *Config) { c.KubeletArgs = []string{"image-gc-high-threshold=101"} }},
		// The last one: the gates of a process that was given an unknown one stay spoilt.
		{"kubelet-arg feature-gates: unrecognized", func(c *Config) { c.KubeletArgs = []string{"feature-gates=Nope=true"} }},
	} {
		cfg := testConfig()
		tt.set(&cfg)
		if err := CheckArgs(cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want %q", err, tt.want)
		}
	}
}
