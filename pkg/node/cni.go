// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/json"
	"os"
	"path/filepath"

	"github.com/safchain/ethtool"
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
	// containerd watches the directory and reads a file when it appears: it has to appear whole.
	tmp := filepath.Join(cfg.CNIConfDir, ".kedge.tmp")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(cfg.CNIConfDir, "10-kedge.conflist"))
}

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
	portmap := object{"type": "portmap", "capabilities": object{"portMappings": true}, "snat": true, "backend": "nftables"}
	if cfg.ProxyMode == config.ProxyIPTables {
		portmap["backend"] = "iptables"
	}
	return json.MarshalIndent(object{
		"cniVersion": "1.0.0",
		"name":       "kedge",
		"plugins": []object{
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
			portmap,
			{"type": "bandwidth", "capabilities": object{"bandwidth": true}},
		},
	}, "", "  ")
}

// disableTxChecksum turns transmit checksum offload of a device off (ethtool -K DEV tx off). With it on, some kernels and
// network cards send VXLAN packets whose inner checksum nobody has filled in; the receiver drops them.
func disableTxChecksum(device string) error {
	e, err := ethtool.NewEthtool()
	if err != nil {
		return err
	}
	defer e.Close()
	return e.Change(device, map[string]bool{"tx-checksum-ip-generic": false})
}

func writable(file string) bool { return unix.Access(file, unix.W_OK) == nil }
