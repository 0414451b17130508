// SPDX-License-Identifier: Apache-2.0

package check

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// cgroupState is what the judgement needs to know about control groups.
type cgroupState struct {
	unified bool              // version 2 alone
	mounted []string          // controllers that can be used
	kernel  map[string]bool   // controllers that the kernel was built with: switched on at boot or not
	refused map[string]string // hierarchy → why a group cannot be made there
}

func probeCgroups(context.Context, Options) Result {
	f, err := os.Open("/proc/cgroups")
	if err != nil {
		return unprobed(err)
	}
	defer f.Close()
	state := cgroupState{unified: onCgroup2("/sys/fs/cgroup"), refused: map[string]string{}}
	if state.kernel, err = parseCgroups(f); err != nil {
		return unprobed(err)
	}
	roots := []string{"/sys/fs/cgroup"}
	if state.unified {
		controllers, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
		if err != nil {
			return unprobed(err)
		}
		state.mounted = strings.Fields(string(controllers))
	} else {
		mounts, err := cgroups.GetCgroupMounts(true)
		if err != nil {
			return unprobed(err)
		}
		roots = nil
		for _, m := range mounts {
			state.mounted = append(state.mounted, m.Subsystems...)
			if slices.Contains(m.Subsystems, "memory") {
				roots = append(roots, m.Mountpoint)
			}
		}
	}
	if os.Geteuid() == 0 {
		for _, root := range roots {
			if err := tryCgroup(root); err != nil {
				state.refused[root] = err.Error()
			}
		}
	}
	return judgeCgroups(state)
}

// onCgroup2 asks the file system itself. The cgroups library asks once in the life of a process and its answer
// depends on user namespaces, too.
func onCgroup2(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// tryCgroup makes a group and removes it again.
func tryCgroup(root string) error {
	dir := filepath.Join(root, fmt.Sprintf("kedge-check-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	return os.Remove(dir)
}

// parseCgroups reads /proc/cgroups (cgroups(7)): name, hierarchy, number of groups, enabled.
func parseCgroups(r io.Reader) (map[string]bool, error) {
	enabled := map[string]bool{}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		line := lines.Text()
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		if len(fields) < 4 {
			return nil, fmt.Errorf("/proc/cgroups: %q has %d fields instead of 4", line, len(fields))
		}
		enabled[fields[0]] = fields[3] == "1"
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("/proc/cgroups: %w", err)
	}
	return enabled, nil
}

// judgeCgroups: the required controllers of version 1 are those without which the kubelet
// (k8s.io/kubernetes/pkg/kubelet/cm, validateSystemRequirements) or runc (devices) ends; of version 2 those that
// carry the limits of every pod.
func judgeCgroups(s cgroupState) Result {
	required, recommended := []string{"cpu", "cpuacct", "cpuset", "memory", "devices"}, []string{"pids", "freezer", "blkio"}
	if s.unified {
		required, recommended = []string{"cpu", "memory", "pids"}, []string{"cpuset", "io"}
	}
	if len(s.mounted) == 0 {
		return Result{Status: Fail, Finding: "no control group is mounted",
			Remedy: "$ mount -t cgroup2 none /sys/fs/cgroup\n(Alpine: rc-update add cgroups && rc-service cgroups start)"}
	}
	without := func(names []string) (missing []string) {
		for _, name := range names {
			if !slices.Contains(s.mounted, name) {
				missing = append(missing, name)
			}
		}
		return missing
	}
	version := "version 1"
	if s.unified {
		version = "version 2"
	}
	if missing := without(required); len(missing) > 0 {
		return Result{Status: Fail, Finding: version + " lacks " + strings.Join(missing, ", ") + ": the kubelet cannot run pods",
			Remedy: controllerRemedy(missing, s)}
	}
	for root, why := range s.refused {
		return Result{Status: Fail, Finding: fmt.Sprintf("no group can be made in %s: %s", root, why),
			Remedy: "In a container, run it privileged and with a cgroup namespace of its own (docker: --privileged --cgroupns=private)."}
	}
	if missing := without(recommended); len(missing) > 0 {
		return Result{Status: Warning, Finding: version + " lacks " + strings.Join(missing, ", ") + ": the limits of that kind are not enforced",
			Remedy: controllerRemedy(missing, s)}
	}
	if !s.unified {
		return Result{Status: Warning, Finding: "version 1 with all controllers: works, but Kubernetes has deprecated it and will drop it",
			Remedy: "Boot with version 2: add systemd.unified_cgroup_hierarchy=1 to the kernel command line, or update the operating system."}
	}
	return Result{Status: Pass, Finding: "version 2: " + strings.Join(s.mounted, " ")}
}

func controllerRemedy(missing []string, s cgroupState) string {
	// A kernel without version 1 does not list its controllers in /proc/cgroups: absence there says nothing.
	if on, listed := s.kernel["memory"]; slices.Contains(missing, "memory") && !on && (listed || s.unified) {
		return "The memory controller is switched off at boot, as Raspberry Pi OS does. Append\n" +
			"cgroup_enable=memory cgroup_memory=1\nto the one line of /boot/firmware/cmdline.txt (older: /boot/cmdline.txt), then\n$ reboot"
	}
	if s.unified {
		return "They were not handed down to this container, or are bound to a version 1 hierarchy:\n$ grep cgroup /proc/mounts; cat /sys/fs/cgroup/cgroup.controllers"
	}
	if _, listed := s.kernel[missing[0]]; !listed {
		return "This kernel was built without " + missing[0] + ": use the distribution's standard kernel."
	}
	dir := "/sys/fs/cgroup/" + missing[0]
	return fmt.Sprintf("$ mkdir -p %s && mount -t cgroup -o %s none %s\n(Debian without systemd: apt install cgroupfs-mount)", dir, missing[0], dir)
}
