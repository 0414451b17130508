// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"
	"github.com/vishvananda/netlink"
)

// forwarding are the settings by which the machine is a router for its pods.
func forwarding() []string { return []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} }

// kubeletSysctls are those that the kubelet sets for itself (its pkg/util/sysctl).
func kubeletSysctls() []string {
	return []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"}
}

// modeSysctls are those that kube-proxy sets for one of its modes (its pkg/proxy/ipvs and pkg/proxy/iptables).
func modeSysctls() []string {
	return []string{
		"net/ipv4/conf/all/arp_ignore", "net/ipv4/conf/all/arp_announce", "net/ipv4/conf/all/route_localnet",
		"net/ipv4/vs/conntrack", "net/ipv4/vs/conn_reuse_mode", "net/ipv4/vs/expire_nodest_conn", "net/ipv4/vs/expire_quiescent_template",
	}
}

// conntrackSysctls are those that kube-proxy sets in each mode.
func conntrackSysctls() []string {
	return []string{"net/netfilter/nf_conntrack_max", "net/netfilter/nf_conntrack_tcp_timeout_established", "net/netfilter/nf_conntrack_tcp_timeout_close_wait"}
}

// sysctlFile holds the values from before the first start since the machine has booted.
func sysctlFile(runDir string) string { return filepath.Join(runDir, "sysctls.json") }

func sysctl(name string) (string, error) {
	b, err := os.ReadFile("/proc/sys/" + name)
	return strings.TrimSpace(string(b)), err
}

// rememberSysctls keeps the settings that this process is about to change.
func rememberSysctls(runDir string) error {
	file := sysctlFile(runDir)
	if _, err := os.Stat(file); err == nil {
		return nil
	}
	values := map[string]string{}
	for _, name := range slices.Concat(forwarding(), kubeletSysctls(), modeSysctls(), conntrackSysctls()) {
		if v, err := sysctl(name); err == nil { // otherwise this kernel has no such setting
			values[name] = v
		}
	}
	b, err := json.Marshal(values)
	if err != nil {
		return err
	}
	return renameio.WriteFile(file, b, 0o600)
}

// RestoreSysctls gives the settings that Kedge has changed since the machine has booted the values from before, for uninstalling. As long as
// there are bridges or the like of other programs the machine goes on forwarding their packets, and say tells so.
func RestoreSysctls(runDir string, say func(string)) error {
	names := slices.Concat(kubeletSysctls(), modeSysctls(), conntrackSysctls())
	if router, err := routesForOthers(); err != nil {
		return err
	} else if router != "" {
		say("the machine goes on forwarding packets: other programs may need that, for " + router)
	} else {
		names = append(names, forwarding()...)
	}
	return restoreSysctls(runDir, names)
}

// restoreSysctls gives settings the values from before the first start since the machine has booted, as far as they are known.
func restoreSysctls(runDir string, names []string) error {
	b, err := os.ReadFile(sysctlFile(runDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var values map[string]string
	if err := json.Unmarshal(b, &values); err != nil {
		return fmt.Errorf("%s: %w", sysctlFile(runDir), err)
	}
	var errs []error
	for _, name := range names {
		was, known := values[name]
		if is, err := sysctl(name); !known || err != nil || is == was {
			continue
		}
		errs = append(errs, os.WriteFile("/proc/sys/"+name, []byte(was), 0o644))
	}
	return errors.Join(errs...)
}

// routesForOthers names a network interface for which packets are likely to be forwarded. Kedge's own are gone.
func routesForOthers() (string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return "", err
	}
	for _, l := range links {
		switch l.Type() {
		case "bridge", "wireguard", "tun", "vxlan", "ipip", "gre":
			return l.Attrs().Name, nil
		}
	}
	return "", nil
}

// setSysctls makes the kernel forward pods' packets.
func setSysctls(log *slog.Logger) error {
	for _, name := range forwarding() {
		file := "/proc/sys/" + name
		if err := os.WriteFile(file, []byte("1"), 0o644); errors.Is(err, os.ErrNotExist) {
			log.Info("this kernel has no such setting", "file", file)
		} else if err != nil {
			return fmt.Errorf("packets of pods could not be forwarded: %w", err)
		}
	}
	return nil
}
