// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/prometheus/procfs"
)

// process is one that runs in the same network as this one.
type process struct {
	pid  int
	name string
}

// processes lists what runs in this network and mount namespace, without this program. A kubelet inside a container
// (kind, k3d, a virtual cluster) has namespaces of its own and is nobody's rival.
func processes() ([]process, error) {
	proc, err := procfs.NewDefaultFS()
	if err != nil {
		return nil, err
	}
	all, err := proc.AllProcs()
	if err != nil {
		return nil, err
	}
	var found []process
	for _, p := range all {
		comm, err := p.Comm()
		if err != nil || !interesting(comm) || !sameNamespaces(p.PID) || sameProgram(p.PID) {
			continue
		}
		found = append(found, process{pid: p.PID, name: comm})
	}
	return found, nil
}

// interesting says whether a process name (cut to 15 characters by the kernel) is one that the probes look for, so
// that the others need not be looked at more closely.
func interesting(comm string) bool {
	_, known := kubernetesProducts()[comm]
	return known || containerProducts()[comm] != "" || comm == "firewalld"
}

// product is another Kubernetes and how to stop it for good.
type product struct {
	name, stop string
}

func kubernetesProducts() map[string]product {
	unit := func(name, units string) product { return product{name, "systemctl disable --now " + units} }
	return map[string]product{
		"kubelet": unit("kubeadm or another distribution", "kubelet"), "kube-apiserver": unit("another control plane", "kube-apiserver"),
		"kube-proxy": unit("kubeadm or another distribution", "kube-proxy"),
		"k3s":        unit("k3s", "k3s k3s-agent"), "k3s-server": unit("k3s", "k3s"), "k3s-agent": unit("k3s", "k3s-agent"),
		"k0s": unit("k0s", "k0scontroller k0sworker"), "rke2": unit("RKE2", "rke2-server rke2-agent"),
		"kubesolo": unit("KubeSolo", "kubesolo"), "kubelite": {"MicroK8s", "snap disable microk8s"},
	}
}

func containerProducts() map[string]string {
	return map[string]string{"dockerd": "Docker", "containerd": "containerd", "crio": "CRI-O", "podman": "Podman"}
}

// sameNamespaces compares with the calling process; what cannot be seen counts as the same.
func sameNamespaces(pid int) bool {
	for _, kind := range []string{"net", "mnt"} {
		mine, err1 := os.Readlink("/proc/self/ns/" + kind)
		theirs, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		if err1 == nil && err2 == nil && mine != theirs {
			return false
		}
	}
	return true
}

func probeOtherKubernetes(context.Context, Options) Result {
	running, err := processes()
	if err != nil {
		return unprobed(err)
	}
	return judgeKubernetes(running)
}

func judgeKubernetes(running []process) Result {
	var found, stop []string
	for _, p := range running {
		if other, known := kubernetesProducts()[p.name]; known {
			found = append(found, fmt.Sprintf("%s (%s, pid %d)", p.name, other.name, p.pid))
			stop = append(stop, "$ "+other.stop)
		}
	}
	if len(found) == 0 {
		return Result{Status: Pass, Finding: "no other Kubernetes runs here"}
	}
	slices.Sort(stop)
	return Result{Status: Fail, Finding: strings.Join(found, ", ") + " runs here: two of them share /var/lib/kubelet, ports and packet rules, and break each other",
		Remedy: "Stop it and keep it from starting again:\n" + strings.Join(slices.Compact(stop), "\n") +
			"\nBetter yet, uninstall it, so that its network devices and rules go, too."}
}

func probeOtherContainers(context.Context, Options) Result {
	running, err := processes()
	if err != nil {
		return unprobed(err)
	}
	return judgeContainers(running)
}

func judgeContainers(running []process) Result {
	var found []string
	for _, p := range running {
		if product := containerProducts()[p.name]; product != "" {
			found = append(found, product)
		}
	}
	if len(found) == 0 {
		return Result{Status: Pass, Finding: "none"}
	}
	slices.Sort(found)
	return Result{Status: Info, Finding: strings.Join(slices.Compact(found), ", ") + " runs beside; Kedge brings its own containerd and does not touch it"}
}

// firewallState is what the judgement needs to know.
type firewallState struct {
	firewalld bool
	ufw       bool
	drops     []string // base chains that drop by policy, as "table/chain"
	docker    bool     // among them Docker's
}

func probeFirewall(_ context.Context, o Options) Result {
	running, err := processes()
	if err != nil {
		return unprobed(err)
	}
	var s firewallState
	s.firewalld = slices.ContainsFunc(running, func(p process) bool { return p.name == "firewalld" })
	if conf, err := os.ReadFile("/etc/ufw/ufw.conf"); err == nil {
		s.ufw = slices.Contains(strings.Fields(strings.ToLower(string(conf))), "enabled=yes")
	}
	conn, err := nftables.New()
	if err != nil {
		return unprobed(err)
	}
	chains, err := conn.ListChains()
	if os.Geteuid() != 0 && errors.Is(err, fs.ErrPermission) {
		return unprobed(err)
	}
	// An error otherwise means that there is no nftables, which another probe reports.
	for _, c := range chains {
		if droppingChain(c) {
			s.drops = append(s.drops, c.Table.Name+"/"+c.Name)
		}
		s.docker = s.docker || strings.HasPrefix(c.Name, "DOCKER")
	}
	return judgeFirewall(s, o)
}

// droppingChain says whether packets that no rule accepts end in this chain. Kedge's own tables are left out.
func droppingChain(c *nftables.Chain) bool {
	if c.Hooknum == nil || c.Policy == nil || *c.Policy != nftables.ChainPolicyDrop || strings.HasPrefix(c.Table.Name, "kedge") {
		return false
	}
	return *c.Hooknum == *nftables.ChainHookInput || *c.Hooknum == *nftables.ChainHookForward
}

func judgeFirewall(s firewallState, o Options) Result {
	ports := []string{}
	for _, p := range o.Ports {
		if !p.Addr.IsValid() || p.Addr.IsUnspecified() {
			ports = append(ports, fmt.Sprintf("%d/%s", p.Port, p.Proto))
		}
	}
	own := slices.Concat(o.ClusterCIDR, o.ServiceCIDR)
	switch {
	case s.firewalld:
		var add []string
		for _, p := range ports {
			add = append(add, "--add-port="+p)
		}
		return Result{Status: Warning, Finding: "firewalld is running: it drops traffic between nodes and of pods unless told otherwise",
			Remedy: "$ firewall-cmd --permanent " + strings.Join(add, " ") +
				"\n$ firewall-cmd --permanent --zone=trusted --add-source=" + join(own, " --add-source=") +
				"\n$ firewall-cmd --reload\nor switch it off:\n$ systemctl disable --now firewalld"}
	case s.ufw:
		var allow []string
		for _, p := range ports {
			allow = append(allow, "ufw allow "+p)
		}
		return Result{Status: Warning, Finding: "ufw is enabled: it drops traffic between nodes and of pods unless told otherwise",
			Remedy: "$ " + strings.Join(allow, " && ") + "\n$ ufw allow from " + join(own, " && ufw allow from ") + " && ufw default allow routed" +
				"\nor switch it off:\n$ ufw disable"}
	case len(s.drops) > 0:
		remedy := fmt.Sprintf("Accept, in these chains, the ports %s and everything from and to %s:\n$ nft list ruleset", strings.Join(ports, ", "), join(o.ClusterCIDR, " and "))
		if s.docker {
			remedy = "Docker sets the policy of FORWARD to drop. For good: put \"ip-forward-no-drop\": true into /etc/docker/daemon.json (Docker 28 or newer) and restart it. Until then:\n$ iptables -P FORWARD ACCEPT"
		}
		return Result{Status: Warning, Finding: "packets are dropped by policy in " + strings.Join(s.drops, ", ") + ": traffic between nodes and of pods may end there", Remedy: remedy}
	}
	return Result{Status: Pass, Finding: "none found"}
}
