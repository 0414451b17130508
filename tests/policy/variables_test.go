// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"go/ast"
	"go/token"
	"testing"
)

// TestVariables: package variables do not change. It sees assignments by name within the package, which catches the usual
// ways; a pointer handed around it does not see.
func TestVariables(t *testing.T) {
	packages := map[string][]*source{}
	for _, f := range sources(t) {
		packages[f.dir] = append(packages[f.dir], f)
	}
	for _, files := range packages {
		vars := map[string]bool{}
		for _, f := range files {
			for _, decl := range f.ast.Decls {
				for _, spec := range specsOf(decl) {
					for _, name := range spec.Names {
						vars[name.Name] = true
						if typ, ok := spec.Type.(*ast.SelectorExpr); ok && (isIdent(typ.X, "sync") || isIdent(typ.X, "atomic")) {
							report(t, f, name.Pos(), "variable", "package variable %s changes: keep it in a type", name.Name)
						}
					}
				}
			}
		}
		for _, f := range files {
			for _, name := range changed(f, vars) {
				report(t, f, name.Pos(), "variable", "package variable %s is changed: pass it, or keep it in a type", name.Name)
			}
		}
	}
}

func specsOf(decl ast.Decl) []*ast.ValueSpec {
	gen, ok := decl.(*ast.GenDecl)
	if !ok || gen.Tok != token.VAR {
		return nil
	}
	var specs []*ast.ValueSpec
	for _, s := range gen.Specs {
		specs = append(specs, s.(*ast.ValueSpec))
	}
	return specs
}

func isIdent(e ast.Expr, name string) bool {
	id, ok := e.(*ast.Ident)
	return ok && id.Name == name
}

// changed lists where functions of a file assign to one of the package's variables.
func changed(f *source, vars map[string]bool) []*ast.Ident {
	//lint:ignore SA1019 only names within a file are resolved, which the parser gets right, and types would take a build of everything
	inFile := map[*ast.Object]bool{} // package variables that this file declares
	for _, decl := range f.ast.Decls {
		for _, spec := range specsOf(decl) {
			for _, name := range spec.Names {
				inFile[name.Obj] = true
			}
		}
	}
	unresolved := map[*ast.Ident]bool{} // what other files may declare
	for _, id := range f.ast.Unresolved {
		unresolved[id] = true
	}
	var found []*ast.Ident
	check := func(e ast.Expr) {
		if id := rootOf(e); id != nil && vars[id.Name] && (inFile[id.Obj] && id.Obj != nil || unresolved[id]) {
			found = append(found, id)
		}
	}
	ast.Inspect(f.ast, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			if n.Tok != token.DEFINE {
				for _, e := range n.Lhs {
					check(e)
				}
			}
		case *ast.IncDecStmt:
			check(n.X)
		case *ast.UnaryExpr:
			if n.Op == token.AND {
				check(n.X)
			}
		}
		return true
	})
	return found
}

// rootOf gives the variable behind v, v[i], v.f and *v.
func rootOf(e ast.Expr) *ast.Ident {
	for {
		switch x := e.(type) {
		case *ast.Ident:
			return x
		case *ast.IndexExpr:
			e = x.X
		case *ast.SelectorExpr:
			e = x.X
		case *ast.StarExpr:
			e = x.X
		case *ast.ParenExpr:
			e = x.X
		default:
			return nil
		}
	}
}
