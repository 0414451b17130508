// SPDX-License-Identifier: Apache-2.0

// Package check is the preflight: it probes whether this machine can run Kedge and says for everything that is wrong
// what was found and what to type. Probes try the thing itself (mount an overlay, create a VXLAN device, write and
// sync) instead of reading a kernel configuration, and they leave nothing behind.
package check

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Options tells the probes what this node is meant to do. Zero values stand for the defaults of `kedge server`.
type Options struct {
	DataDir    string // default /var/lib/kedge
	KubeletDir string // default /var/lib/kubelet
	LogDir     string // default /var/log

	NodeName string // default: the host name, lower-cased
	Agent    bool   // the machine carries no control plane: neither API server nor etcd

	Ports          []Port // default: what DefaultPorts gives
	BalancerPort   int    // of the load balancer on loopback, for DefaultPorts; default 6444
	ProxyMode      string // auto (default), ipvs, nftables, iptables, none
	FlannelBackend string // vxlan (default), host-gw, none
	Snapshotter    string // overlayfs (default), native

	ClusterCIDR []netip.Prefix // default 10.42.0.0/16
	ServiceCIDR []netip.Prefix // default 10.43.0.0/16
	DNSAddress  netip.Addr     // default 10.43.0.10
	ResolvConf  string         // default: /etc/resolv.conf, or what a local resolver says it asks itself

	// ConfigErr is what was wrong with the configuration that these options come from; the probes then go by defaults.
	ConfigErr error
	// ConfigLater is what has to be there when Kedge starts, and is not yet.
	ConfigLater error
	// ExpectRunning says that Kedge may be running on this machine while it is checked, so that ports held by it are
	// right. Without it they are a warning: something else is about to want them.
	ExpectRunning bool
	// BuildDate is when this Kedge was built; a clock before it is wrong. Default: a date fixed in the source.
	BuildDate time.Time
}

// Status is the outcome of a probe.
type Status string

// The outcomes, from best to worst. Info is a fact worth knowing that is neither good nor bad. Unknown means that the
// probe itself could not be carried out; the finding says why.
const (
	Pass    Status = "pass"
	Info    Status = "info"
	Unknown Status = "unknown"
	Warning Status = "warning"
	Fail    Status = "fail"
)

// statuses holds every status, from best to worst.
func statuses() []Status { return []Status{Pass, Info, Unknown, Warning, Fail} }

func (s Status) rank() int {
	for i, known := range statuses() {
		if s == known {
			return i
		}
	}
	return len(statuses())
}

func worst(a, b Status) Status {
	if b.rank() > a.rank() {
		return b
	}
	return a
}

// Result is what a probe found out.
type Result struct {
	Status  Status `json:"status"`
	Finding string `json:"finding"`          // what is the case, with numbers
	Remedy  string `json:"remedy,omitempty"` // what to do about it; lines that start with "$ " are commands to type
	Items   []Item `json:"items,omitempty"`  // the parts of a probe that looks at several things
}

// Item is one of the several things that a probe looked at.
type Item struct {
	Name string `json:"name"`
	Result
}

// Probe is one question about the machine.
type Probe struct {
	Name  string // unique, stable, lower case; docs/check.md has an entry of this name
	Group string // heading under which it is shown
	// Fatal marks what must hold before `kedge server` starts anything. A fatal probe takes a few milliseconds.
	Fatal bool
	// Run must return when ctx ends and must leave nothing behind: no file, no mount, no device.
	Run func(ctx context.Context, o Options) Result

	alone bool // measures time, so nothing else runs beside it
}

// ProbeReport is the result of one probe.
type ProbeReport struct {
	Name    string        `json:"name"`
	Fatal   bool          `json:"fatal"`
	Elapsed time.Duration `json:"elapsedNanoseconds"`
	Result
}

// GroupReport is a heading and the probes under it.
type GroupReport struct {
	Name   string        `json:"name"`
	Status Status        `json:"status"`
	Probes []ProbeReport `json:"probes"`
}

// Report is the whole tree.
type Report struct {
	Host   string         `json:"host"`
	System string         `json:"system"` // operating system / architecture, kernel release
	Status Status         `json:"status"` // the worst of all
	Count  map[Status]int `json:"count"`
	Groups []GroupReport  `json:"groups"`
}

// Failed says whether any probe failed.
func (r Report) Failed() bool { return r.Status == Fail }

const (
	// probeTimeout is how long one probe may take. Ten seconds have to do for an emulated or very busy machine.
	probeTimeout = 10 * time.Second
	// parallel is how many probes run at the same time: they wait for the kernel more than they compute, but on a
	// small board too many at once would take each other's time and seem to hang.
	parallel = 4
)

// Run carries out all probes, those that do not disturb each other at the same time, and returns when all have ended
// or have used up their time. It takes about a second.
func Run(ctx context.Context, o Options) Report {
	var together, alone []Probe
	for _, p := range Probes() {
		if p.alone {
			alone = append(alone, p)
		} else {
			together = append(together, p)
		}
	}
	o = o.withDefaults()
	defer keepTimes(existing(o.DataDir))()
	results := runAll(ctx, together, o)
	for _, p := range alone {
		results[p.Name] = runOne(ctx, p, o, probeTimeout)
	}
	return newReport(Probes(), results)
}

// FatalError lists the probes that forbid a start.
type FatalError struct {
	Failures []ProbeReport
}

// Error gives every failure with its remedy, on several lines.
func (e *FatalError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "this machine cannot run Kedge as it is (%d failed):", len(e.Failures))
	for _, f := range e.Failures {
		for _, part := range failures(f) {
			fmt.Fprintf(&b, "\n- %s: %s", part.Name, part.Finding)
			for line := range strings.Lines(part.Remedy) {
				fmt.Fprintf(&b, "\n    %s", strings.TrimRight(line, "\n"))
			}
		}
	}
	b.WriteString("\n`kedge check` shows the whole picture")
	return b.String()
}

// failures gives the failed items of a probe, or the probe itself when it has none.
func failures(p ProbeReport) []Item {
	var failed []Item
	for _, item := range p.Items {
		if item.Status == Fail {
			item.Name = p.Name + " " + item.Name
			failed = append(failed, item)
		}
	}
	if len(failed) == 0 {
		failed = []Item{{Name: p.Name, Result: p.Result}}
	}
	return failed
}

// RunFatal carries out only the probes that must hold before anything is started, in some tens of milliseconds.
// The error is a *FatalError with all failures. What could not be probed does not count as failed.
func RunFatal(ctx context.Context, o Options) error {
	var fatal []Probe
	for _, p := range Probes() {
		if p.Fatal {
			fatal = append(fatal, p)
		}
	}
	results := runAll(ctx, fatal, o.withDefaults())
	var failed []ProbeReport
	for _, p := range fatal {
		if r := results[p.Name]; r.Status == Fail {
			failed = append(failed, r)
		}
	}
	if len(failed) > 0 {
		return &FatalError{Failures: failed}
	}
	return nil
}

func runAll(ctx context.Context, probes []Probe, o Options) map[string]ProbeReport {
	reports := make([]ProbeReport, len(probes))
	var group errgroup.Group
	group.SetLimit(parallel)
	for i, p := range probes {
		group.Go(func() error {
			reports[i] = runOne(ctx, p, o, probeTimeout)
			return nil
		})
	}
	group.Wait() // no error: what goes wrong is in the reports
	byName := make(map[string]ProbeReport, len(probes))
	for _, r := range reports {
		byName[r.Name] = r
	}
	return byName
}

// runOne carries out a probe with a time limit. A probe that hangs in the kernel (a dead NFS server under the data
// directory) cannot be ended by anybody: it is reported as unknown and its goroutine is left behind, which is the one
// exception to waiting for everything that was started.
func runOne(ctx context.Context, p Probe, o Options, limit time.Duration) ProbeReport {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	start := time.Now()
	done := make(chan Result, 1)
	go func() {
		defer func() {
			// A preflight that dies on a strange machine is of no use on just the machines that need it.
			if r := recover(); r != nil {
				done <- Result{Status: Unknown, Finding: fmt.Sprintf("the probe broke off: %v", r)}
			}
		}()
		done <- p.Run(ctx, o)
	}()
	report := ProbeReport{Name: p.Name, Fatal: p.Fatal}
	select {
	case report.Result = <-done:
	case <-ctx.Done():
		why := "interrupted"
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			why = fmt.Sprintf("no answer within %s", limit)
		}
		report.Result = Result{Status: Unknown, Finding: "could not be probed: " + why}
	}
	report.Elapsed = time.Since(start)
	return report
}

func newReport(probes []Probe, results map[string]ProbeReport) Report {
	host, _ := os.Hostname() // shown only
	r := Report{
		Host:   host,
		System: fmt.Sprintf("%s/%s, kernel %s", runtime.GOOS, runtime.GOARCH, kernelRelease()),
		Status: Pass,
		Count:  map[Status]int{},
	}
	group := map[string]int{}
	for _, p := range probes {
		i, seen := group[p.Group]
		if !seen {
			i = len(r.Groups)
			group[p.Group] = i
			r.Groups = append(r.Groups, GroupReport{Name: p.Group, Status: Pass})
		}
		result := results[p.Name]
		g := &r.Groups[i]
		g.Probes = append(g.Probes, result)
		g.Status = worst(g.Status, result.Status)
		r.Status = worst(r.Status, result.Status)
		r.Count[result.Status]++
	}
	return r
}

func (o Options) withDefaults() Options {
	o = o.withoutPorts()
	if o.Ports == nil {
		o.Ports = DefaultPorts(o, netip.AddrPort{})
	}
	return o
}

// withoutPorts sets every default but that of the ports, which depend on the others.
func (o Options) withoutPorts() Options {
	set := func(field *string, value string) {
		if *field == "" {
			*field = value
		}
	}
	set(&o.DataDir, "/var/lib/kedge")
	set(&o.KubeletDir, "/var/lib/kubelet")
	set(&o.LogDir, "/var/log")
	set(&o.ProxyMode, "auto")
	set(&o.FlannelBackend, "vxlan")
	set(&o.Snapshotter, "overlayfs")
	if len(o.ClusterCIDR) == 0 {
		o.ClusterCIDR = []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}
	}
	if len(o.ServiceCIDR) == 0 {
		o.ServiceCIDR = []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")}
	}
	if !o.DNSAddress.IsValid() {
		o.DNSAddress = netip.MustParseAddr("10.43.0.10")
	}
	if o.BuildDate.IsZero() {
		o.BuildDate = time.Date(2026, time.September, 1, 0, 0, 0, 0, time.UTC)
	}
	return o
}

// unprobed reports that a probe could not be carried out.
func unprobed(err error) Result {
	r := Result{Status: Unknown, Finding: "could not be probed: " + err.Error()}
	if os.Geteuid() != 0 && (errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EPERM)) {
		r.Finding = "could not be probed without root"
	}
	return r
}

// combine makes one result of several items: the worst status, and as the finding the items that have it, or summary
// when all is well.
func combine(items []Item, summary string) Result {
	r := Result{Status: Pass, Items: items, Finding: summary}
	for _, item := range items {
		r.Status = worst(r.Status, item.Status)
	}
	if r.Status == Pass {
		return r
	}
	var names []string
	for _, item := range items {
		if item.Status == r.Status {
			names = append(names, item.Name)
		}
	}
	r.Finding = strings.Join(names, ", ")
	return r
}
