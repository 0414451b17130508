// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// modprobe loads a module where the machine has a program for it. Its absence is no fault: a kernel can have
// everything built in.
func modprobe(modules ...string) error {
	// Where the kernel itself looks for it; /sbin is not in everybody's PATH.
	setting, err := os.ReadFile("/proc/sys/kernel/modprobe")
	if err != nil {
		return err
	}
	path := strings.TrimSpace(string(setting))
	if _, err := os.Stat(path); err != nil {
		return err
	}
	for _, module := range modules {
		if err := exec.Command(path, "-q", module).Run(); err != nil {
			return fmt.Errorf("modprobe %s: %w", module, err)
		}
	}
	return nil
}

// probeNFTables lists what is there and makes, in a network namespace of its own, what Kedge needs: a chain that
// rewrites addresses, a set, a rule that uses connection tracking.
func probeNFTables(_ context.Context, o Options) Result {
	conn, err := nftables.New()
	if err != nil {
		return unprobed(err)
	}
	tables, err := conn.ListTables()
	if err == nil {
		err = inNamespaces(unix.CLONE_NEWNET, func() error { return exerciseNFTables(o.ClusterCIDR[0].Addr().Is6()) })
	}
	if os.Geteuid() != 0 && errors.Is(err, fs.ErrPermission) {
		return unprobed(err)
	}
	if err != nil {
		return Result{Status: Fail, Finding: fmt.Sprintf("%v: network policies cannot be enforced, cluster DNS and services do not work", err),
			Remedy: moduleRemedy("nf_tables", "nft_chain_nat", "nft_ct", "nft_masq")}
	}
	return Result{Status: Pass, Finding: fmt.Sprintf("works; %d tables present", len(tables))}
}

func exerciseNFTables(ipv6 bool) error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	family, addrs := nftables.TableFamilyIPv4, nftables.TypeIPAddr
	if ipv6 {
		family, addrs = nftables.TableFamilyIPv6, nftables.TypeIP6Addr
	}
	table := conn.AddTable(&nftables.Table{Name: "kedge-check", Family: family})
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("make a table: %w", err)
	}
	nat := conn.AddChain(&nftables.Chain{Name: "nat", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("make a nat chain: %w", err)
	}
	if err := conn.AddSet(&nftables.Set{Name: "addresses", Table: table, KeyType: addrs, Interval: true}, nil); err != nil {
		return fmt.Errorf("make a set: %w", err)
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("make a set: %w", err)
	}
	conn.AddRule(&nftables.Rule{Table: table, Chain: nat, Exprs: []expr.Any{
		&expr.Ct{Register: 1, Key: expr.CtKeySTATE},
		&expr.Masq{},
	}})
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("make a masquerade rule: %w", err)
	}
	return nil
}

// IPVS tries whether kube-proxy's ipvs mode can work on this kernel: it makes the dummy device and a virtual server
// with the given scheduler in a network namespace of its own and asks for IP sets. Modules are loaded where possible.
// The error says what is missing; nil means that it works.
func IPVS(scheduler string) error {
	if _, err := netlink.GenlFamilyGet("IPVS"); err != nil {
		loadErr := modprobe("ip_vs", "ip_vs_"+scheduler)
		if _, err := netlink.GenlFamilyGet("IPVS"); err != nil {
			if loadErr == nil || errors.Is(loadErr, fs.ErrNotExist) { // no modprobe: nothing to say about modules
				return errors.New("the kernel has no IPVS")
			}
			return fmt.Errorf("the kernel has no IPVS: %w", loadErr)
		}
	}
	return inNamespaces(unix.CLONE_NEWNET, func() error {
		dummy := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "kube-ipvs0"}}
		if err := netlink.LinkAdd(dummy); err != nil {
			return fmt.Errorf("a dummy device cannot be made: %w", err)
		}
		if _, _, err := netlink.IpsetProtocol(); err != nil {
			return fmt.Errorf("the kernel has no IP sets: %w", err)
		}
		handle, err := ipvs.New("")
		if err != nil {
			return err
		}
		defer handle.Close()
		err = handle.NewService(&ipvs.Service{Address: net.IPv4(198, 51, 100, 1), Protocol: unix.IPPROTO_TCP, Port: 1,
			SchedName: scheduler, AddressFamily: unix.AF_INET, Netmask: 0xffffffff})
		if err != nil {
			return fmt.Errorf("a virtual server with scheduler %s cannot be made: %w", scheduler, err)
		}
		return nil
	})
}

func probeIPVS(_ context.Context, o Options) Result {
	if o.ProxyMode != "auto" && o.ProxyMode != "ipvs" {
		return Result{Status: Info, Finding: "not needed in proxy mode " + o.ProxyMode}
	}
	err := IPVS("rr")
	switch {
	case err == nil:
		return Result{Status: Pass, Finding: "works, with scheduler rr"}
	case os.Geteuid() != 0 && errors.Is(err, fs.ErrPermission):
		return unprobed(err)
	case o.ProxyMode == "ipvs":
		return Result{Status: Fail, Finding: err.Error(), Remedy: moduleRemedy("ip_vs", "ip_vs_rr", "dummy", "ip_set") + "\nor let Kedge choose:\n$ kedge server --proxy-mode auto"}
	}
	return Result{Status: Warning, Finding: err.Error() + "; proxy mode nftables will be used",
		Remedy: moduleRemedy("ip_vs", "ip_vs_rr", "dummy", "ip_set") + "\nNothing has to be done if nftables will do."}
}
