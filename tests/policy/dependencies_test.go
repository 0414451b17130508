// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const listFile = "dependencies.txt"

// TestDependencies compares what the binary is linked from with the list that is checked in, so that nothing grows into it
// unnoticed. `make dependencies` writes the list anew.
func TestDependencies(t *testing.T) {
	if _, err := os.Stat(filepath.Join(root, "cmd", "kedge")); err != nil {
		t.Skip("there is no cmd/kedge")
	}
	got := list(t)
	if slices.Contains(flag.Args(), "update") {
		if err := os.WriteFile(listFile, []byte(strings.Join(got, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	text, err := os.ReadFile(listFile)
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Split(strings.TrimSpace(string(text)), "\n")
	for _, m := range got {
		if !slices.Contains(want, m) {
			t.Errorf("new in the binary: %s", m)
		}
	}
	for _, m := range want {
		if !slices.Contains(got, m) {
			t.Errorf("no longer in the binary: %s", m)
		}
	}
	if t.Failed() {
		t.Log("if this is meant: make dependencies, and say why in the commit")
	}
}

// list gives the modules with their versions, of the build for Linux on amd64.
func list(t *testing.T) []string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}}{{end}}{{end}}", "./cmd/kedge")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64", "CGO_ENABLED=0")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderr.String())
	}
	modules := strings.Split(strings.TrimSpace(string(out)), "\n")
	modules = slices.DeleteFunc(modules, func(s string) bool { return s == "" })
	slices.SortFunc(modules, func(a, b string) int { return cmp.Compare(a, b) })
	return slices.Compact(modules)
}
