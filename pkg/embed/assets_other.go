// SPDX-License-Identifier: Apache-2.0

//go:build !amd64 && !arm64

package embed

import "embed"

// Nothing is built for other architectures: Stage returns ErrNoAssets.
var assets embed.FS

const assetsDir = "."
