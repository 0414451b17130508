// SPDX-License-Identifier: Apache-2.0

package check

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/prometheus/procfs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Port is one that Kedge listens on.
type Port struct {
	Port    int
	Proto   string     // tcp or udp
	Addr    netip.Addr // zero: all addresses
	Purpose string     // for the person who reads the finding
}

// String gives 6443/tcp, or 10.43.0.10:53/udp where only one address is meant.
func (p Port) String() string {
	if p.Addr.IsValid() && !p.Addr.IsUnspecified() {
		return net.JoinHostPort(p.Addr.String(), strconv.Itoa(p.Port)) + "/" + p.Proto
	}
	return fmt.Sprintf("%d/%s", p.Port, p.Proto)
}

// DefaultPorts gives the ports that a node with these options listens on; api is where the Kubernetes API listens, its
// zero value all addresses, port 6443. etcd's client port 2379 is not among them: it is a unix socket here.
func DefaultPorts(o Options, api netip.AddrPort) []Port {
	if api.Port() == 0 {
		api = netip.AddrPortFrom(api.Addr(), 6443)
	}
	balancer := o.BalancerPort
	if balancer == 0 {
		balancer = 6444
	}
	o = o.withoutPorts()
	var ports []Port
	if !o.Agent {
		ports = append(ports,
			Port{Port: int(api.Port()), Proto: "tcp", Addr: api.Addr(), Purpose: purposeAPI},
			Port{Port: 2380, Proto: "tcp", Purpose: "etcd between servers"})
	}
	ports = append(ports,
		Port{Port: balancer, Proto: "tcp", Addr: netip.MustParseAddr("127.0.0.1"), Purpose: "this node's way to the API servers"},
		Port{Port: 10250, Proto: "tcp", Purpose: "kubelet"})
	if o.ProxyMode != "none" {
		ports = append(ports, Port{Port: 10256, Proto: "tcp", Purpose: "health of the service proxy"})
	}
	if o.FlannelBackend == "vxlan" {
		ports = append(ports, Port{Port: 8472, Proto: "udp", Purpose: "VXLAN between nodes"})
	}
	return append(ports,
		Port{Port: 53, Proto: "udp", Addr: o.DNSAddress, Purpose: purposeDNS},
		Port{Port: 53, Proto: "tcp", Addr: o.DNSAddress, Purpose: purposeDNS})
}

const (
	purposeAPI = "Kubernetes API"
	purposeDNS = "cluster DNS"
)

// socket is a listener (TCP) or a bound, unconnected socket (UDP).
type socket struct {
	addr  netip.Addr
	port  int
	inode uint64
}

// portUse is what was found out about a port of Options.Ports.
type portUse struct {
	clashes []socket // in the way
	holders map[uint64]holder
}

// lookAtPorts finds what is in the way of listening on the ports of o, in their order.
func lookAtPorts(ctx context.Context, o Options) ([]portUse, error) {
	proc, err := procfs.NewDefaultFS()
	if err != nil {
		return nil, err
	}
	taken := map[string][]socket{}
	for _, proto := range []string{"tcp", "udp"} {
		if taken[proto], err = sockets("/proc/net", proto); err != nil {
			return nil, err
		}
	}
	uses := make([]portUse, len(o.Ports))
	wanted := map[uint64]bool{}
	for i, p := range o.Ports {
		clashes := clashing(p, taken[p.Proto])
		if len(clashes) == 0 {
			continue
		}
		// An IPv6 socket on all addresses may or may not cover IPv4; only the attempt tells.
		if err := tryBind(ctx, p); err == nil || !errors.Is(err, unix.EADDRINUSE) {
			continue
		}
		uses[i].clashes = clashes
		for _, s := range clashes {
			wanted[s.inode] = true
		}
	}
	if len(wanted) == 0 {
		return uses, nil
	}
	holders, err := socketHolders(proc, wanted)
	for i := range uses {
		uses[i].holders = holders
	}
	return uses, err
}

func probePorts(ctx context.Context, o Options) Result {
	uses, err := lookAtPorts(ctx, o)
	if err != nil {
		return unprobed(err)
	}
	items := make([]Item, len(o.Ports))
	for i, p := range o.Ports {
		items[i] = Item{Name: p.String(), Result: Result{Status: Pass, Finding: "free (" + p.Purpose + ")"}}
		if u := uses[i]; len(u.clashes) > 0 {
			_, held := u.holders[u.clashes[0].inode]
			if devices := vxlanDevices(p.Port); p.Proto == "udp" && !held && len(devices) > 0 {
				items[i].Result = judgeVXLANPort(devices)
			} else {
				items[i].Result = judgePort(p, u.clashes, u.holders, o.ExpectRunning)
			}
		}
	}
	return combine(items, portSummary(items))
}

// Lingering names the ports of o that are likely to be free in a moment, given that no Kedge runs on this machine: children of one that was killed
// hold them, or a process of which nothing is left but its files, or nobody that could be seen, which is so at the very end.
func Lingering(ctx context.Context, o Options) ([]string, error) {
	o = o.withDefaults()
	uses, err := lookAtPorts(ctx, o)
	if err != nil {
		return nil, err
	}
	var names []string
	for i, p := range o.Ports {
		if uses[i].lingers(p.Proto == "udp" && len(vxlanDevices(p.Port)) > 0) {
			names = append(names, p.String())
		}
	}
	return names, nil
}

// lingers: nothing that stays holds the port. kernel: sockets without a process are the kernel's.
func (u portUse) lingers(kernel bool) bool {
	return len(u.clashes) > 0 && !slices.ContainsFunc(u.clashes, func(s socket) bool {
		h, seen := u.holders[s.inode]
		return seen && !h.kedge && !h.ending || !seen && kernel
	})
}

// portSummary is what is said when nothing is wrong.
func portSummary(items []Item) string {
	var free, own []string
	for _, item := range items {
		if strings.HasPrefix(item.Finding, "free") {
			free = append(free, item.Name)
		} else {
			own = append(own, item.Name)
		}
	}
	var parts []string
	if len(own) > 0 {
		parts = append(parts, "in use by Kedge: "+strings.Join(own, ", "))
	}
	if len(free) > 0 {
		parts = append(parts, "free: "+strings.Join(free, ", "))
	}
	return strings.Join(parts, "; ")
}

// sockets reads /proc/net/{tcp,udp} and their IPv6 twins, which do not exist where IPv6 is off.
func sockets(procNet, proto string) ([]socket, error) {
	var found []socket
	for _, name := range []string{proto, proto + "6"} {
		path := filepath.Join(procNet, name)
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) && name != proto {
			continue
		}
		if err != nil {
			return nil, err
		}
		list, err := parseSockets(f, proto)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		found = append(found, list...)
	}
	return found, nil
}

// parseSockets reads proc_pid_net(5): "sl local_address rem_address st … inode …" with addresses as 32-bit words in
// the byte order of the machine. It gives listeners (TCP) or unconnected sockets (UDP). procfs has such a parser, too,
// but it breaks off on short lines.
func parseSockets(r io.Reader, proto string) ([]socket, error) {
	state := "0A" // TCP_LISTEN, include/net/tcp_states.h
	if proto == "udp" {
		state = "07" // TCP_CLOSE
	}
	var found []socket
	lines := bufio.NewScanner(r)
	lines.Scan() // the header
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 10 {
			return nil, fmt.Errorf("line %q has %d fields, less than 10", lines.Text(), len(fields))
		}
		if fields[3] != state {
			continue
		}
		local, err := parseSocketAddress(fields[1])
		if err != nil {
			return nil, err
		}
		inode, err := strconv.ParseUint(fields[9], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("inode: %w", err)
		}
		found = append(found, socket{addr: local.Addr(), port: int(local.Port()), inode: inode})
	}
	return found, lines.Err()
}

// parseSocketAddress takes 0100007F:192B for 127.0.0.1:6443.
func parseSocketAddress(text string) (netip.AddrPort, error) {
	hexAddr, hexPort, _ := strings.Cut(text, ":")
	raw, err := hex.DecodeString(hexAddr)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("address %q: %w", text, err)
	}
	for word := range slices.Chunk(raw, 4) {
		slices.Reverse(word) // amd64 and arm64 are little-endian
	}
	addr, ok := netip.AddrFromSlice(raw)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("address %q has %d bytes", text, len(raw))
	}
	port, err := strconv.ParseUint(hexPort, 16, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("port of %q: %w", text, err)
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), nil
}

// clashing gives the sockets that may stand in the way of listening on p.
func clashing(p Port, taken []socket) []socket {
	all := !p.Addr.IsValid() || p.Addr.IsUnspecified()
	return slices.DeleteFunc(slices.Clone(taken), func(s socket) bool {
		return s.port != p.Port || !all && !s.addr.IsUnspecified() && s.addr != p.Addr
	})
}

// tryBind binds and lets go at once. IP_FREEBIND, because the cluster DNS address is not on this machine yet.
func tryBind(ctx context.Context, p Port) error {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) }), err)
	}}
	host := ""
	if p.Addr.IsValid() {
		host = p.Addr.String()
	}
	address := net.JoinHostPort(host, strconv.Itoa(p.Port))
	if p.Proto == "udp" {
		c, err := lc.ListenPacket(ctx, "udp", address)
		if err != nil {
			return err
		}
		return c.Close()
	}
	l, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return l.Close()
}

// holder is a process that has a socket open.
type holder struct {
	pid    int
	name   string
	kedge  bool // the same program as this one
	ending bool // it has ended, but for its files
}

// socketHolders looks through the open files of all processes for sockets with these inodes. Without root the
// processes of others stay unseen.
func socketHolders(proc procfs.FS, inodes map[uint64]bool) (map[uint64]holder, error) {
	processes, err := proc.AllProcs()
	if err != nil {
		return nil, err
	}
	found := map[uint64]holder{}
	for _, p := range processes {
		targets, err := p.FileDescriptorTargets()
		if err != nil {
			continue // ended meanwhile, or not ours to see
		}
		for _, target := range targets {
			inode, ok := socketInode(target)
			if !ok || !inodes[inode] {
				continue
			}
			if _, known := found[inode]; !known {
				name := processName(p)
				// By name, too: the one that is checking may be a newer release, not yet installed.
				own := name == "kedge" || strings.HasPrefix(name, "kedge [") || sameProgram(p.PID)
				args, err := p.CmdLine() // goes with its memory, which goes first
				found[inode] = holder{pid: p.PID, name: name, kedge: own, ending: err == nil && len(args) == 0}
			}
		}
	}
	return found, nil
}

// socketInode takes the number out of "socket:[12345]".
func socketInode(target string) (uint64, bool) {
	number, ok := strings.CutPrefix(target, "socket:[")
	if !ok {
		return 0, false
	}
	inode, err := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 64)
	return inode, err == nil
}

func processName(p procfs.Proc) string {
	if args, err := p.CmdLine(); err == nil && len(args) > 0 && args[0] != "" {
		name := args[0]
		if strings.HasPrefix(name, "/") {
			name = name[strings.LastIndexByte(name, '/')+1:]
		}
		return name
	}
	if comm, err := p.Comm(); err == nil {
		return comm
	}
	return "?"
}

// sameProgram says whether a process runs this executable, or one of the same path that an update has replaced.
func sameProgram(pid int) bool {
	const self = "/proc/self/exe"
	other := fmt.Sprintf("/proc/%d/exe", pid)
	mine, err1 := os.Stat(self)
	theirs, err2 := os.Stat(other)
	if err1 == nil && err2 == nil && os.SameFile(mine, theirs) {
		return true
	}
	minePath, err1 := os.Readlink(self)
	theirPath, err2 := os.Readlink(other)
	const gone = " (deleted)"
	return err1 == nil && err2 == nil && strings.TrimSuffix(minePath, gone) == strings.TrimSuffix(theirPath, gone)
}

func judgePort(p Port, clashes []socket, holders map[uint64]holder, expectRunning bool) Result {
	var own, others []string
	for _, s := range clashes {
		h, known := holders[s.inode]
		switch {
		case known && h.kedge:
			own = append(own, fmt.Sprintf("%s, pid %d", h.name, h.pid))
		case known:
			others = append(others, fmt.Sprintf("%s (pid %d) on %s", h.name, h.pid, s.addr))
		default:
			others = append(others, "the kernel or an unseen process on "+s.addr.String())
		}
	}
	own, others = slices.Compact(own), slices.Compact(others)
	switch {
	case len(others) > 0:
		return Result{Status: Fail, Finding: fmt.Sprintf("wanted for %s, in use by %s", p.Purpose, strings.Join(others, ", ")), Remedy: portRemedy(p)}
	case expectRunning:
		return Result{Status: Pass, Finding: fmt.Sprintf("in use by a running kedge (%s)", strings.Join(own, "; "))}
	}
	return Result{Status: Warning, Finding: fmt.Sprintf("in use by a running kedge (%s)", strings.Join(own, "; ")),
		Remedy: "Kedge runs already on this machine:\n$ kedge status"}
}

func portRemedy(p Port) string {
	find := fmt.Sprintf("$ ss -ln%sp 'sport = :%d'\nthen stop that program or move it to another port", p.Proto[:1], p.Port)
	switch {
	case p.Purpose == purposeAPI:
		return find + ", or move Kedge:\n$ kedge server --https-listen-port PORT"
	case p.Purpose == purposeDNS:
		return find + fmt.Sprintf(".\nA DNS server may stay if it listens on its own addresses only, not on all (dnsmasq: bind-interfaces; "+
			"BIND: listen-on; unbound: interface; Pi-hole: listeningMode): %s must stay free for Kedge.", p.Addr)
	}
	return find + "."
}

// vxlanDevices gives the names of the VXLAN devices whose traffic uses a UDP port: their socket is the kernel's.
func vxlanDevices(port int) []string {
	links, err := netlink.LinkList()
	if err != nil {
		return nil
	}
	var names []string
	for _, link := range links {
		if v, ok := link.(*netlink.Vxlan); ok && v.Port == port {
			names = append(names, v.Attrs().Name)
		}
	}
	return names
}

// judgeVXLANPort: devices share the kernel's socket, as long as none of them takes all identifiers (Cilium's does).
func judgeVXLANPort(devices []string) Result {
	others := slices.DeleteFunc(slices.Clone(devices), func(name string) bool {
		return strings.HasPrefix(name, "flannel.") || strings.HasPrefix(name, "flannel-v6.")
	})
	if len(others) > 0 {
		return Result{Status: Warning, Finding: "in use by the VXLAN devices " + strings.Join(devices, ", "),
			Remedy: "If it is left over from another product, remove it:\n$ ip link delete " + strings.Join(others, "\n$ ip link delete ")}
	}
	return Result{Status: Pass, Finding: fmt.Sprintf("in use by %s, a VXLAN device that Kedge takes over", strings.Join(devices, ", "))}
}
