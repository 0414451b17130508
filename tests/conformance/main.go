// SPDX-License-Identifier: Apache-2.0

// Command conformance runs upstream's end-to-end tests against Kedge, on machines of the test bed or on a cluster that
// exists. `make conformance` builds everything and runs it; docs/conformance.md says more.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

// options are what the command line says.
type options struct {
	kit        string // directory with the suite and its images
	kubeconfig string // of a cluster that exists; empty to make one
	servers    int
	flags      []string // of the servers
	procs      int
	selection  selection
	tests      string // file with names
	results    string // directory
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	o, err := parse(os.Args[1:])
	if err == nil {
		err = run(ctx, o)
	}
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if errors.Is(err, errFailed) {
		os.Exit(1) // the last line has said it
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

func parse(args []string) (options, error) {
	var o options
	f := flag.NewFlagSet("conformance", flag.ContinueOnError)
	f.StringVar(&o.kit, "kit", "build/conformance", "directory with what make conformance-kit has built")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig of a cluster that exists, instead of machines of the test bed")
	f.IntVar(&o.servers, "servers", 1, "how many of the three machines are servers: 1 or 3")
	flags := f.String("flags", "", "more flags of kedge server, separated by spaces")
	f.IntVar(&o.procs, "procs", 12, "tests at a time in the parallel part")
	f.StringVar(&o.selection.labels, "labels", "Conformance", "Ginkgo's label filter; empty for all tests that there are")
	f.StringVar(&o.selection.focus, "focus", "", "only tests whose name matches this regular expression")
	f.StringVar(&o.selection.skip, "skip", "", "no tests whose name matches this regular expression")
	f.StringVar(&o.tests, "tests", "", "only the tests that are named in this file, one in a line")
	f.StringVar(&o.results, "results", "", "directory for logs and reports (default results-TIME in the kit)")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	o.flags = strings.Fields(*flags)
	if o.servers != 1 && o.servers != 3 {
		return o, fmt.Errorf("-servers: %d is neither 1 nor 3", o.servers)
	}
	if o.results == "" {
		o.results = filepath.Join(o.kit, "results-"+time.Now().Format("20060102-150405"))
	}
	// Ginkgo changes the directory.
	for _, path := range []*string{&o.kit, &o.results, &o.kubeconfig} {
		if *path == "" {
			continue
		}
		abs, err := filepath.Abs(*path)
		if err != nil {
			return o, err
		}
		*path = abs
	}
	if o.tests != "" {
		names, err := os.ReadFile(o.tests)
		if err != nil {
			return o, err
		}
		if o.selection.names = focusOf(string(names)); o.selection.names == "" {
			return o, fmt.Errorf("%s: it names no test", o.tests)
		}
	}
	return o, nil
}

func run(ctx context.Context, o options) error {
	// kubectl is Kedge under another name.
	bin, err := cluster.Binary()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.results, 0o755); err != nil {
		return err
	}
	s := suite{kit: o.kit, results: o.results, kubectl: filepath.Join(o.results, "kubectl"), kubeconfig: o.kubeconfig}
	if err := os.Symlink(bin, s.kubectl); err != nil {
		return err
	}
	parts, err := s.parts(ctx, o)
	if err != nil {
		return err
	}
	results, err := s.runAll(ctx, o, parts)
	if err != nil {
		return err
	}
	return summarize(os.Stdout, o.results, results)
}

// runAll runs the parts, on machines of their own unless there is a cluster.
func (s *suite) runAll(ctx context.Context, o options, parts []part) (results []result, err error) {
	if o.kubeconfig == "" {
		m, startErr := start(ctx, o)
		if startErr != nil {
			return nil, startErr
		}
		defer func() {
			keep := ctx.Err() == nil && (err != nil || slices.ContainsFunc(results, result.failed))
			err = errors.Join(err, m.close(keep))
		}()
		s.kubeconfig = m.kubeconfig
	}
	for _, p := range parts {
		r, err := s.run(ctx, p)
		if err != nil {
			return nil, err
		}
		results = append(results, r...)
	}
	return results, nil
}
