// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/util/version"
)

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

func probeKernel(_ context.Context, o Options) Result {
	return judgeKernel(kernelRelease(), o.ProxyMode)
}

// judgeKernel draws two lines: 4.19 is the oldest kernel that the container runtime is tried with anywhere, and
// kube-proxy wants 5.13 for its nftables mode (k8s.io/kubernetes/pkg/util/kernel, NFTablesKubeProxyKernelVersion).
func judgeKernel(release, proxyMode string) Result {
	v, err := version.ParseGeneric(release)
	if err != nil {
		return unprobed(err)
	}
	const remedy = "Update the operating system; every distribution since 2022 has a newer kernel."
	switch {
	case v.LessThan(version.MustParseGeneric("4.19")):
		return Result{Status: Fail, Finding: release + " is older than 4.19", Remedy: remedy}
	case v.LessThan(version.MustParseGeneric("5.13")) && (proxyMode == "auto" || proxyMode == "nftables"):
		return Result{Status: Warning, Finding: release + " is older than 5.13, which kube-proxy's nftables mode asks for",
			Remedy: remedy + "\nUntil then (or ipvs):\n$ kedge server --proxy-mode iptables"}
	}
	return Result{Status: Pass, Finding: release}
}

// moduleRemedy says how to get a kernel feature that is usually a module.
func moduleRemedy(modules ...string) string {
	release := kernelRelease()
	if _, err := os.Stat(filepath.Join("/lib/modules", release)); errors.Is(err, fs.ErrNotExist) {
		if others, _ := filepath.Glob("/lib/modules/*"); len(others) > 0 { // the pattern is right
			return fmt.Sprintf("The modules of the running kernel %s are gone, most likely after an update:\n$ reboot", release)
		}
		return "This kernel has no modules and lacks the feature: use a distribution's own kernel, or one built with it."
	}
	return fmt.Sprintf("$ modprobe %s\nIf that finds nothing, install the rest of the modules (Ubuntu on a Raspberry Pi: apt install linux-modules-extra-raspi) or use the distribution's standard kernel.",
		strings.Join(modules, " "))
}

func probeNamespaces(context.Context, Options) Result {
	kinds := []struct {
		name string
		flag uintptr
	}{
		{"mount", unix.CLONE_NEWNS}, {"uts", unix.CLONE_NEWUTS}, {"ipc", unix.CLONE_NEWIPC}, {"net", unix.CLONE_NEWNET},
		{"pid", unix.CLONE_NEWPID}, {"cgroup", unix.CLONE_NEWCGROUP},
	}
	var all uintptr
	var names []string
	for _, k := range kinds {
		all |= k.flag
		names = append(names, k.name)
	}
	if tryClone(&syscall.SysProcAttr{Cloneflags: all}) == nil {
		return Result{Status: Pass, Finding: strings.Join(names, ", ")}
	}
	r := Result{Status: Pass, Remedy: "$ sysctl user | grep namespaces\nshows the limits; 0 forbids a kind. In a container, run it privileged."}
	for _, k := range kinds {
		if err := tryClone(&syscall.SysProcAttr{Cloneflags: k.flag}); err != nil {
			if u := unprobed(err); os.Geteuid() != 0 {
				return u
			}
			r.Items = append(r.Items, Item{Name: k.name, Result: Result{Status: Fail, Finding: err.Error()}})
		}
	}
	r.Status, r.Finding = Fail, "not all namespaces that a pod needs can be made"
	return r
}

func probeUserNamespaces(context.Context, Options) Result {
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
	err := tryClone(&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids})
	if err != nil {
		return Result{Status: Info, Finding: fmt.Sprintf("not available (%v): pods with hostUsers: false are refused, others run", err),
			Remedy: "$ sysctl -w user.max_user_namespaces=15000"}
	}
	// The kubelet wants idmapped mounts on tmpfs, which came with 6.3.
	if v, err := version.ParseGeneric(kernelRelease()); err == nil && v.LessThan(version.MustParseGeneric("6.3")) {
		return Result{Status: Info, Finding: "available, but pods with hostUsers: false need kernel 6.3"}
	}
	return Result{Status: Pass, Finding: "pods may ask for hostUsers: false"}
}

func probeSeccomp(context.Context, Options) Result {
	actions, err := os.ReadFile("/proc/sys/kernel/seccomp/actions_avail")
	if err == nil && slices.Contains(strings.Fields(string(actions)), "errno") {
		return Result{Status: Pass, Finding: "filters"}
	}
	if err := unix.Prctl(unix.PR_GET_SECCOMP, 0, 0, 0, 0); err != nil {
		return Result{Status: Warning, Finding: fmt.Sprintf("not in this kernel (%v): pods run without a system call filter, and those that ask for one fail", err),
			Remedy: "Use a kernel built with CONFIG_SECCOMP_FILTER, as every distribution's is."}
	}
	return Result{Status: Info, Finding: "present; whether filters are could not be seen (/proc/sys/kernel/seccomp is missing)"}
}

func probeSecurityModule(context.Context, Options) Result {
	enforce, err := os.ReadFile("/sys/fs/selinux/enforce")
	if err == nil && strings.TrimSpace(string(enforce)) == "1" {
		return Result{Status: Info, Finding: "SELinux is enforcing: containers are not labelled by Kedge, so hostPath volumes may be denied",
			Remedy: "$ ausearch -m avc -ts recent\nshows what was denied."}
	}
	if err == nil {
		return Result{Status: Info, Finding: "SELinux is permissive"}
	}
	apparmor, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	if err == nil && strings.TrimSpace(string(apparmor)) == "Y" {
		return Result{Status: Info, Finding: "AppArmor is on: containers get the runtime's default profile"}
	}
	return Result{Status: Info, Finding: "none: pods that ask for an AppArmor profile or SELinux labels are refused"}
}

func probeKmsg(context.Context, Options) Result {
	f, err := os.Open("/dev/kmsg")
	switch {
	case err == nil:
		f.Close()
		return Result{Status: Pass, Finding: "/dev/kmsg is readable"}
	case os.Geteuid() != 0 && errors.Is(err, fs.ErrPermission):
		return unprobed(err)
	case errors.Is(err, fs.ErrNotExist):
		return Result{Status: Fail, Finding: "/dev/kmsg is missing: the kubelet ends without it",
			Remedy: "In an LXC container: $ ln -s /dev/console /dev/kmsg\n(at each boot: put the line `L /dev/kmsg - - - - /dev/console` into /etc/tmpfiles.d/kmsg.conf)"}
	}
	return Result{Status: Fail, Finding: err.Error() + ": the kubelet ends without it",
		Remedy: "$ sysctl -w kernel.dmesg_restrict=0\nor start Kedge with CAP_SYSLOG."}
}

// probeSysctls writes values back as they are, which proves that they can be changed and changes nothing.
func probeSysctls(context.Context, Options) Result {
	if os.Geteuid() != 0 {
		return unprobed(fs.ErrPermission)
	}
	items := []Item{
		{Name: "net.ipv4.ip_forward", Result: probeSysctl("/proc/sys/net/ipv4/ip_forward", "1", "pods reach nothing outside their node")},
		// What the kubelet sets at start: k8s.io/kubernetes/pkg/kubelet/cm, setupKernelTunables.
		{Name: "vm.overcommit_memory", Result: probeSysctl("/proc/sys/vm/overcommit_memory", "1", "the kubelet ends")},
	}
	const ipv6 = "/proc/sys/net/ipv6/conf/all/forwarding"
	if _, err := os.Stat(ipv6); err == nil { // else IPv6 is off
		items = append(items, Item{Name: "net.ipv6.conf.all.forwarding", Result: probeSysctl(ipv6, "1", "pods reach nothing outside their node")})
	}
	return combine(items, "forwarding and overcommit are set or can be set by Kedge")
}

func probeSysctl(path, want, consequence string) Result {
	content, err := os.ReadFile(path)
	if err != nil {
		return unprobed(err)
	}
	value := strings.TrimSpace(string(content))
	if value == want {
		return Result{Status: Pass, Finding: "is " + want}
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		return Result{Status: Fail, Finding: fmt.Sprintf("is %s and cannot be set to %s (%v): %s", value, want, err, consequence),
			Remedy: fmt.Sprintf("Set it where it can be set, on the host of this container: $ sysctl -w %s=%s",
				strings.ReplaceAll(strings.TrimPrefix(path, "/proc/sys/"), "/", "."), want)}
	}
	return Result{Status: Pass, Finding: fmt.Sprintf("is %s, Kedge sets it to %s", value, want)}
}

func probeInotify(context.Context, Options) Result {
	instances, err := readNumber("/proc/sys/fs/inotify/max_user_instances")
	if err != nil {
		return unprobed(err)
	}
	watches, err := readNumber("/proc/sys/fs/inotify/max_user_watches")
	if err != nil {
		return unprobed(err)
	}
	return judgeInotify(instances, watches)
}

func judgeInotify(instances, watches int) Result {
	r := Result{Status: Pass, Finding: fmt.Sprintf("%d instances, %d watches per user", instances, watches)}
	switch {
	case instances < 128 || watches < 8192:
		r.Status = Warning
	case instances < 512 || watches < 65536:
		r.Status = Info
	default:
		return r
	}
	r.Finding += `; with many pods or log followers this ends in "too many open files"`
	r.Remedy = "$ printf 'fs.inotify.max_user_instances=1024\\nfs.inotify.max_user_watches=524288\\n' >/etc/sysctl.d/90-inotify.conf && sysctl --system"
	return r
}

func probeOpenFiles(context.Context, Options) Result {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return unprobed(err)
	}
	return judgeOpenFiles(limit.Max)
}

func judgeOpenFiles(hard uint64) Result {
	if hard >= 65536 {
		return Result{Status: Pass, Finding: fmt.Sprintf("up to %d", hard)}
	}
	return Result{Status: Warning, Finding: fmt.Sprintf("no more than %d: etcd, containerd and pods with many connections may run out", hard),
		Remedy: "LimitNOFILE=1048576 in the systemd unit, or before the start (needs CAP_SYS_RESOURCE):\n$ ulimit -Hn 1048576"}
}

func readNumber(path string) (int, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(content)))
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return n, nil
}
