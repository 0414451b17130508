// SPDX-License-Identifier: Apache-2.0

// Command bench compares Kedge with the stock components of Kubernetes, each a process of its own, on equal machines of
// the test bed and in turns. `make bench` builds everything and runs it; docs/benchmarks.md says how to read the table.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kedge-io/kedge/tests/testbed"
)

// options are what the command line says.
type options struct {
	runs, idleRuns int
	sides, parts   []string
	maxLoad        float64
	kedge          string // the binary
	stock          string // directory of the stock programs
	units          string // the program that starts them
	writer         string // the program that writes while servers die
	pause          string // directory with a static program "pause", for the image of the pods
	output         string
	settle, window time.Duration
	xz             string
	modes          []string      // of kube-proxy, whose networks are measured
	proxy          string        // the one of these; empty: nftables of stock, and what Kedge chooses
	netload        string        // the program that uses the network
	netpolicy      string        // the tests of Kedge's NetworkPolicy
	span           time.Duration // of a figure of the network
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
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parse(args []string) (options, error) {
	var o options
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.IntVar(&o.runs, "runs", 3, "fresh starts and restarts of each side")
	f.IntVar(&o.idleRuns, "idle-runs", 1, "measurements of the idle cluster, of each side")
	sides := f.String("sides", "stock kedge", "what to measure, in this order in turns")
	parts := f.String("parts", strings.Join(allParts(), " "),
		"start: times; idle: resources with no pods; pods: time and resources with 20 pods; size: files; cluster: several machines; "+
			"network, services, dns: of two machines; policy: NetworkPolicy")
	modes := f.String("proxy-modes", "nftables iptables", "modes of kube-proxy in which network and services are measured, dns in the first one")
	f.Float64Var(&o.maxLoad, "max-load", 4, "refuse to measure everything when the load average of this host is higher")
	f.StringVar(&o.kedge, "kedge", "build/bench/kedge", "Kedge's binary")
	f.StringVar(&o.stock, "stock", "build/stock", "directory of the stock programs")
	f.StringVar(&o.units, "units", "build/bench/units", "the program that starts the stock programs")
	f.StringVar(&o.writer, "writer", "build/bench/writer", "the program that writes while servers die")
	f.StringVar(&o.pause, "pause", "build/amd64/pause", "directory with the program of the pods' image")
	f.StringVar(&o.output, "output", "build/bench/result.json", "file for all measured values")
	f.DurationVar(&o.settle, "settle", 60*time.Second, "time to become idle")
	f.DurationVar(&o.window, "window", 60*time.Second, "time over which an idle cluster is measured; figures are per minute")
	f.StringVar(&o.xz, "xz", "-9", "compression level of xz")
	f.StringVar(&o.netload, "netload", "build/bench/netload", "the program that uses the network")
	f.StringVar(&o.netpolicy, "netpolicy", "build/bench/netpolicy.test", "the tests of Kedge's NetworkPolicy")
	f.DurationVar(&o.span, "span", 2*time.Second, "time that each figure of the network takes")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	o.sides, o.parts, o.modes = strings.Fields(*sides), strings.Fields(*parts), strings.Fields(*modes)
	for _, s := range o.sides {
		if s != "stock" && s != "kedge" {
			return o, fmt.Errorf("-sides: %q is neither stock nor kedge", s)
		}
	}
	for _, p := range o.parts {
		if !slices.Contains(allParts(), p) {
			return o, fmt.Errorf("-parts: %q is none of %s", p, strings.Join(allParts(), ", "))
		}
	}
	for _, m := range o.modes {
		if !slices.Contains(proxyModes(), m) {
			return o, fmt.Errorf("-proxy-modes: %q is none of %s", m, strings.Join(proxyModes(), ", "))
		}
	}
	return o, nil
}

func allParts() []string {
	return []string{"start", "idle", "pods", "size", "cluster", "network", "services", "dns", "policy"}
}

func (o options) has(part string) bool { return slices.Contains(o.parts, part) }

func run(ctx context.Context, o options) error {
	if l, err := load(); err != nil {
		return err
	} else if l > o.maxLoad {
		text := fmt.Sprintf("the load average is %.1f, so figures will be off", l)
		if len(o.parts) > 1 {
			return errors.New(text + ": wait, or run with MAX_LOAD=100")
		}
		fmt.Println(text + " (ratios are more trustworthy than seconds)")
	}
	var res results
	defer func() {
		// Also of an interrupted run, as far as it got.
		if err := res.write(os.Stdout, o); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
		}
	}()
	if o.has("size") {
		if err := sizes(ctx, o, &res); err != nil {
			return err
		}
	}
	// In turns, so that both sides meet the same weather.
	for i := range o.runs {
		for _, name := range o.sides {
			if err := measureAll(ctx, o, name, i+1, &res, []work{
				{o.has("start"), onMachine(starts)},
				{o.has("cluster"), joins},
			}); err != nil {
				return err
			}
		}
	}
	for i := range o.idleRuns {
		for _, name := range o.sides {
			// A file system of its own, so that its block device can be counted.
			if err := measureAll(ctx, o, name, i+1, &res, []work{
				{o.has("idle") || o.has("pods"), onMachine(idles, testbed.Disk(diskSize))},
				{o.has("cluster"), idleClusters},
			}); err != nil {
				return err
			}
		}
		if err := measureNetworks(ctx, o, i+1, &res); err != nil {
			return err
		}
	}
	return nil
}

// diskSize is that of machines with a disk of their own.
const diskSize = "8G"

// work is something to measure in a bed.
type work struct {
	wanted bool
	do     func(context.Context, options, *testbed.Bed, *recorder) error
}

// measureAll measures one side, each work in a bed of its own.
func measureAll(ctx context.Context, o options, name string, n int, res *results, works []work) error {
	for _, w := range works {
		if !w.wanted {
			continue
		}
		if err := measure(ctx, o, &recorder{results: res, side: name, run: n}, w.do); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func measure(ctx context.Context, o options, rec *recorder, do func(context.Context, options, *testbed.Bed, *recorder) error) (err error) {
	l, err := load()
	if err != nil {
		return err
	}
	bed, err := testbed.Open(ctx, "bench-"+rec.side)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w (logs are kept in %s)", err, bed.KeepLogs())
		}
		err = errors.Join(err, bed.Close())
	}()
	err = do(ctx, o, bed, rec)
	fmt.Printf("%-5s run %d, load before %.1f: %s\n", rec.side, rec.run, l, rec.line())
	return err
}

// onMachine makes a machine with one side, and measures on it.
func onMachine(what func(context.Context, options, side, *host, *recorder) error, opts ...testbed.Option,
) func(context.Context, options, *testbed.Bed, *recorder) error {
	return func(ctx context.Context, o options, bed *testbed.Bed, rec *recorder) error {
		s, err := newSide(ctx, o, rec.side, bed, opts...)
		if err != nil {
			return err
		}
		h, err := newHost(bed, s.machine())
		if err != nil {
			return err
		}
		return what(ctx, o, s, h, rec)
	}
}

func load() (float64, error) {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0, err
	}
	var l float64
	_, err = fmt.Sscan(string(b), &l)
	return l, err
}
