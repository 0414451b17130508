// SPDX-License-Identifier: Apache-2.0

// Command userland picks the network tools and what they need, nothing else, out of a tree of unpacked Debian packages.
//
// The result has a launcher under each tool's name (see scripts/native/launcher.c), the programs in lib/exec, their
// libraries and loader in lib, and the extensions of iptables in lib/xtables.
package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// Programs and the names under which they are called. Plain "iptables" is the nftables variant, as on Debian.
var tools = []struct {
	program string
	names   []string
}{
	{"nft", []string{"nft"}},
	{"ipset", []string{"ipset"}},
	{"conntrack", []string{"conntrack"}},
	{"xtables-nft-multi", append(variants(""), variants("-nft")...)},
	{"xtables-legacy-multi", variants("-legacy")},
}

func variants(kind string) []string {
	var names []string
	for _, base := range []string{"iptables", "ip6tables"} {
		for _, action := range []string{"", "-save", "-restore"} {
			names = append(names, base+kind+action)
		}
	}
	return names
}

// extensions are the modules that iptables and nft load when a rule needs them. Those of ebtables and arptables
// (libebt_*, libarpt_*) belong to tools that are not here.
var extensions = []string{"libxt_*.so", "libipt_*.so", "libip6t_*.so"}

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: userland PACKAGES-ROOT LAUNCHER-DIR OUT-DIR")
		os.Exit(2)
	}
	b := &builder{root: os.Args[1], launchers: os.Args[2], out: os.Args[3], done: map[string]bool{}}
	if err := b.run(); err != nil {
		fmt.Fprintln(os.Stderr, "userland:", err)
		os.Exit(1)
	}
}

type builder struct {
	root, launchers, out string
	libDirs              []string        // absolute within root
	done                 map[string]bool // libraries that were taken, by soname
}

func (b *builder) run() error {
	if err := b.findLibDirs(); err != nil {
		return err
	}
	for _, t := range tools {
		if err := b.program(t.program, t.names); err != nil {
			return fmt.Errorf("%s: %w", t.program, err)
		}
	}
	return b.extensions()
}

// findLibDirs finds Debian's library directories by the architecture's triplet, with and without merged /usr.
func (b *builder) findLibDirs() error {
	for _, pattern := range []string{"lib/*-linux-gnu", "usr/lib/*-linux-gnu"} {
		dirs, err := filepath.Glob(filepath.Join(b.root, pattern))
		if err != nil {
			return err
		}
		for _, d := range dirs {
			b.libDirs = append(b.libDirs, strings.TrimPrefix(d, filepath.Clean(b.root)))
		}
	}
	if len(b.libDirs) == 0 {
		return fmt.Errorf("no library directory in %s: are the packages unpacked there?", b.root)
	}
	return nil
}

func (b *builder) program(program string, names []string) error {
	for _, n := range names {
		if err := b.copy(filepath.Join(b.launchers, program), n, 0o755); err != nil {
			return err
		}
	}
	src, err := b.find(program, []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"})
	if err != nil {
		return err
	}
	if err := b.copy(src, "lib/exec/"+program, 0o755); err != nil {
		return err
	}
	interpreter, err := interpreterOf(src)
	if err != nil {
		return err
	}
	loader, err := b.find(path.Base(interpreter), b.libDirs)
	if err != nil {
		return err
	}
	if err := b.copy(loader, "lib/"+path.Base(interpreter), 0o755); err != nil {
		return err
	}
	return b.libraries(src)
}

// libraries takes what an ELF file needs, and what that needs in turn.
func (b *builder) libraries(file string) error {
	f, err := elf.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	needed, err := f.ImportedLibraries()
	if err != nil {
		return err
	}
	for _, name := range needed {
		if b.done[name] {
			continue
		}
		b.done[name] = true
		src, err := b.find(name, b.libDirs)
		if err != nil {
			return fmt.Errorf("needed by %s: %w", file, err)
		}
		if !strings.HasPrefix(name, "ld-linux") { // the loader is there already
			if err := b.copy(src, "lib/"+name, 0o644); err != nil {
				return err
			}
		}
		if err := b.libraries(src); err != nil {
			return err
		}
	}
	return nil
}

// extensions keeps links as links: libxtables must see that two names are one module, or it registers that one twice.
func (b *builder) extensions() error {
	dir, err := b.find("xtables", b.libDirs)
	if err != nil {
		return err
	}
	for _, pattern := range extensions {
		files, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return err
		}
		if len(files) == 0 {
			return fmt.Errorf("no %s in %s", pattern, dir)
		}
		for _, f := range files {
			to := "lib/xtables/" + filepath.Base(f)
			if link, err := os.Readlink(f); err == nil {
				if err := os.Symlink(link, filepath.Join(b.out, to)); err != nil {
					return err
				}
				continue
			}
			if err := b.copy(f, to, 0o644); err != nil {
				return err
			}
			if err := b.libraries(f); err != nil {
				return err
			}
		}
	}
	return nil
}

// find looks for a name in directories of the tree. Links in there may be absolute, so they are followed by hand.
func (b *builder) find(name string, dirs []string) (string, error) {
	for _, d := range dirs {
		p := filepath.Join(d, name)
		for range 8 {
			to, err := os.Readlink(filepath.Join(b.root, p))
			if err != nil {
				break
			}
			if !filepath.IsAbs(to) {
				to = filepath.Join(filepath.Dir(p), to)
			}
			p = to
		}
		p = filepath.Join(b.root, p)
		if _, err := os.Lstat(p); err == nil {
			return p, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", fmt.Errorf("%s is in none of %s of the packages", name, strings.Join(dirs, ", "))
}

func (b *builder) copy(src, name string, mode fs.FileMode) error {
	data, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	dst := filepath.Join(b.out, name)
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	return os.WriteFile(dst, data, mode)
}

// interpreterOf reads the loader that a program asks for (its PT_INTERP header).
func interpreterOf(file string) (string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			data := make([]byte, p.Filesz)
			if _, err := p.ReadAt(data, 0); err != nil {
				return "", err
			}
			return strings.TrimRight(string(data), "\x00"), nil
		}
	}
	return "", fmt.Errorf("%s has no loader", file)
}
