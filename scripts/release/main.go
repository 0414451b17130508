// SPDX-License-Identifier: Apache-2.0

// Release makes the archives that users install Kedge from; mk/release.mk calls it. The same inputs give the same bytes.
//
//	release key KEY PUB           make the private key KEY unless it exists, and write its public half to PUB
//	release licenses DIR ARCH SYSROOT PACKAGES MODULE-PACKAGE...
//	                              gather in DIR the licences of all that is linked or packed for ARCH
//	release sign STAGE KEY        write checksums of all files in STAGE, and sign them
//	release pack STAGE DIST KEY SECONDS
//	                              pack STAGE into DIST, with checksums that are signed; all files are of that Unix time
package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 3 && args[0] == "key":
		return makeKey(args[1], args[2])
	case len(args) > 5 && args[0] == "licenses":
		return licenses(args[1], args[2], args[3], args[4], args[5:])
	case len(args) == 3 && args[0] == "sign":
		key, err := readKey(args[2])
		if err != nil {
			return err
		}
		return signTree(args[1], key)
	case len(args) == 5 && args[0] == "pack":
		key, err := readKey(args[3])
		if err != nil {
			return err
		}
		seconds, err := strconv.ParseInt(args[4], 10, 64)
		if err != nil {
			return fmt.Errorf("the time of the files: %w", err)
		}
		return pack(args[1], args[2], key, time.Unix(seconds, 0))
	}
	return errors.New("usage: see the comment in scripts/release/main.go")
}
