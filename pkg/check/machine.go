// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/sys/capability"
	"github.com/moby/sys/userns"
	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/util/validation"
)

func probeConfiguration(_ context.Context, o Options) Result {
	if o.ConfigErr != nil {
		return Result{Status: Fail, Finding: strings.ReplaceAll(o.ConfigErr.Error(), "\n", "; "),
			Remedy: "Correct the value where the message says it comes from. The other probes went by the defaults."}
	}
	if o.ConfigLater != nil {
		return Result{Status: Warning, Finding: strings.ReplaceAll(o.ConfigLater.Error(), "\n", "; "),
			Remedy: "It has to be there when Kedge starts, and hold a text of your own with which others join:\n$ head -c 24 /dev/urandom | base64 | tr -d '+/=' > FILE"}
	}
	return Result{Status: Pass, Finding: "accepted"}
}

func probeRoot(context.Context, Options) Result {
	if uid := os.Geteuid(); uid != 0 {
		return Result{Status: Fail, Finding: fmt.Sprintf("running as uid %d; containers, networks and mounts need root", uid),
			Remedy: "$ sudo kedge server"}
	}
	if userns.RunningInUserNS() {
		return Result{Status: Warning,
			Finding: "root only within a user namespace (rootless or unprivileged container): mounts, sysctls and devices may be refused",
			Remedy:  "Run Kedge as the machine's own root, or in a privileged container or a virtual machine."}
	}
	return Result{Status: Pass, Finding: "uid 0"}
}

// requiredCapabilities are what the default set of a container and the node components need. runc refuses to give
// a container what the runtime does not have: https://github.com/opencontainers/runtime-spec/blob/main/config.md
func requiredCapabilities() []capability.Cap {
	return []capability.Cap{
		capability.CAP_CHOWN, capability.CAP_DAC_OVERRIDE, capability.CAP_DAC_READ_SEARCH, capability.CAP_FOWNER,
		capability.CAP_FSETID, capability.CAP_KILL, capability.CAP_SETGID, capability.CAP_SETUID, capability.CAP_SETPCAP,
		capability.CAP_NET_BIND_SERVICE, capability.CAP_NET_RAW, capability.CAP_NET_ADMIN, capability.CAP_SYS_CHROOT,
		capability.CAP_SYS_PTRACE, capability.CAP_SYS_ADMIN, capability.CAP_MKNOD, capability.CAP_AUDIT_WRITE,
		capability.CAP_SETFCAP,
	}
}

func probeCapabilities(context.Context, Options) Result {
	if os.Geteuid() != 0 {
		return unprobed(fs.ErrPermission)
	}
	caps, err := capability.NewPid2(0)
	if err == nil {
		err = caps.Load()
	}
	if err != nil {
		return unprobed(err)
	}
	known, err := capability.ListSupported()
	if err != nil {
		return unprobed(err)
	}
	has := func(c capability.Cap) bool {
		return caps.Get(capability.EFFECTIVE, c) && caps.Get(capability.BOUNDING, c)
	}
	return judgeCapabilities(known, has)
}

func judgeCapabilities(known []capability.Cap, has func(capability.Cap) bool) Result {
	var required, optional []string
	needed := map[capability.Cap]bool{}
	for _, c := range requiredCapabilities() {
		needed[c] = true
	}
	resource := true
	for _, c := range known {
		if has(c) {
			continue
		}
		name := "CAP_" + strings.ToUpper(c.String())
		if needed[c] {
			required = append(required, name)
			continue
		}
		optional = append(optional, name)
		resource = resource && c != capability.CAP_SYS_RESOURCE
	}
	if len(required) > 0 {
		return Result{Status: Fail, Finding: "missing " + strings.Join(required, ", ") + ": containers cannot be started",
			Remedy: "Start Kedge with all capabilities: no CapabilityBoundingSet= in its systemd unit, --privileged for the container that it runs in."}
	}
	if len(optional) == 0 {
		return Result{Status: Pass, Finding: fmt.Sprintf("all %d", len(known))}
	}
	r := Result{Status: Warning, Finding: "missing " + strings.Join(optional, ", ") + ": pods that ask for more than this machine has are refused",
		Remedy: "Start Kedge with all capabilities if that matters; everything else works without."}
	if !resource {
		r.Finding += "; nothing can be shielded from the OOM killer (no negative oom_score_adj), " +
			"and limits such as that of open files cannot be raised"
	}
	return r
}

func probeCPU(_ context.Context, o Options) Result {
	if runtime.GOARCH != "amd64" && runtime.GOARCH != "arm64" {
		return Result{Status: Fail, Finding: runtime.GOARCH + " is not among the architectures that Kedge brings programs for",
			Remedy: "Use an amd64 or arm64 machine with a 64-bit operating system."}
	}
	n := runtime.NumCPU()
	if n == 1 && !o.Agent {
		return Result{Status: Warning, Finding: "1 CPU, " + runtime.GOARCH + ": enough for a small server, but starts and API calls will be slow",
			Remedy: "Two CPUs or more are recommended for a server; one is enough for an agent."}
	}
	return Result{Status: Pass, Finding: fmt.Sprintf("%d CPUs, %s", n, runtime.GOARCH)}
}

func probeMemory(_ context.Context, o Options) Result {
	proc, err := procfs.NewDefaultFS()
	if err != nil {
		return unprobed(err)
	}
	info, err := proc.Meminfo()
	if err != nil {
		return unprobed(err)
	}
	if info.MemTotalBytes == nil || info.MemAvailableBytes == nil {
		return unprobed(fmt.Errorf("/proc/meminfo has no MemTotal or no MemAvailable"))
	}
	return judgeMemory(*info.MemTotalBytes, *info.MemAvailableBytes, o.Agent)
}

// judgeMemory leaves a tenth for what the kernel keeps to itself: a board sold with 1 GiB shows 900 MiB.
func judgeMemory(total, available uint64, agent bool) Result {
	finding := fmt.Sprintf("%s, of it %s available", bytesIEC(total), bytesIEC(available))
	warn, strong := uint64(1*units.GiB*9/10), uint64(512*units.MiB*9/10)
	if agent {
		warn, strong = warn/2, strong/2
	}
	switch {
	case total < strong:
		return Result{Status: Warning, Finding: finding + ": too little; the OOM killer will end Kedge or the pods",
			Remedy: "Use a machine with at least 1 GiB (agent: 512 MiB), or run this one as an agent of another server."}
	case total < warn:
		return Result{Status: Warning, Finding: finding + ": enough for Kedge itself, little is left for pods",
			Remedy: "1 GiB is the least for a server with pods (agent: 512 MiB); run this machine as an agent if there is a bigger one."}
	}
	return Result{Status: Pass, Finding: finding}
}

func probeSwap(context.Context, Options) Result {
	proc, err := procfs.NewDefaultFS()
	if err != nil {
		return unprobed(err)
	}
	swaps, err := proc.Swaps()
	if os.IsNotExist(err) {
		return Result{Status: Pass, Finding: "none (the kernel has no swap)"}
	}
	if err != nil {
		return unprobed(err)
	}
	return judgeSwap(swaps)
}

func judgeSwap(swaps []*procfs.Swap) Result {
	if len(swaps) == 0 {
		return Result{Status: Pass, Finding: "none"}
	}
	var list []string
	zram := true
	for _, s := range swaps {
		list = append(list, fmt.Sprintf("%s (%s, %s used)", s.Filename, bytesIEC(uint64(s.Size)<<10), bytesIEC(uint64(s.Used)<<10)))
		zram = zram && strings.HasPrefix(s.Filename, "/dev/zram")
	}
	r := Result{Status: Warning, Finding: strings.Join(list, ", ") + ": pods are kept out of it, but etcd and the node stall for seconds when their pages come back from a slow disk",
		Remedy: "$ swapoff -a\nand remove the swap lines from /etc/fstab (Raspberry Pi OS: systemctl disable --now dphys-swapfile)."}
	if zram {
		r.Status = Info
		r.Finding = strings.Join(list, ", ") + ": compressed memory, not a disk; pods do not use it"
		r.Remedy = ""
	}
	return r
}

func probeClock(_ context.Context, o Options) Result {
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	if err != nil {
		return judgeClock(time.Now(), o.BuildDate, true, "")
	}
	synced := state != unix.TIME_ERROR && tx.Status&unix.STA_UNSYNC == 0
	return judgeClock(time.Now(), o.BuildDate, synced, fmt.Sprintf(", error at most %s", time.Duration(tx.Maxerror)*time.Microsecond))
}

func judgeClock(now, built time.Time, synced bool, accuracy string) Result {
	at := now.UTC().Format("2006-01-02 15:04:05 UTC")
	const remedy = "$ timedatectl set-ntp true\nor set it by hand:\n$ date -s '2026-12-31 23:59:00'"
	switch {
	case now.Before(built):
		return Result{Status: Fail, Finding: at + " is before this Kedge was made (" + built.UTC().Format(time.DateOnly) + "): certificates would not be valid yet",
			Remedy: remedy}
	case now.After(built.AddDate(20, 0, 0)):
		return Result{Status: Fail, Finding: at + " is twenty years after this Kedge was made: certificates would have expired once the clock is right",
			Remedy: remedy}
	case !synced:
		return Result{Status: Warning, Finding: at + ", not synchronised (kernel flag STA_UNSYNC): joining and certificates fail when clocks differ by minutes",
			Remedy: "$ timedatectl set-ntp true\nor install a time service (or chrony):\n$ apt install systemd-timesyncd"}
	}
	return Result{Status: Pass, Finding: at + ", synchronised" + accuracy}
}

func probeNodeName(_ context.Context, o Options) Result {
	host, err := os.Hostname()
	if err != nil && o.NodeName == "" {
		return unprobed(err)
	}
	return judgeNodeName(o.NodeName, host)
}

// judgeNodeName follows the rules for the name of a Node (RFC 1123 subdomain) and for the value of its label
// kubernetes.io/hostname, which allows no more than 63 characters.
func judgeNodeName(configured, host string) Result {
	name, origin := configured, "--node-name"
	if fromHost := strings.ToLower(strings.TrimSpace(host)); name == "" || name == fromHost {
		name, origin = fromHost, "the host name"
	}
	const remedy = "$ hostnamectl set-hostname NAME\nor give the node a name of its own (small letters, digits, - and .):\n$ kedge server --node-name NAME"
	if problems := validation.IsDNS1123Subdomain(name); len(problems) > 0 {
		problem, _, _ := strings.Cut(problems[0], " (e.g.") // a regular expression follows
		return Result{Status: Fail, Finding: fmt.Sprintf("%q (from %s) cannot be a node name: %s", name, origin, problem), Remedy: remedy}
	}
	if problems := validation.IsValidLabelValue(name); len(problems) > 0 {
		return Result{Status: Fail, Finding: fmt.Sprintf("%q (from %s) cannot be the label kubernetes.io/hostname: %s", name, origin, problems[0]), Remedy: remedy}
	}
	if first, _, _ := strings.Cut(name, "."); first == "localhost" {
		return Result{Status: Warning, Finding: fmt.Sprintf("%q says nothing, and a second machine of that name cannot join", name), Remedy: remedy}
	}
	if origin != "--node-name" && name != host {
		return Result{Status: Warning, Finding: fmt.Sprintf("the host name %q has capitals; the node will be called %q", host, name),
			Remedy: "$ hostnamectl set-hostname " + name}
	}
	return Result{Status: Pass, Finding: fmt.Sprintf("%s (from %s)", name, origin)}
}

// bytesIEC gives a size with four digits: 19.53 GiB.
func bytesIEC(n uint64) string {
	return units.CustomSize("%.4g %s", float64(n), 1024, []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"})
}
