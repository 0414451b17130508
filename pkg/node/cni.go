// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/config"
)

// writeConflist tells containerd how to attach pods: routed (ptp), so that every packet passes the IP hooks and neither
// br_netfilter nor hairpin mode matters. It lives in the run directory: after a reboot it is not there before the network is.
func writeConflist(cfg Config, podCIDRs config.Prefixes, mtu int) error {
	b, err := conflist(cfg, podCIDRs, mtu)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.CNIConfDir, 0o755); err != nil {
		return err
	}
	// The file has to appear whole, and by a rename within the directory that containerd watches: it looks when a file is written,
	// renamed or removed, not when one is created or moved in (its internal/cri/server/cni_conf_syncer.go).
	tmp := filepath.Join(cfg.CNIConfDir, ".kedge.tmp")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, conflistFile(cfg))
}

func conflistFile(cfg Config) string { return filepath.Join(cfg.CNIConfDir, "10-kedge.conflist") }

func conflist(cfg Config, podCIDRs config.Prefixes, mtu int) ([]byte, error) {
	type object = map[string]any
	var ranges [][]object
	var routes []object
	for _, p := range podCIDRs {
		ranges = append(ranges, []object{{"subnet": p.String()}})
		if p.Addr().Is6() {
			routes = append(routes, object{"dst": "::/0"})
		} else {
			routes = append(routes, object{"dst": "0.0.0.0/0"})
		}
	}
	plugins := []object{
		{
			"type": "ptp",
			"mtu":  mtu,
			"ipam": object{
				"type": "host-local",
				// Addresses are given back by a reboot, like the pods that had them.
				"dataDir": filepath.Join(cfg.RunDir, "cni", "ipam"),
				"ranges":  ranges,
				"routes":  routes,
			},
		},
		// In every proxy mode the same: host ports of pods that live through a change of the mode must go away with their pods.
		{"type": "portmap", "capabilities": object{"portMappings": true}, "snat": true, "backend": "nftables"},
		{"type": "bandwidth", "capabilities": object{"bandwidth": true}},
	}
	last := object{"type": "kedge-policy"}
	if slices.ContainsFunc(podCIDRs, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		last["ipv6"] = true
		plugins = append([]object{{"type": "kedge-policy", "ipv6": true}}, plugins...)
	}
	if cfg.NetworkPolicy {
		last["socket"], last["dir"] = cfg.policySocket(), cfg.policyDir()
	}
	if len(last) > 1 {
		plugins = append(plugins, last)
	}
	return json.MarshalIndent(object{
		"cniVersion": "1.0.0",
		"name":       "kedge",
		"plugins":    plugins,
	}, "", "  ")
}

func writable(file string) bool { return unix.Access(file, unix.W_OK) == nil }
