// SPDX-License-Identifier: Apache-2.0

// Command pack makes the archive and the manifest that Kedge embeds from a directory of files.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/kedge-io/kedge/pkg/embed/archive"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: pack DIR OUT-DIR")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "pack:", err)
		os.Exit(1)
	}
}

func run(src, out string) error {
	data, manifest, err := archive.Pack(src)
	if err != nil {
		return err
	}
	// The manifest comes last: without it there are no assets.
	if err := os.Remove(filepath.Join(out, archive.ManifestName)); err != nil && !os.IsNotExist(err) {
		return err
	}
	if err := os.WriteFile(filepath.Join(out, archive.ArchiveName), data, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(out, archive.ManifestName), manifest, 0o644)
}
