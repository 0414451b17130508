// SPDX-License-Identifier: Apache-2.0

package uninstall

import (
	"fmt"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/pkg/config"
)

func TestSafe(t *testing.T) {
	places := func(dir string) Places {
		return Places{&config.Config{DataDir: dir, RunDir: "/run/kedge", KubeletRootDir: "/var/lib/kubelet"}}
	}
	for _, dir := range []string{"/var/lib/kedge", "/data", "/srv/kedge", "/mnt/ssd/k", "/opt/kedge"} {
		if err := places(dir).safe(); err != nil {
			t.Errorf("%s: %v", dir, err)
		}
	}
	for _, dir := range []string{"/", "/var", "/var/lib", "/var/lib/", "/home", "/home/me", "/etc", "/etc/x", "/usr/local", "/run", "/proc/1", "", "var", "/var/lib/../lib"} {
		if err := places(dir).safe(); err == nil {
			t.Errorf("%q would be removed", dir)
		}
	}
}

func TestClassify(t *testing.T) {
	p := Places{&config.Config{DataDir: "/var/lib/kedge-test", RunDir: "/run/kedge-test", KubeletRootDir: "/var/lib/kubelet-test"}}
	const pod = "/var/lib/kubelet-test/pods/6f1c/"
	for _, c := range []struct {
		path, fsType  string
		ours, foreign bool
	}{
		{pod + "volumes/kubernetes.io~projected/kube-api-access-x", "tmpfs", true, false},
		{pod + "volumes/kubernetes.io~empty-dir/cache", "tmpfs", true, false},
		{pod + "volumes/kubernetes.io~csi/pvc-1/mount", "ext4", true, false},
		{pod + "volume-subpaths/data/app/0", "ext4", true, false},
		{pod + "volumes/kubernetes.io~empty-dir/data/mine", "tmpfs", true, true},
		{pod + "volumes/kubernetes.io~empty-dir/data/mine", "ext4", true, false},
		{"/var/lib/kubelet-test/plugins/kubernetes.io/csi/x/globalmount", "ext4", true, false},
		{"/var/lib/kubelet-test/other", "tmpfs", true, true},
		{"/var/lib/kubelet-test", "ext4", false, false},
		{"/var/lib/kubelet-test2/x", "ext4", false, false},
		{"/var/lib/kedge-test/containerd/tmpmounts/x", "overlay", true, false},
		{"/var/lib/kedge-test/containerd", "ext4", false, false},
		{"/var/lib/kedge-test/storage", "ext4", false, false},
		{"/var/lib/kedge-test", "ext4", false, false},
		{"/run/kedge-test/containerd/io.containerd.runtime.v2.task/k8s.io/x/rootfs", "overlay", true, false},
		{"/run", "tmpfs", false, false},
	} {
		m := mount{path: c.path, fsType: c.fsType}
		if ours := p.classify(&m); ours != c.ours || m.foreign != c.foreign {
			t.Errorf("%s %s: ours %v, foreign %v", c.fsType, c.path, ours, m.foreign)
		}
	}
}

func TestParse(t *testing.T) {
	for text, want := range map[string]bool{
		"0::/kubepods.slice/kubepods-burstable.slice/x.scope\n": true,
		"4:memory:/user\n3:pids:/kubepods/besteffort/podx/y\n":  true,
		"0::/docker/abc/kubepods/x\n":                           false,
		"0::/user.slice/kubepods\n":                             false,
		"":                                                      false,
		"kubepods":                                              false,
	} {
		if got := podCgroup(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
	for text, want := range map[string]string{
		"12 (a) b) S 7 1 1": "S 7",
		"12 (x) Z 1":        "Z 1",
		"12 (x)":            "",
		"12 (x) R x":        "",
		"":                  "",
	} {
		state, ppid, ok := parseStat(text)
		got := ""
		if ok {
			got = fmt.Sprint(state, " ", ppid)
		}
		if got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add("12 (a) b) S 7 1 1")
	f.Add(")")
	f.Fuzz(func(t *testing.T, text string) {
		if state, _, ok := parseStat(text); ok && state == "" {
			t.Error("no state")
		}
	})
}

func FuzzPodCgroup(f *testing.F) {
	f.Add("0::/kubepods/x\n")
	f.Add("1:a:/b:c")
	f.Fuzz(func(t *testing.T, text string) {
		if podCgroup(text) && !strings.Contains(text, "/kubepods") {
			t.Error("found where there is none")
		}
	})
}
