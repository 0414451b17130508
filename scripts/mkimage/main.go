// SPDX-License-Identifier: Apache-2.0

// Command mkimage writes a container image of one layer from a directory, without a registry.
package main

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/kedge-io/kedge/scripts/image"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "mkimage:", err)
		os.Exit(1)
	}
}

func run() error {
	c := image.Config{}
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: mkimage [flags] NAME:TAG ROOTFS OUT.tar")
		flag.PrintDefaults()
	}
	list := func(to *[]string, sep string) func(string) error {
		return func(s string) error { *to = append(*to, strings.Split(s, sep)...); return nil }
	}
	flag.StringVar(&c.Architecture, "arch", runtime.GOARCH, "architecture of the programs in it")
	flag.Func("entrypoint", "entry point, arguments separated by commas", list(&c.Entrypoint, ","))
	flag.Func("cmd", "default command, arguments separated by commas", list(&c.Cmd, ","))
	flag.Func("env", "a variable NAME=value; may be repeated", list(&c.Env, "\x00"))
	flag.StringVar(&c.User, "user", "", "user[:group]")
	flag.StringVar(&c.WorkingDir, "workdir", "", "working directory")
	flag.Parse()
	if flag.NArg() != 3 {
		flag.Usage()
		os.Exit(2)
	}
	c.Name, c.Rootfs = flag.Arg(0), flag.Arg(1)
	w, err := os.Create(flag.Arg(2))
	if err != nil {
		return err
	}
	if err := image.Write(w, c); err != nil {
		w.Close()
		os.Remove(w.Name())
		return err
	}
	return w.Close()
}
