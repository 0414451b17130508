// SPDX-License-Identifier: Apache-2.0

package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/dns"
	"github.com/kedge-io/kedge/pkg/netpolicy"
	"github.com/kedge-io/kedge/pkg/servicelb"
)

// ipvsDevice is where kube-proxy's mode ipvs puts the addresses of Services.
const ipvsDevice = "kube-ipvs0"

// CleanupNetwork removes all that the parts of the node process and CNI plugins have left in this machine's network, for uninstalling.
// Nothing of Kedge runs any more and pods are gone. What is not there is no error.
func CleanupNetwork(ctx context.Context, cfg Config) error {
	return errors.Join(
		removeRules(ctx, func(chain string) bool {
			return isRulesChain(chain) || isKubeletChain(chain) || strings.HasPrefix(chain, "CNI-")
		}),
		removeTables(slices.Concat(ruleTables(), []string{"cni_hostport"})),
		removeEmptyTables(),
		removeIPVS(),
		removeDevices(nil),
		pruneRoutes(cfg.ClusterCIDR, nil),
		removeServiceRoutes(),
		netpolicy.Cleanup(ctx),
		servicelb.Cleanup(ctx),
		dns.Cleanup(ctx, cfg.ClusterDNS),
		os.RemoveAll(cfg.policyDir()),
		os.RemoveAll(filepath.Join(cfg.RunDir, "cni")),
		removeEmptyDirs("/var/lib/cni/results", "/var/lib/cni"), // libcni's
		remove(modeFile(cfg.RunDir)),
		remove(wireguardKey(cfg.RunDir)),
	)
}

func remove(file string) error {
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func removeEmptyDirs(dirs ...string) error {
	for _, dir := range dirs {
		if err := remove(dir); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
	return nil
}

// modeFile names the proxy mode whose rules are in the kernel. It is gone after a reboot, like them.
func modeFile(runDir string) string { return filepath.Join(runDir, "proxy-mode") }

// switchMode removes what kube-proxy and flannel have left of another proxy mode. Upstream's own cleanup goes by the mode that starts and
// leaves a part. In the mode that was there already nothing is touched: Services have to work on while this process starts anew.
func switchMode(ctx context.Context, runDir string, mode config.ProxyMode) error {
	if was, err := os.ReadFile(modeFile(runDir)); err == nil && string(was) == string(mode) {
		return nil
	}
	err := errors.Join(removeRules(ctx, isRulesChain), removeTables(ruleTables()), removeEmptyTables(), removeIPVS(), restoreSysctls(runDir, modeSysctls()))
	if err != nil {
		return fmt.Errorf("remove what another proxy mode has left: %w", err)
	}
	return os.WriteFile(modeFile(runDir), []byte(mode), 0o600)
}

// ruleTables are the nftables tables of kube-proxy and flannel.
func ruleTables() []string { return []string{"kube-proxy", "flannel-ipv4", "flannel-ipv6"} }

// isRulesChain says whether a chain of iptables is kube-proxy's or flannel's.
func isRulesChain(chain string) bool {
	return strings.HasPrefix(chain, "FLANNEL-") || strings.HasPrefix(chain, "KUBE-") && !isKubeletChain(chain)
}

// isKubeletChain says whether a chain is one that the kubelet makes in every proxy mode.
func isKubeletChain(chain string) bool {
	return slices.Contains([]string{"KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT"}, chain)
}

// removeRules removes chains from all tables of iptables, with the rules that lead to them.
func removeRules(ctx context.Context, ours func(chain string) bool) error {
	var errs []error
	for _, program := range []string{"iptables", "ip6tables"} {
		saved, err := exec.CommandContext(ctx, program+"-save").Output()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s-save: %w", program, err))
			continue
		}
		change := removal(string(saved), ours)
		if change == "" {
			continue
		}
		cmd := exec.CommandContext(ctx, program+"-restore", "--noflush", "--wait")
		cmd.Stdin = strings.NewReader(change)
		if out, err := cmd.CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("%s-restore: %w: %s", program, err, bytes.TrimSpace(out)))
		}
	}
	return errors.Join(errs...)
}

// removal makes, from what iptables-save says, the input of iptables-restore --noflush that removes chains.
func removal(saved string, ours func(chain string) bool) string {
	var out strings.Builder
	var table string
	var flush, jumps, chains []string
	for line := range strings.Lines(saved) {
		line = strings.TrimRight(line, "\n")
		switch fields := strings.Fields(line); {
		case strings.HasPrefix(line, "*"):
			table, flush, jumps, chains = line, nil, nil, nil
		case strings.HasPrefix(line, ":") && ours(fields[0][1:]):
			flush, chains = append(flush, fields[0]+" - [0:0]"), append(chains, "-X "+fields[0][1:])
		case strings.HasPrefix(line, "-A ") && !ours(fields[1]) && ours(target(fields)):
			jumps = append(jumps, "-D "+strings.TrimPrefix(line, "-A "))
		case line == "COMMIT" && len(chains) > 0:
			out.WriteString(strings.Join(slices.Concat([]string{table}, flush, jumps, chains, []string{line}), "\n") + "\n")
		}
	}
	return out.String()
}

// target is the chain that a rule leads to. A comment before it may have the same words.
func target(rule []string) string {
	chain := ""
	for i, word := range rule[:len(rule)-1] {
		if word == "-j" || word == "-g" {
			chain = rule[i+1]
		}
	}
	return chain
}

// removeTables removes nftables tables by name.
func removeTables(names []string) error {
	return changeTables(func(_ *nftables.Conn, t *nftables.Table) (bool, error) { return slices.Contains(names, t.Name), nil })
}

// removeEmptyTables removes the tables and chains that iptables makes when it is first asked for something, if nobody has anything in
// them.
func removeEmptyTables() error {
	return changeTables(func(c *nftables.Conn, t *nftables.Table) (bool, error) {
		if t.Family != nftables.TableFamilyIPv4 && t.Family != nftables.TableFamilyIPv6 || !slices.Contains([]string{"filter", "nat", "mangle", "raw", "security"}, t.Name) {
			return false, nil
		}
		chains, err := c.ListChainsOfTableFamily(t.Family)
		if err != nil {
			return false, err
		}
		var empty []*nftables.Chain
		used := false
		for _, chain := range chains {
			if chain.Table.Name != t.Name {
				continue
			}
			rules, err := c.GetRules(t, chain)
			if err != nil {
				return false, err
			}
			if len(rules) > 0 || chain.Hooknum == nil || chain.Policy != nil && *chain.Policy != nftables.ChainPolicyAccept {
				used = true
			} else {
				empty = append(empty, chain)
			}
		}
		if used {
			for _, chain := range empty {
				c.DelChain(chain)
			}
		}
		return !used, nil
	})
}

// changeTables calls f for all tables, and removes those for which it returns true, with what f wants removed besides.
func changeTables(f func(*nftables.Conn, *nftables.Table) (bool, error)) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	tables, err := c.ListTables()
	if err != nil {
		return fmt.Errorf("list the tables of nftables: %w", err)
	}
	for _, t := range tables {
		remove, err := f(c, t)
		if err != nil {
			return fmt.Errorf("nftables table %s: %w", t.Name, err)
		}
		if remove {
			c.DelTable(t)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("remove tables of nftables: %w", err)
	}
	return nil
}

// removeIPVS removes the virtual servers, device and sets of kube-proxy's mode ipvs. Somebody else's virtual servers are left alone
// on a machine where that mode did not run.
func removeIPVS() error {
	if _, err := netlink.LinkByName(ipvsDevice); err == nil {
		handle, err := ipvs.New("")
		if err != nil {
			return fmt.Errorf("virtual servers of IPVS: %w", err)
		}
		defer handle.Close()
		if err := handle.Flush(); err != nil {
			return fmt.Errorf("remove the virtual servers of IPVS: %w", err)
		}
	}
	errs := []error{removeLink(ipvsDevice)}
	sets, err := netlink.IpsetListAll()
	if err != nil {
		return errors.Join(errs...) // the kernel has none
	}
	for _, set := range sets {
		if strings.HasPrefix(set.SetName, "KUBE-") {
			if err := netlink.IpsetDestroy(set.SetName); err != nil {
				errs = append(errs, fmt.Errorf("remove the IP set %s: %w", set.SetName, err))
			}
		}
	}
	return errors.Join(errs...)
}
