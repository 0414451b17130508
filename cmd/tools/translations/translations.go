// SPDX-License-Identifier: Apache-2.0

// Package translations keeps kubectl's message catalogue out of processes that are not kubectl. kubectl translates while its
// packages are initialised, and the first translation packs and unpacks the whole catalogue: 20 ms and 4 MB in each of Kedge's
// processes.
package translations

import (
	"os"
	"path/filepath"

	"k8s.io/kubectl/pkg/util/i18n"
)

//policy:allow init the hook has to be set before kubectl's packages are initialised, as its documentation says
func init() {
	if !isKubectl(os.Args) {
		// It can only fail when the catalogue has been loaded already; then there is nothing left to save.
		_ = i18n.SetLoadTranslationsFunc(func() error { return nil })
	}
}

// isKubectl says whether this process was started as kubectl, under its own name or as a subcommand.
func isKubectl(args []string) bool {
	return filepath.Base(args[0]) == "kubectl" || len(args) > 1 && args[1] == "kubectl"
}
