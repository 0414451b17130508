// SPDX-License-Identifier: Apache-2.0

// Package manifests embeds the YAML that a server applies at its start: what Kedge's components need in the cluster. Each file
// is a text template over the control plane's configuration and can be left out with --disable NAME.
package manifests

import "embed"

// FS holds the manifests.
//
//go:embed *.yaml
var FS embed.FS
