// SPDX-License-Identifier: Apache-2.0

package uninstall

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/service"
	"github.com/kedge-io/kedge/pkg/uninstall/tree"
)

// Program is where the installer puts Kedge.
const Program = "/usr/local/bin/kedge"

const (
	netnsDir   = "/run/netns"           // containerd names those of pods cni-UUID
	cniResults = "/var/lib/cni/results" // libcni's, NETWORK-CONTAINER-INTERFACE
	shimDir    = "/run/containerd/s"    // sockets of shims, of every containerd of the machine
	runcDir    = "/run/containerd/runc" // NAMESPACE/CONTAINER, of runc
	// stagingDirs begins the names of directories for the programs that a run needs.
	stagingDirs = "/var/tmp/kedge-uninstall-"
	nriSocket   = "/run/nri/nri.sock"
	kubeletLog  = "/var/log/pods"       // the kubelet's
	logLinks    = "/var/log/containers" // links to them
	logindConf  = "/etc/systemd/logind.conf.d/99-kubelet.conf"
	cniNetwork  = "kedge" // the name in Kedge's CNI configuration
)

// Places are those of an installation.
type Places struct {
	*config.Config
}

// Locate finds the places of the installation on this machine: by the Kedge that runs, otherwise by its service, otherwise by its
// configuration file. flags are further ones, as `kedge server` has them. What could not be understood is in the error, beside places
// that are as good as they get.
func Locate(flags []string) (Places, error) {
	args, environ := service.Arguments(), []string(nil)
	if running, err := supervisors(); err == nil && len(running) > 0 {
		args, environ = running[0].args[1:], running[0].environ()
	}
	unknown := len(args) == 0 // how it is started
	if unknown {
		args = []string{string(config.RoleServer)}
	}
	c, err := config.Locate(append(slices.Clone(args), flags...), environ)
	if c == nil {
		return Places{}, err
	}
	if known := membership(c); known != nil {
		c.Cluster = *known
		if _, err := os.Stat(c.WriteKubeconfig); unknown && errors.Is(err, fs.ErrNotExist) { // every server has one
			c.Role = config.RoleAgent
		}
	}
	return Places{c}, err
}

// membership is what the machine remembers of its cluster, if it is part of one.
func membership(c *config.Config) *config.Cluster {
	b, err := os.ReadFile(filepath.Join(c.DataDir, "cluster.json"))
	if err != nil {
		return nil
	}
	known := struct{ Cluster config.Cluster }{c.Cluster}
	if json.Unmarshal(b, &known) != nil {
		return &c.Cluster
	}
	return &known.Cluster
}

// safe refuses directories that hold other things than Kedge's: a wrong option must not cost the machine.
func (p Places) safe() error {
	var errs []error
	for option, dir := range map[string]string{"data-dir": p.DataDir, "run-dir": p.RunDir, "kubelet-root-dir": p.KubeletRootDir} {
		real := dir
		if r, err := filepath.EvalSymlinks(dir); err == nil {
			real = r
		}
		for _, d := range []string{dir, real} {
			if isSystemDir(d) {
				errs = append(errs, fmt.Errorf("%s is %s: that is not Kedge's alone; nothing was done: remove Kedge's files there by hand", option, d))
				break
			}
		}
	}
	return errors.Join(errs...)
}

func isSystemDir(dir string) bool {
	dir = filepath.Clean(dir)
	if !filepath.IsAbs(dir) {
		return true
	}
	parts := strings.Split(strings.Trim(dir, "/"), "/")
	system := []string{"", "bin", "boot", "dev", "etc", "home", "lib", "lib32", "lib64", "media", "mnt", "opt", "proc", "root", "run", "sbin", "srv", "sys",
		"tmp", "usr", "var"}
	switch len(parts) {
	case 1:
		return slices.Contains(system, parts[0])
	case 2:
		return slices.Contains([]string{"boot", "dev", "etc", "home", "proc", "sys", "usr"}, parts[0]) && parts[1] != "kedge" ||
			slices.Contains([]string{"var/lib", "var/log", "var/cache", "var/tmp", "var/run", "run/systemd", "run/user", "run/lock", "root/.ssh"}, parts[0]+"/"+parts[1])
	}
	return false
}

// kept are the directories in the data directory that --keep-data leaves.
func kept() []string { return []string{"snapshots", "storage"} }

// files lists what is on disk, the program last.
func (p Places) files(keepData bool) ([]string, error) {
	var list []string
	add := func(paths ...string) {
		for _, path := range paths {
			if _, err := os.Lstat(path); err == nil && !slices.Contains(list, path) {
				list = append(list, path)
			}
		}
	}
	data, err := p.dataFiles(keepData)
	if err != nil {
		return nil, err
	}
	netns, results, err := cniFiles()
	if err != nil {
		return nil, err
	}
	add(netns...)
	add(results...)
	add(data...)
	if p.EtcdDataDir != "" { // a disk that may have other things on it
		beside, _ := filepath.Glob(p.EtcdDir() + ".*")
		add(append(beside, p.EtcdDir())...)
	}
	for _, dir := range []string{p.RunDir, p.KubeletRootDir, kubeletLog, logLinks} {
		trees, err := trees(dir)
		if err != nil {
			return nil, err
		}
		add(trees...)
	}
	add(p.runcStates()...)
	add(staleSockets()...)
	add(filepath.Dir(config.DefaultConfig), p.Config.Config, p.Config.Config+".d", p.WriteKubeconfig, p.PrivateRegistry)
	add(service.Files()...)
	add("/etc/default/kedge", "/etc/sysconfig/kedge", "/run/kedge.pid")
	if text, err := os.ReadFile(logindConf); err == nil && strings.Contains(string(text), "Kubelet") { // of an earlier version
		add(logindConf)
	}
	logs, _ := filepath.Glob("/var/log/kedge.log*")
	add(logs...)
	add(programLinks()...)
	for _, pattern := range []string{filepath.Join(filepath.Dir(Program), ".kedge*"), stagingDirs + "*"} { // of what was interrupted
		temp, _ := filepath.Glob(pattern)
		add(temp...)
	}
	add(Program+".next", Program+".previous")                               // of an upgrade
	if mounted, err := tree.IsMountPoint(Program); !mounted || err != nil { // otherwise it is part of an image, or the like
		add(Program)
	}
	return list, nil
}

// trees gives a directory to remove, and what a link leads to if it is one. Where nothing but mount points is left it is not Kedge's any
// more: disks of the operator.
func trees(dir string) ([]string, error) {
	list := []string{dir}
	if real, err := filepath.EvalSymlinks(dir); err == nil && real != filepath.Clean(dir) {
		list = []string{real, dir}
	}
	holds, err := tree.Holds(list[0])
	if !holds {
		list = list[1:]
	}
	return list, err
}

// dataFiles is the data directory, or what is in it but for what is kept.
func (p Places) dataFiles(keepData bool) ([]string, error) {
	if !keepData {
		return trees(p.DataDir)
	}
	entries, err := os.ReadDir(p.DataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var list []string
	keeps := false
	for _, e := range entries {
		if slices.Contains(kept(), e.Name()) {
			keeps = true
			continue
		}
		list = append(list, filepath.Join(p.DataDir, e.Name()))
	}
	if !keeps {
		return trees(p.DataDir)
	}
	return list, nil
}

// cniFiles are the network namespaces of pods, and what libcni remembers of them. Those that belong to the network of another program are
// left out.
func cniFiles() (netns, results []string, err error) {
	others := map[string]bool{}
	entries, err := os.ReadDir(cniResults)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	for _, e := range entries {
		path := filepath.Join(cniResults, e.Name())
		if strings.HasPrefix(e.Name(), cniNetwork+"-") {
			results = append(results, path)
			continue
		}
		var cached struct{ Netns string }
		if b, err := os.ReadFile(path); err == nil && json.Unmarshal(b, &cached) == nil {
			others[filepath.Base(cached.Netns)] = true
		}
	}
	all, err := filepath.Glob(filepath.Join(netnsDir, "cni-*"))
	for _, path := range all {
		if !others[filepath.Base(path)] {
			netns = append(netns, path)
		}
	}
	return netns, results, err
}

// staleSockets are those of shims and a containerd that are gone. Nobody listens on them, so they are no other containerd's.
func staleSockets() []string {
	var list []string
	sockets, _ := filepath.Glob(filepath.Join(shimDir, "*"))
	sockets = append(sockets, nriSocket)
	for _, path := range sockets {
		conn, err := net.DialTimeout("unix", path, time.Second)
		if errors.Is(err, unix.ECONNREFUSED) {
			list = append(list, path)
		}
		if err == nil {
			conn.Close()
		}
	}
	return list
}

// runcStates are what runc remembers of containers whose end nobody told it. It keeps those of all of the machine's containerds in one place.
func (p Places) runcStates() []string {
	var list []string
	states, _ := filepath.Glob(filepath.Join(runcDir, "*", "*", "state.json"))
	for _, file := range states {
		var state struct {
			Config struct{ Rootfs string }
		}
		b, err := os.ReadFile(file)
		if err != nil || json.Unmarshal(b, &state) != nil {
			continue
		}
		if _, ours := below(p.RunDir, state.Config.Rootfs); ours {
			list = append(list, filepath.Dir(file))
		}
	}
	return list
}

// programLinks are kubectl and ctr, if they are links to Kedge.
func programLinks() []string {
	var list []string
	for _, name := range []string{"kubectl", "ctr"} {
		link := filepath.Join(filepath.Dir(Program), name)
		target, err := os.Readlink(link)
		if err != nil {
			continue
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(link), target)
		}
		if filepath.Clean(target) == Program {
			list = append(list, link)
		}
	}
	return list
}
