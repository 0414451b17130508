// SPDX-License-Identifier: Apache-2.0

package server

import (
	"errors"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/supervise"
)

func TestCheckOptions(t *testing.T) {
	cfg := &config.Server{
		DataDir: "/d", KubeletRootDir: "/k", NodeName: "n", BindAddress: netip.MustParseAddr("0.0.0.0"), HTTPSListenPort: 443,
		ClusterDNS: netip.MustParseAddr("10.43.0.10"), ProxyMode: config.ProxyAuto, FlannelBackend: config.FlannelHostGW,
		Disable: []string{config.ComponentCoreDNS}, DisableKubeProxy: true,
	}
	o := CheckOptions(cfg)
	if o.DataDir != "/d" || o.KubeletDir != "/k" || o.NodeName != "n" || o.ProxyMode != "none" || o.FlannelBackend != "host-gw" {
		t.Errorf("got %+v", o)
	}
	var ports []string
	for _, p := range o.Ports {
		ports = append(ports, p.String())
	}
	if got := strings.Join(ports, " "); got != "443/tcp 2380/tcp 10250/tcp" {
		t.Errorf("ports %s", got)
	}
}

func TestNotReady(t *testing.T) {
	for want, components := range map[string][]supervise.Component{
		"":                             {{Name: "a", State: supervise.Ready, Reason: "mode x"}},
		"b waiting: for a":             {{Name: "a", State: supervise.Ready}, {Name: "b", State: supervise.Waiting, Reason: "for a"}},
		"a stopped; b failed: no disk": {{Name: "a", State: supervise.Stopped}, {Name: "b", State: supervise.Failed, Reason: "no disk"}},
	} {
		if got := notReady([]supervise.ProcessStatus{{Components: components}}); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestOneServerAtATime(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(dir); err == nil || !strings.Contains(err.Error(), "another kedge server is running on this machine (pid "+strconv.Itoa(os.Getpid())+")") {
		t.Errorf("second lock: %v", err)
	}
	unlock()
	unlock, err = lock(dir)
	if err != nil {
		t.Fatalf("after the first is gone: %v", err)
	}
	unlock()
}

func TestStatusWithoutServer(t *testing.T) {
	if _, err := GetStatus(t.Context(), t.TempDir()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("got %v", err)
	}
}
