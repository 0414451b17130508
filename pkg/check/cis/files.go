// SPDX-License-Identifier: Apache-2.0

package cis

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// mode checks that files give nobody more than a mode allows. Patterns that match nothing are left out.
func mode(limit fs.FileMode, patterns ...string) Result {
	return each(patterns, func(path string, info fs.FileInfo) string {
		if got := info.Mode().Perm(); got&^limit != 0 {
			return fmt.Sprintf("%s is %04o", path, got)
		}
		return ""
	}, fmt.Sprintf("%04o or stricter", limit), fmt.Sprintf("chmod %04o FILE", limit))
}

// owner checks that files are root's.
func owner(patterns ...string) Result {
	return each(patterns, func(path string, info fs.FileInfo) string {
		if st, ok := info.Sys().(*syscall.Stat_t); ok && (st.Uid != 0 || st.Gid != 0) {
			return fmt.Sprintf("%s belongs to %d:%d", path, st.Uid, st.Gid)
		}
		return ""
	}, "root:root", "chown root:root FILE")
}

func each(patterns []string, wrong func(string, fs.FileInfo) string, good, remedy string) Result {
	var bad, seen []string
	for _, p := range patterns {
		paths, err := filepath.Glob(p)
		if err != nil {
			return fail("", "%v", err)
		}
		for _, path := range paths {
			info, err := os.Stat(path)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return fail("run it as root", "%v", err)
			}
			seen = append(seen, path)
			if text := wrong(path, info); text != "" {
				bad = append(bad, text)
			}
		}
	}
	switch {
	case len(bad) > 0:
		return fail(remedy, "%s", strings.Join(bad, ", "))
	case len(seen) == 0:
		return none("there is no %s", strings.Join(patterns, ", "))
	case len(seen) == 1:
		return pass("%s: %s", seen[0], good)
	}
	return pass("%d files as %s: %s", len(seen), seen[0], good)
}

// plane is an item of the control plane.
func plane(look func(*machine) Result) func(*machine) Result {
	return func(m *machine) Result {
		if m.plane == nil {
			return none("no control plane on this machine")
		}
		return look(m)
	}
}

func member(look func(*machine) Result) func(*machine) Result {
	return func(m *machine) Result {
		if m.etcd == nil {
			return none("no datastore member on this machine")
		}
		return look(m)
	}
}

func kubelet(look func(*machine) Result) func(*machine) Result {
	return func(m *machine) Result {
		if m.settings == nil {
			return none("no kubelet on this machine")
		}
		return look(m)
	}
}

func (m *machine) config(process string) string { return filepath.Join(m.RunDir, process+".json") }
func (m *machine) pki(pattern string) string {
	return filepath.Join(filepath.Dir(m.plane.Files.ClientCA), pattern)
}

// controlPlaneFiles are the items of 1.1. What upstream has in pod manifests is in one file for each process here.
func controlPlaneFiles() []check {
	var list []check
	for i, c := range []struct{ component, process string }{{"API server", "controlplane"}, {"controller manager", "controlplane"}, {"scheduler", "controlplane"}, {"etcd", "etcd"}} {
		wrap := plane
		if c.process == "etcd" {
			wrap = member
		}
		list = append(list,
			check{fmt.Sprintf("1.1.%d", 2*i+1), "mode of the configuration of " + c.component, wrap(func(m *machine) Result { return mode(0o600, m.config(c.process)) })},
			check{fmt.Sprintf("1.1.%d", 2*i+2), "owner of the configuration of " + c.component, wrap(func(m *machine) Result { return owner(m.config(c.process)) })})
	}
	credentials := plane(func(m *machine) Result { return mode(0o600, m.plane.Files.Kubeconfig) })
	credentialsOwner := plane(func(m *machine) Result { return owner(m.plane.Files.Kubeconfig) })
	return append(list,
		check{"1.1.9", "mode of CNI's files", cni(func(dir string) Result { return mode(0o600, filepath.Join(dir, "*")) })},
		check{"1.1.10", "owner of CNI's files", cni(func(dir string) Result { return owner(filepath.Join(dir, "*")) })},
		check{"1.1.11", "mode of the datastore's directory", member(func(m *machine) Result { return mode(0o700, m.etcd.Dir) })},
		check{"1.1.12", "owner of the datastore's directory", member(func(m *machine) Result {
			r := owner(m.etcd.Dir)
			if r.Status == Pass {
				return none("no user etcd: it is a process of Kedge, which runs as root; %s", r.Finding)
			}
			return r
		})},
		check{"1.1.13", "mode of the administrator's kubeconfig", plane(func(m *machine) Result { return mode(0o600, m.Kubeconfig, m.pki("admin.pem")) })},
		check{"1.1.14", "owner of the administrator's kubeconfig", plane(func(m *machine) Result { return owner(m.Kubeconfig, m.pki("admin.pem")) })},
		check{"1.1.15", "mode of the scheduler's kubeconfig", credentials},
		check{"1.1.16", "owner of the scheduler's kubeconfig", credentialsOwner},
		check{"1.1.17", "mode of the controller manager's kubeconfig", credentials},
		check{"1.1.18", "owner of the controller manager's kubeconfig", credentialsOwner},
		check{"1.1.19", "owner of keys and certificates", plane(func(m *machine) Result { return owner(m.pki(""), m.pki("*")) })},
		check{"1.1.20", "mode of certificates", plane(func(m *machine) Result { return mode(0o644, m.pki("*.crt")) })},
		check{"1.1.21", "mode of keys", plane(func(m *machine) Result { return mode(0o600, m.pki("*.key"), m.pki("*.pem"), m.pki("*.yaml")) })},
	)
}

func cni(look func(dir string) Result) func(*machine) Result {
	return func(m *machine) Result {
		if m.node == nil {
			return none("no pods on this machine")
		}
		return look(m.node.CNIConfDir)
	}
}

// nodeFiles are the items of 4.1.
func nodeFiles() []check {
	unit := func(look func(string) Result) func(*machine) Result {
		return kubelet(func(m *machine) Result { return look(m.unit) })
	}
	file := func(look func(string) Result, path func(*machine) string) func(*machine) Result {
		return kubelet(func(m *machine) Result { return look(path(m)) })
	}
	strict := func(p string) Result { return mode(0o600, p) }
	open := func(p string) Result { return mode(0o644, p) }
	owned := func(p string) Result { return owner(p) }
	kubeconfig := func(m *machine) string { return m.node.Kubeconfig }
	ca := func(m *machine) string { return m.node.ClientCA }
	config := func(m *machine) string { return m.config("node") }
	return []check{
		{"4.1.1", "mode of the service's unit", unit(strict)},
		{"4.1.2", "owner of the service's unit", unit(owned)},
		{"4.1.3", "mode of kube-proxy's kubeconfig", file(strict, kubeconfig)},
		{"4.1.4", "owner of kube-proxy's kubeconfig", file(owned, kubeconfig)},
		{"4.1.5", "mode of the kubelet's kubeconfig", file(strict, kubeconfig)},
		{"4.1.6", "owner of the kubelet's kubeconfig", file(owned, kubeconfig)},
		{"4.1.7", "mode of the CA for clients", file(open, ca)},
		{"4.1.8", "owner of the CA for clients", file(owned, ca)},
		{"4.1.9", "mode of the kubelet's configuration", file(strict, config)},
		{"4.1.10", "owner of the kubelet's configuration", file(owned, config)},
	}
}

// contains says whether a comma-separated list has an element.
func contains(list, element string) bool {
	return slices.Contains(strings.Split(strings.Trim(list, "[]"), ","), element)
}
