// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

// commonLicenses is where Debian keeps the texts that its copyright files refer to.
const commonLicenses = "/usr/share/common-licenses"

const debianReadme = `Kedge carries programs and libraries of these packages of Debian, unchanged; each line of "packages" has a package's name and version, and
those of its source. The sources: apt-get source --only-source SOURCE=VERSION on a Debian machine, or the archive of former versions that Debian keeps.
`

// licenses gathers in dir what has to go with the binaries: the licences of all Go modules that the packages link for arch, and the
// copyright files of the Debian packages that the file packages lists and sysroot holds.
func licenses(dir, arch, sysroot, packages string, linked []string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	sources, err := goSources(arch, linked)
	if err != nil {
		return err
	}
	for _, s := range sources {
		if err := s.collect(filepath.Join(dir, "go", s.name)); err != nil {
			return err
		}
	}
	return debian(filepath.Join(dir, "debian"), sysroot, packages)
}

// source is a module, or the standard library, with the directories of it that are linked.
type source struct {
	name string // path@version
	root string
	dirs []string
}

// goSources asks the go command what packages are made of.
func goSources(arch string, linked []string) ([]*source, error) {
	cmd := exec.Command("go", append([]string{"list", "-deps", "-json=ImportPath,Dir,Standard,Module"}, linked...)...)
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+arch)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	type module struct {
		Path, Version, Dir string
		Main               bool
		Replace            *module
	}
	all := map[string]*source{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			ImportPath, Dir string
			Standard        bool
			Module          *module
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		var s source
		switch m := p.Module; {
		case p.Standard:
			root, err := goroot()
			if err != nil {
				return nil, err
			}
			s = source{name: "std@" + runtime.Version(), root: root}
		case m == nil:
			return nil, fmt.Errorf("%s belongs to no module", p.ImportPath)
		case m.Main:
			s = source{name: m.Path, root: m.Dir}
		default:
			if m.Replace != nil {
				m = m.Replace
			}
			s = source{name: m.Path + "@" + m.Version, root: m.Dir}
		}
		if all[s.name] == nil {
			all[s.name] = &s
		}
		all[s.name].dirs = append(all[s.name].dirs, p.Dir)
	}
	var list []*source
	for _, s := range all {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b *source) int { return strings.Compare(a.name, b.name) })
	return list, nil
}

func goroot() (string, error) {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	return strings.TrimSpace(string(out)), err
}

var licenseFile = regexp.MustCompile(`(?i)^(licen[cs]e|copying|copyright|notice|patents|unlicense)([-._].*)?$`)

// collect copies the licence files that are beside the linked packages or above them. A source without any is an error.
func (s *source) collect(dest string) error {
	seen := map[string]bool{}
	found := false
	for _, dir := range s.dirs {
		for {
			if !seen[dir] {
				seen[dir] = true
				n, err := copyLicenses(dir, filepath.Join(dest, strings.TrimPrefix(dir, s.root)))
				if err != nil {
					return err
				}
				found = found || n > 0
			}
			if dir == s.root || !strings.HasPrefix(dir, s.root) {
				break
			}
			dir = filepath.Dir(dir)
		}
	}
	if !found {
		return fmt.Errorf("%s has no licence in %s: find out by which terms it may be passed on", s.name, s.root)
	}
	return nil
}

func copyLicenses(dir, dest string) (int, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	n := 0
	for _, e := range entries {
		// "license.go" is a program about licences.
		if !e.Type().IsRegular() || !licenseFile.MatchString(e.Name()) || filepath.Ext(e.Name()) == ".go" {
			continue
		}
		if err := copyFile(filepath.Join(dir, e.Name()), filepath.Join(dest, e.Name())); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

func debian(dest, sysroot, packages string) error {
	list, err := os.ReadFile(packages)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(list)) {
		name, _, _ := strings.Cut(line, " ")
		// Its directory may be a link to another package's.
		if err := copyFile(filepath.Join(sysroot, "usr/share/doc", name, "copyright"), filepath.Join(dest, name, "copyright")); err != nil {
			return fmt.Errorf("the licence of Debian's package %s: %w", name, err)
		}
	}
	texts, err := os.ReadDir(commonLicenses)
	if err != nil {
		return fmt.Errorf("the texts of common licences: %w", err)
	}
	for _, e := range texts {
		if e.Type()&fs.ModeSymlink == 0 {
			if err := copyFile(filepath.Join(commonLicenses, e.Name()), filepath.Join(dest, "common-licenses", e.Name())); err != nil {
				return err
			}
		}
	}
	return errors.Join(copyFile(packages, filepath.Join(dest, "packages")), os.WriteFile(filepath.Join(dest, "README"), []byte(debianReadme), 0o644))
}

func copyFile(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o644)
}
