// SPDX-License-Identifier: Apache-2.0

package uninstall

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// mount is something mounted below a directory of Kedge's.
type mount struct {
	path, fsType, source string
	foreign              bool // somebody else's, and what is in it would be lost: it is left alone
}

func (m mount) detail() string {
	text := m.fsType
	if m.source != "" && m.source != m.fsType {
		text += " of " + m.source
	}
	if m.foreign {
		text += ", not Kedge's: it is left alone; unmount it yourself when you do not need it any more"
	}
	return text
}

// volumeMount is where the kubelet mounts what pods ask for, below its root directory.
var volumeMount = sync.OnceValue(func() *regexp.Regexp { //policy:allow variable compiled when it is first used
	return regexp.MustCompile(`^(pods/[^/]+/(volumes/[^/]+/[^/]+(/mount)?|volume-subpaths/[^/]+/[^/]+/[^/]+|volumeDevices/.+)|plugins/.+)$`)
})

// findMounts lists the mounts below the directories of an installation, in the order in which they were made. A file system that is
// mounted on one of the directories itself is the operator's disk and no part of it, and so is one inside the data directory.
func findMounts(p Places) ([]mount, error) {
	infos, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("list the mounts: %w", err)
	}
	netns, _, err := cniFiles()
	if err != nil {
		return nil, err
	}
	var list []mount
	for _, i := range infos {
		m := mount{path: i.Mountpoint, fsType: i.FSType, source: i.Source}
		if slices.Contains(netns, m.path) || p.classify(&m) {
			list = append(list, m)
		}
	}
	return list, nil
}

// classify says whether a mount is to go away, or in the way.
func (p Places) classify(m *mount) bool {
	if rel, ok := below(real(p.KubeletRootDir), m.path); ok {
		m.foreign = !volumeMount().MatchString(rel) && volatile(m.fsType)
		return true
	}
	if rel, ok := below(real(p.DataDir), m.path); ok {
		return strings.HasPrefix(rel, "containerd/") && (m.fsType == "overlay" || strings.Contains(rel, "/tmpmounts/"))
	}
	_, ok := below(real(p.RunDir), m.path)
	return ok
}

func real(dir string) string {
	if r, err := filepath.EvalSymlinks(dir); err == nil {
		return r
	}
	return filepath.Clean(dir)
}

func below(dir, path string) (rel string, ok bool) { return strings.CutPrefix(path, dir+"/") }

// volatile says whether a file system's data ends with its last mount.
func volatile(fsType string) bool {
	return slices.Contains([]string{"tmpfs", "ramfs", "hugetlbfs"}, fsType)
}

// remote says whether a file system asks another machine or a program, which may not answer.
func remote(fsType string) bool {
	return slices.Contains([]string{"nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "9p", "afs", "lustre"}, fsType) || strings.HasPrefix(fsType, "fuse")
}

// unmount takes apart what is mounted, the last one first.
func (u *run) unmount(ctx context.Context) error {
	list, err := findMounts(u.places)
	if err != nil {
		return err
	}
	n, err := unmountAll(ctx, list)
	if n > 0 {
		u.say("%d mounts removed", n)
	}
	return err
}

// UnmountVolumes unmounts what the kubelet has mounted for pods that have ended. It mounts it again when they start.
func UnmountVolumes(ctx context.Context, p Places) (int, error) {
	list, err := findMounts(p)
	if err != nil {
		return 0, err
	}
	root := real(p.KubeletRootDir)
	return unmountAll(ctx, slices.DeleteFunc(list, func(m mount) bool {
		rel, ok := below(root, m.path)
		return !ok || !strings.HasPrefix(rel, "pods/")
	}))
}

func unmountAll(ctx context.Context, list []mount) (int, error) {
	n := 0
	var errs []error
	for _, m := range slices.Backward(list) {
		if m.foreign {
			continue
		}
		if err := unmount(ctx, m); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.path, err))
			continue
		}
		n++
	}
	return n, errors.Join(errs...)
}

// unmountPatience is how long a mount may be busy before it is taken out of the file tree and left to end with its last user.
const unmountPatience = 2 * time.Second

func unmount(ctx context.Context, m mount) error {
	flags := unix.UMOUNT_NOFOLLOW
	if remote(m.fsType) { // does not wait for a server that is gone
		flags |= unix.MNT_DETACH
	}
	for start := time.Now(); ; {
		err := unix.Unmount(m.path, flags)
		switch {
		case err == nil, errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT): // the latter: it is gone already, with another one
			return nil
		case !errors.Is(err, unix.EBUSY):
			return err
		case time.Since(start) > unmountPatience:
			return unix.Unmount(m.path, flags|unix.MNT_DETACH)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
