// SPDX-License-Identifier: Apache-2.0

// Package image makes the container images that tests run, from what the machine has: busybox out of the test bed's
// Debian root, and a server written for the tests. No registry is involved.
package image

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin"

	"github.com/kedge-io/kedge/scripts/image"
)

// Names under which the images are usually made.
const (
	BusyboxName = "kedge.test/busybox:1"
	ServerName  = "kedge.test/server:1"
)

// Busybox writes an image archive to file: busybox with all its applets in /bin and its kin, and the shared libraries it
// needs. Debian's static busybox would not do, because getaddrinfo of a static glibc crashes without the libraries of the
// same glibc. root is a Debian root directory with the package busybox in it, e.g. the test bed's template.
func Busybox(ctx context.Context, file, name, root string) error {
	dir, err := os.MkdirTemp("", "busybox-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := busyboxRoot(ctx, dir, root); err != nil {
		return fmt.Errorf("busybox image from %s: %w", root, err)
	}
	return write(file, image.Config{Name: name, Rootfs: dir, Cmd: []string{"sh"}, Env: env(name)})
}

func busyboxRoot(ctx context.Context, dir, root string) error {
	for _, d := range []string{"bin", "sbin", "usr/bin", "usr/sbin", "lib64", "lib", "etc", "tmp", "root", "var/www", "proc", "sys", "dev", "run"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	if err := os.Chmod(filepath.Join(dir, "tmp"), 0o1777|fs.ModeSticky); err != nil {
		return err
	}
	files, err := closure(root, "/bin/busybox")
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := copyOut(root, f, dir); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"etc/passwd":        "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/sh\nnobody:x:65534:65534::/nonexistent:/bin/false\n",
		"etc/group":         "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n",
		"etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	// The applets and the places where people expect them; asked of busybox itself, in its own root.
	out, err := exec.CommandContext(ctx, "chroot", dir, "/bin/busybox", "--list-full").Output()
	if err != nil {
		return fmt.Errorf("list the applets of busybox: %w", err)
	}
	for applet := range strings.FieldsSeq(string(out)) {
		if err := os.Symlink("/bin/busybox", filepath.Join(dir, applet)); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// closure lists the program, its loader and all libraries it needs, as paths below root.
func closure(root, program string) ([]string, error) {
	var files []string
	var libDirs []string
	todo := []string{program}
	for seen := map[string]bool{}; len(todo) > 0; todo = todo[1:] {
		if seen[todo[0]] {
			continue
		}
		seen[todo[0]] = true
		files = append(files, todo[0])
		path, err := securejoin.SecureJoin(root, todo[0])
		if err != nil {
			return nil, err
		}
		needed, loader, err := linksOf(path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if loader != "" {
			todo = append(todo, loader)
			triplets, err := filepath.Glob(filepath.Join(root, "lib/*-linux-gnu*"))
			if err != nil {
				return nil, err
			}
			for _, t := range triplets {
				libDirs = append(libDirs, "/lib/"+filepath.Base(t))
			}
		}
		for _, lib := range needed {
			place, err := find(root, libDirs, lib)
			if err != nil {
				return nil, err
			}
			todo = append(todo, place)
		}
	}
	return files, nil
}

// linksOf reads what an ELF file is linked with, and the loader that it asks for ("" for a library).
func linksOf(path string) (libs []string, loader string, err error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return nil, "", err
		}
		loader = strings.TrimRight(string(b), "\x00")
	}
	libs, err = f.ImportedLibraries()
	return libs, loader, err
}

func find(root string, dirs []string, lib string) (string, error) {
	for _, d := range append(dirs, "/lib64") {
		place := filepath.Join(d, lib)
		if path, err := securejoin.SecureJoin(root, place); err == nil {
			if _, err := os.Stat(path); err == nil {
				return place, nil
			}
		}
	}
	return "", fmt.Errorf("library %s is not in %v below %s", lib, dirs, root)
}

func copyOut(root, name, dir string) error {
	from, err := securejoin.SecureJoin(root, name)
	if err != nil {
		return err
	}
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	to := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, content, 0o755)
}

// Server writes an image archive to file with the server of the directory testserver, which it builds: see there for what
// that answers.
func Server(ctx context.Context, file, name string) error {
	dir, err := os.MkdirTemp("", "testserver-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(dir, "server"), "github.com/kedge-io/kedge/tests/image/testserver")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the test server: %w: %s", err, out)
	}
	return write(file, image.Config{Name: name, Rootfs: dir, Entrypoint: []string{"/server"}, Env: env(name)})
}

func write(file string, c image.Config) error {
	c.Architecture = runtime.GOARCH
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	return errors.Join(image.Write(f, c), f.Close())
}

// env makes every image a different one, also when its files are those of another: the kubelet keeps its records of who may
// use an image by the image's digest, not by its name.
func env(name string) []string {
	return []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "IMAGE=" + name}
}
