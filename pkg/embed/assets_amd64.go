// SPDX-License-Identifier: Apache-2.0

package embed

import "embed"

// The directory is there before the assets are: it holds a .gitkeep.
//
//go:embed all:assets/amd64
var assets embed.FS

const assetsDir = "assets/amd64"
