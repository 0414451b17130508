// SPDX-License-Identifier: Apache-2.0

// Package policy holds the rules that keep the source tree in shape, as tests: who may import what, what no package does,
// and what the binary is made of.
//
// A line that has to break a rule says so and why, on itself or on the line above: //policy:allow RULE REASON.
package policy

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const root = "../.."

type source struct {
	path string // from the module's root
	dir  string
	ast  *ast.File
	fset *token.FileSet
	text string
}

// sources parses the Go files that are no tests. Test files follow only the rules that staticcheck and gofmt know.
func sources(t *testing.T) []*source {
	t.Helper()
	return parse(t, func(name string) bool { return !strings.HasSuffix(name, "_test.go") })
}

func parse(t *testing.T, want func(name string) bool) []*source {
	t.Helper()
	fset := token.NewFileSet()
	var files []*source
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if path != root && (strings.HasPrefix(name, ".") || name == "testdata" || name == "bin" || name == "build") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || !want(name) {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if strings.Contains(string(text), "\n//go:build tools\n") || strings.HasPrefix(string(text), "//go:build tools\n") {
			return nil // only keeps modules in go.mod
		}
		f, err := parser.ParseFile(fset, path, text, parser.ParseComments)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		files = append(files, &source{path: rel, dir: filepath.ToSlash(filepath.Dir(rel)), ast: f, fset: fset, text: string(text)})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatal("no Go files: this test is not where it belongs")
	}
	return files
}

// report fails the test for a place in a file, unless the file allows it there.
func report(t *testing.T, f *source, pos token.Pos, rule, format string, args ...any) {
	t.Helper()
	line := f.fset.Position(pos).Line
	lines := strings.Split(f.text, "\n")
	for _, l := range []int{line - 1, line - 2} {
		if l >= 0 && l < len(lines) && regexp.MustCompile(`//policy:allow `+rule+` \S+`).MatchString(lines[l]) {
			return
		}
	}
	t.Errorf("%s:%d: "+format, append([]any{f.path, line}, args...)...)
}

// TestHeaders: every file, tests too, says its licence.
func TestHeaders(t *testing.T) {
	for _, f := range parse(t, func(string) bool { return true }) {
		if !strings.HasPrefix(f.text, "// SPDX-License-Identifier: Apache-2.0\n\n") {
			t.Errorf("%s: does not start with the line \"// SPDX-License-Identifier: Apache-2.0\" and an empty one", f.path)
		}
	}
}

// TestPackages: a package says what it is for, and its name does too.
func TestPackages(t *testing.T) {
	documented := map[string]bool{}
	names := map[string]string{}
	for _, f := range sources(t) {
		names[f.dir] = f.ast.Name.Name
		documented[f.dir] = documented[f.dir] || f.ast.Doc != nil && strings.TrimSpace(f.ast.Doc.Text()) != ""
	}
	for dir, name := range names {
		if !documented[dir] {
			t.Errorf("%s: package %s has no doc comment", dir, name)
		}
		switch name {
		case "util", "utils", "common", "helpers", "misc", "base", "shared":
			t.Errorf("%s: the name %s says nothing about what is inside", dir, name)
		}
	}
}

// TestFileLength: what does not fit into 500 lines is two things.
func TestFileLength(t *testing.T) {
	for _, f := range sources(t) {
		if n := strings.Count(f.text, "\n"); n > 500 {
			report(t, f, f.ast.Package, "length", "%d lines, more than 500", n)
		}
	}
}

// TestExits: only main ends the process. In a library it would take down what else runs in it, without cleaning up.
func TestExits(t *testing.T) {
	for _, f := range sources(t) {
		if f.ast.Name.Name == "main" {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			switch name := calleeOf(call); {
			case name == "panic":
				report(t, f, n.Pos(), "exit", "panic: return an error")
			case name == "os.Exit", name == "syscall.Exit", name == "unix.Exit", strings.HasPrefix(name, "log.Fatal"), strings.HasPrefix(name, "log.Panic"),
				strings.HasPrefix(name, "klog.Fatal"), strings.HasPrefix(name, "klog.Exit"), name == "klog.FlushAndExit":
				report(t, f, n.Pos(), "exit", "%s: return an error", name)
			}
			return true
		})
	}
}

func calleeOf(call *ast.CallExpr) string {
	switch fun := call.Fun.(type) {
	case *ast.Ident:
		return fun.Name
	case *ast.SelectorExpr:
		if x, ok := fun.X.(*ast.Ident); ok {
			return x.Name + "." + fun.Sel.Name
		}
	}
	return ""
}

// TestInit: nothing happens before main. What is linked in costs start time in every process of a server.
func TestInit(t *testing.T) {
	for _, f := range sources(t) {
		for _, decl := range f.ast.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				report(t, f, fn.Pos(), "init", "func init: call it from where it is needed")
			}
		}
	}
}

// TestReplace: every replace in go.mod is for a staging module of Kubernetes.
func TestReplace(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^.*?(\S+)(?: \S+)? => (\S+)(.*)$`).FindAllStringSubmatch(string(text), -1) {
		if m[1] != m[2] || !strings.HasPrefix(m[1], "k8s.io/") {
			t.Errorf("go.mod replaces %s by %s%s: upstream is used unpatched; only k8s.io staging modules need a replace, by their own release", m[1], m[2], m[3])
		}
	}
}
