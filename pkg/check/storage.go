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
	"strings"

	containerfs "github.com/containerd/continuity/fs"
	"github.com/docker/go-units"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// existing gives the directory itself or, before the first start, the nearest one above it that exists: what is
// created below it later lies on the same file system.
func existing(dir string) string {
	for dir != "/" {
		if st, err := os.Stat(dir); err == nil && st.IsDir() {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	return dir
}

// keepTimes remembers when a directory was changed, for after the probes that make files in it, and remove them.
func keepTimes(dir string) (restore func()) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return func() {}
	}
	return func() {
		_ = unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{{Nsec: unix.UTIME_OMIT}, st.Mtim}, 0)
	} // a matter of looks
}

// mountOf gives the mount that a path lies on.
func mountOf(path string) (*mountinfo.Info, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.ParentsFilter(real))
	if err != nil {
		return nil, err
	}
	var found *mountinfo.Info
	for _, m := range mounts {
		// Of several mounts on one directory the last is the one that is seen.
		if found == nil || len(m.Mountpoint) >= len(found.Mountpoint) {
			found = m
		}
	}
	if found == nil {
		return nil, fmt.Errorf("no mount for %s in /proc/self/mountinfo", path)
	}
	return found, nil
}

func probeDataDir(_ context.Context, o Options) Result {
	if !filepath.IsAbs(o.DataDir) {
		return Result{Status: Fail, Finding: fmt.Sprintf("%q is not an absolute path", o.DataDir), Remedy: "$ kedge server --data-dir /var/lib/kedge"}
	}
	if st, err := os.Stat(o.DataDir); err == nil && !st.IsDir() {
		return Result{Status: Fail, Finding: o.DataDir + " is not a directory", Remedy: "$ mv " + o.DataDir + " " + o.DataDir + ".old"}
	}
	m, err := mountOf(existing(o.DataDir))
	if err != nil {
		return unprobed(err)
	}
	return judgeDataDir(o.DataDir, m)
}

func judgeDataDir(dir string, m *mountinfo.Info) Result {
	at := fmt.Sprintf("%s is on %s, mounted at %s", dir, m.FSType, m.Mountpoint)
	options := strings.Split(m.Options+","+m.VFSOptions, ",")
	elsewhere := "$ kedge server --data-dir DIR\nwith a directory on a local ext4, xfs or btrfs file system."
	switch {
	case slices.Contains(options, "ro"):
		return Result{Status: Fail, Finding: at + ", read-only (perhaps after an I/O error: see dmesg)",
			Remedy: "$ mount -o remount,rw " + m.Mountpoint + "\nor use another disk:\n$ kedge server --data-dir DIR"}
	case slices.Contains(strings.Split(m.Options, ","), "noexec"):
		return Result{Status: Fail, Finding: at + ", with noexec: the programs that Kedge unpacks there cannot run",
			Remedy: "$ mount -o remount,exec " + m.Mountpoint + "\nand remove noexec from its line in /etc/fstab."}
	}
	switch kind := strings.TrimSuffix(m.FSType, "4"); kind {
	case "nfs", "cifs", "smb3", "9p", "virtiofs", "ceph", "vfat", "exfat", "ntfs", "ntfs3":
		return Result{Status: Fail, Finding: at + ": neither etcd nor container images can live there", Remedy: elsewhere}
	case "tmpfs", "ramfs":
		return Result{Status: Warning, Finding: at + ": the cluster is lost at power-off", Remedy: elsewhere}
	}
	if strings.HasPrefix(m.FSType, "fuse") {
		return Result{Status: Warning, Finding: at + ": file systems in user space are slow and may lack what containers need", Remedy: elsewhere}
	}
	if slices.Contains(strings.Split(m.Options, ","), "nosuid") || slices.Contains(strings.Split(m.Options, ","), "nodev") {
		return Result{Status: Warning, Finding: at + " (" + m.Options + "): setuid programs and device files in images do not work",
			Remedy: "$ mount -o remount,suid,dev " + m.Mountpoint + "\nand change its line in /etc/fstab."}
	}
	return Result{Status: Pass, Finding: at}
}

// spaceNeed is what a directory needs to be free, in bytes.
type spaceNeed struct {
	dir        string
	fail, warn uint64
}

// spaceState is a file system and the directories on it.
type spaceState struct {
	dirs                    []string
	free, total, fail, warn uint64
	inodesFree, inodesTotal uint64
}

func probeDiskSpace(_ context.Context, o Options) Result {
	needs := []spaceNeed{
		{o.DataDir, 1 * units.GiB, 5 * units.GiB},
		{o.KubeletDir, 128 * units.MiB, 1 * units.GiB},
		{o.LogDir, 64 * units.MiB, 512 * units.MiB},
	}
	if used, err := os.ReadDir(o.DataDir); err == nil && len(used) > 0 {
		// Everything is unpacked already. A full disk must not keep Kedge from starting: it is Kedge that clears it.
		needs[0].fail, needs[1].fail, needs[2].fail = 32*units.MiB, 0, 0
	}
	var states []*spaceState
	byDevice := map[uint64]*spaceState{}
	for _, need := range needs {
		dir := existing(need.dir)
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return unprobed(fmt.Errorf("%s: %w", dir, err))
		}
		s := byDevice[st.Dev]
		if s == nil {
			var fs unix.Statfs_t
			if err := unix.Statfs(dir, &fs); err != nil {
				return unprobed(fmt.Errorf("%s: %w", dir, err))
			}
			block := uint64(fs.Frsize)
			s = &spaceState{free: fs.Bavail * block, total: fs.Blocks * block, inodesFree: fs.Ffree, inodesTotal: fs.Files}
			byDevice[st.Dev] = s
			states = append(states, s)
		}
		s.dirs = append(s.dirs, need.dir)
		s.fail += need.fail
		s.warn += need.warn
	}
	var items []Item
	var summary []string
	for _, s := range states {
		item := Item{Name: strings.Join(s.dirs, ", "), Result: judgeSpace(*s)}
		items = append(items, item)
		summary = append(summary, item.Name+": "+item.Finding)
	}
	if len(items) == 1 {
		items[0].Finding = items[0].Name + ": " + items[0].Finding
		return items[0].Result
	}
	return combine(items, strings.Join(summary, "; "))
}

func judgeSpace(s spaceState) Result {
	finding := fmt.Sprintf("%s free of %s", bytesIEC(s.free), bytesIEC(s.total))
	remedy := fmt.Sprintf("$ du -xh -d2 %s | sort -h | tail\nshows what takes the space. Old logs:\n$ journalctl --vacuum-size=200M", filepath.Dir(s.dirs[0]))
	switch {
	case s.free < s.fail:
		return Result{Status: Fail, Finding: finding + ", less than the " + bytesIEC(s.fail) + " without which it does not start", Remedy: remedy}
	case s.inodesTotal > 0 && s.inodesFree < 2000:
		return Result{Status: Fail, Finding: fmt.Sprintf("%s, but only %d of %d inodes: no more files can be made", finding, s.inodesFree, s.inodesTotal), Remedy: remedy}
	case s.free < s.warn:
		return Result{Status: Warning, Finding: finding + ", less than " + bytesIEC(s.warn) + ": it may soon be full", Remedy: remedy}
	case s.inodesTotal > 0 && s.inodesFree < s.inodesTotal/20:
		return Result{Status: Warning, Finding: fmt.Sprintf("%s, but only %d of %d inodes", finding, s.inodesFree, s.inodesTotal), Remedy: remedy}
	}
	return Result{Status: Pass, Finding: finding}
}

// probeOverlay mounts an overlay below the data directory, in a mount namespace that ends with the probe, and does
// in it what image layers need: delete, rename and change a file of the lower layer.
func probeOverlay(_ context.Context, o Options) Result {
	if o.Snapshotter != "overlayfs" {
		return Result{Status: Info, Finding: "not needed with --snapshotter " + o.Snapshotter}
	}
	parent := existing(o.DataDir)
	work, err := os.MkdirTemp(parent, ".kedge-check-")
	if err != nil {
		return unprobed(err)
	}
	defer os.RemoveAll(work)
	dtype, err := containerfs.SupportsDType(work)
	if err == nil && !dtype {
		return Result{Status: Fail, Finding: parent + " does not tell file types in directories (d_type): deleted files would come back in containers",
			Remedy: "An xfs made with ftype=0 must be made anew (mkfs.xfs -n ftype=1 DEVICE), or use another file system:\n$ kedge server --data-dir DIR"}
	}
	err = inNamespaces(unix.CLONE_NEWNS, func() error { return exerciseOverlay(work) })
	if os.Geteuid() != 0 && errors.Is(err, fs.ErrPermission) {
		return unprobed(err)
	}
	if err != nil {
		kind := "?"
		if m, err := mountOf(parent); err == nil {
			kind = m.FSType
		}
		r := Result{Status: Fail, Finding: fmt.Sprintf("no overlay can be mounted in %s (%s): %v", parent, kind, err),
			Remedy: "$ kedge server --data-dir DIR\nwith a directory on ext4, xfs or btrfs (in a container: on a volume), or, slow and with much more space taken:\n$ kedge server --snapshotter native"}
		if errors.Is(err, unix.ENODEV) {
			r.Remedy = moduleRemedy("overlay")
		}
		return r
	}
	return Result{Status: Pass, Finding: "works in " + parent}
}

func exerciseOverlay(work string) error {
	at := func(parts ...string) string { return filepath.Join(append([]string{work}, parts...)...) }
	for _, dir := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(at(dir), 0o700); err != nil {
			return err
		}
	}
	for _, file := range []string{"changed", "deleted", "renamed"} {
		if err := os.WriteFile(at("lower", file), []byte("lower"), 0o600); err != nil {
			return err
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", at("lower"), at("upper"), at("work"))
	if err := unix.Mount("overlay", at("merged"), "overlay", 0, options); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	// Unmounted at once, so that the directory can be removed; should that fail, it ends with the namespace.
	defer unix.Unmount(at("merged"), unix.MNT_DETACH)
	if err := os.WriteFile(at("merged", "changed"), []byte("upper"), 0o600); err != nil {
		return err
	}
	if err := os.Remove(at("merged", "deleted")); err != nil {
		return err
	}
	if err := os.Rename(at("merged", "renamed"), at("merged", "renamed-to")); err != nil {
		return err
	}
	if _, err := os.Stat(at("merged", "deleted")); !errors.Is(err, fs.ErrNotExist) {
		return errors.New("a deleted file is still there")
	}
	if content, err := os.ReadFile(at("lower", "changed")); err != nil || string(content) != "lower" {
		return errors.New("a change went through to the lower layer")
	}
	return nil
}

func probeMountPropagation(_ context.Context, o Options) Result {
	m, err := mountOf(existing(o.KubeletDir))
	if err != nil {
		return unprobed(err)
	}
	return judgePropagation(m)
}

func judgePropagation(m *mountinfo.Info) Result {
	for _, field := range strings.Fields(m.Optional) {
		if strings.HasPrefix(field, "shared:") {
			return Result{Status: Pass, Finding: m.Mountpoint + " is shared"}
		}
	}
	return Result{Status: Warning, Finding: m.Mountpoint + " is not a shared mount: volumes that a pod mounts for others (CSI drivers, mountPropagation: Bidirectional) are refused",
		Remedy: "$ mount --make-rshared " + m.Mountpoint + "\nat each boot (systemd does it by itself)."}
}
