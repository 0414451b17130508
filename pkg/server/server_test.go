// SPDX-License-Identifier: Apache-2.0

package server

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/pkg/config"
)

func TestCheckOptions(t *testing.T) {
	cfg := &config.Config{Role: config.RoleServer,
		DataDir: "/d", KubeletRootDir: "/k", NodeName: "n", BindAddress: netip.MustParseAddr("0.0.0.0"), HTTPSListenPort: 443,
		Cluster: config.Cluster{ClusterDNS: netip.MustParseAddr("10.43.0.10"), ProxyMode: config.ProxyAuto,
			FlannelBackend: config.FlannelHostGW, Disable: []string{config.ComponentCoreDNS}},
		DisableKubeProxy: true,
	}
	o := CheckOptions(cfg)
	if o.DataDir != "/d" || o.KubeletDir != "/k" || o.NodeName != "n" || o.ProxyMode != "none" || o.FlannelBackend != "host-gw" {
		t.Errorf("got %+v", o)
	}
	var ports []string
	for _, p := range o.Ports {
		ports = append(ports, p.String())
	}
	if got := strings.Join(ports, " "); got != "443/tcp 2380/tcp 127.0.0.1:6444/tcp 10250/tcp" {
		t.Errorf("ports %s", got)
	}
}
