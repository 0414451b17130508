// SPDX-License-Identifier: Apache-2.0

// Package version says which Kedge this is. The build sets both variables by -ldflags; nothing else writes them.
package version

var (
	// Version is the release: that of the Kubernetes inside with Kedge's own revision, as "v1.37.2+kedge1".
	Version = "v0.0.0+unknown"

	// Commit is the git commit of the source, empty when the build did not know it.
	Commit = ""
)
