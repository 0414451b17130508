// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kedge-io/kedge/tests/testbed"
)

// host looks at a machine from outside, so that looking costs the machine nothing.
type host struct {
	name   string
	cgroup string // directory whose processes are the machine's
	cpu    string // file with the processor time
	scale  float64
	pid    int // of the machine's PID 1
	parent int // of that one, the test bed's too
}

// newHost finds the cgroups of a machine: the script machines says what they are called.
func newHost(bed *testbed.Bed, m *testbed.Machine) (*host, error) {
	var id int
	if _, err := fmt.Sscanf(bed.Gateway(), "10.%d.0.1", &id); err != nil {
		return nil, fmt.Errorf("number of the test bed from its gateway %s: %w", bed.Gateway(), err)
	}
	name := path.Join(fmt.Sprintf("kedge-testbed%d", id-100), m.Name())
	h := &host{name: m.Name(), cgroup: filepath.Join("/sys/fs/cgroup/cpuacct", name), scale: 1e9}
	h.cpu = filepath.Join(h.cgroup, "cpuacct.usage")
	if _, err := os.Stat(h.cgroup); errors.Is(err, fs.ErrNotExist) {
		h.cgroup, h.scale = filepath.Join("/sys/fs/cgroup", name), 1e6
		h.cpu = filepath.Join(h.cgroup, "cpu.stat")
	}
	pids, err := h.pids("cgroup.procs")
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		if status(pid, "NSpid") == fmt.Sprintf("%d\t1", pid) {
			h.pid = pid
			h.parent, err = strconv.Atoi(status(pid, "PPid"))
			return h, err
		}
	}
	return nil, fmt.Errorf("no PID 1 among the processes of %s", h.cgroup)
}

func (h *host) root() string { return fmt.Sprintf("/proc/%d/root", h.pid) }

// cpuSeconds is the processor time of the machine since it was booted.
func (h *host) cpuSeconds() (float64, error) {
	b, err := os.ReadFile(h.cpu)
	if err != nil {
		return 0, err
	}
	text := strings.TrimPrefix(string(b), "usage_usec ")
	first, _, _ := strings.Cut(text, "\n")
	n, err := strconv.ParseFloat(first, 64)
	return n / h.scale, err
}

// pids lists processes (cgroup.procs) or threads (tasks, cgroup.threads).
func (h *host) pids(file string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(h.cgroup, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || err == nil && !d.IsDir() {
			return nil
		}
		if err != nil {
			return err
		}
		b, err := os.ReadFile(filepath.Join(p, file))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil // a container's, just gone
		}
		for f := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil {
				pids = append(pids, pid)
			}
		}
		return err
	})
	slices.Sort(pids)
	return slices.Compact(pids), err
}

// process is one of the product's processes.
type process struct {
	pid   int
	start string // since boot: distinguishes it from a later one with the same pid
	name  string
}

// processes are all of the machine but the test bed's own and the stock side's stand-in for systemd.
func (h *host) processes() ([]process, error) {
	pids, err := h.pids("cgroup.procs")
	if err != nil {
		return nil, err
	}
	var list []process
	for _, pid := range pids {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil || len(cmdline) == 0 {
			continue // ended meanwhile
		}
		arg0, _, _ := strings.Cut(string(cmdline), "\x00")
		name := path.Base(arg0)
		if pid == h.pid || pid == h.parent || status(pid, "PPid") == strconv.Itoa(h.pid) && name == "sleep" || arg0 == unitsBin {
			continue
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		list = append(list, process{pid: pid, start: startTicks(string(stat)), name: name})
	}
	return list, nil
}

// userHZ is the unit of time in /proc, on every architecture that Kedge is for.
const userHZ = 100

// startTicks is the field starttime of proc_pid_stat(5).
func startTicks(stat string) string { return statFields(stat)[19] }

// cpuTicks is the sum of the fields utime and stime.
func cpuTicks(stat string) float64 {
	sum := 0.0
	for _, field := range statFields(stat)[11:13] {
		n, err := strconv.ParseFloat(field, 64)
		if err != nil {
			return 0
		}
		sum += n
	}
	return sum
}

// statFields are the fields from the state on: the name before it may contain anything.
func statFields(stat string) []string {
	return strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
}

// started returns when a process began that has this pid in the machine, to 10 ms: the test bed takes up to 100 ms before that.
func (h *host) started(inside int) (time.Time, error) {
	pids, err := h.pids("cgroup.procs")
	if err != nil {
		return time.Time{}, err
	}
	for _, pid := range pids {
		if status(pid, "NSpid") != fmt.Sprintf("%d\t%d", pid, inside) {
			continue
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			break
		}
		ticks, err := strconv.ParseInt(startTicks(string(stat)), 10, 64)
		if err != nil {
			return time.Time{}, err
		}
		var boot unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
			return time.Time{}, err
		}
		age := time.Duration(boot.Nano()) - time.Duration(ticks)*time.Second/userHZ
		return time.Now().Add(-age), nil
	}
	return time.Time{}, fmt.Errorf("process %d of the machine has ended at once", inside)
}

func status(pid int, key string) string { return keyed(fmt.Sprintf("/proc/%d/status", pid), key) }

// keyed reads the value of a line "key: value", empty when there is none.
func keyed(file, key string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(rest)
		}
	}
	return ""
}

// number reads the number of a line "key: 12 kB"; a process that has ended has none, which counts as 0.
func number(file, key string) float64 {
	first, _, _ := strings.Cut(keyed(file, key), " ")
	n, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return 0
	}
	return n
}

// Memory is what the processes of one name use together, of memory and processor.
type Memory struct {
	Name      string
	Processes int
	PSS       float64 // MiB
	Anonymous float64 // MiB, of the PSS
	CPU       float64 // seconds a minute
}

// memory reads what each process uses; the sum is first.
func (h *host) memory() ([]Memory, error) {
	list, err := h.processes()
	if err != nil {
		return nil, err
	}
	sum := Memory{Name: "all"}
	byName := map[string]*Memory{}
	for _, p := range list {
		file := fmt.Sprintf("/proc/%d/smaps_rollup", p.pid)
		pss, anon := number(file, "Pss")/1024, number(file, "Pss_Anon")/1024
		if byName[p.name] == nil {
			byName[p.name] = &Memory{Name: p.name}
		}
		for _, m := range []*Memory{&sum, byName[p.name]} {
			m.Processes++
			m.PSS += pss
			m.Anonymous += anon
		}
	}
	all := []Memory{sum}
	for _, m := range byName {
		all = append(all, *m)
	}
	slices.SortFunc(all[1:], func(a, b Memory) int { return int(b.PSS*1024) - int(a.PSS*1024) })
	return all, nil
}

// written is how many bytes each process has caused to be written to disks: write_bytes of proc_pid_io(5).
func (h *host) written() (map[process]float64, error) {
	return h.each(func(pid int) float64 { return number(fmt.Sprintf("/proc/%d/io", pid), "write_bytes") })
}

// cpuOf is the processor time of each process in seconds, to 10 ms.
func (h *host) cpuOf() (map[process]float64, error) {
	return h.each(func(pid int) float64 {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0 // ended meanwhile
		}
		return cpuTicks(string(stat)) / userHZ
	})
}

// each asks something of each process.
func (h *host) each(ask func(pid int) float64) (map[process]float64, error) {
	list, err := h.processes()
	if err != nil {
		return nil, err
	}
	answers := map[process]float64{}
	for _, p := range list {
		answers[p] = ask(p.pid)
	}
	return answers, nil
}

// device is the block device of the machine's /var.
type device struct {
	stat string
	root string
}

func (h *host) device() (*device, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", h.pid))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 5 && f[4] == "/var" {
			return &device{stat: filepath.Join("/sys/dev/block", f[2], "stat"), root: h.root()}, nil
		}
	}
	return nil, errors.New("the machine's /var is no mount point")
}

// counters writes everything that is waiting to the disk, and returns the bytes written and the flushes since boot.
func (d *device) counters() (bytes, flushes float64, err error) {
	f, err := os.Open(filepath.Join(d.root, "var"))
	if err != nil {
		return 0, 0, err
	}
	err = errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
	if err != nil {
		return 0, 0, fmt.Errorf("sync the machine's /var: %w", err)
	}
	b, err := os.ReadFile(d.stat)
	if err != nil {
		return 0, 0, err
	}
	// https://www.kernel.org/doc/html/latest/block/stat.html: write sectors, and flush requests, the 16th field.
	fields := strings.Fields(string(b))
	if len(fields) < 16 {
		return 0, 0, fmt.Errorf("%s has %d fields, not 16 or more", d.stat, len(fields))
	}
	sectors, err1 := strconv.ParseFloat(fields[6], 64)
	flushes, err2 := strconv.ParseFloat(fields[15], 64)
	return sectors * 512, flushes, errors.Join(err1, err2)
}
