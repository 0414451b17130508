// SPDX-License-Identifier: Apache-2.0

package check

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-units"
	"github.com/google/nftables"
	"github.com/moby/sys/capability"
	"github.com/moby/sys/mountinfo"
	"github.com/prometheus/procfs"
)

// want is what a judgement must be: the status, and words that the finding and the remedy must hold.
type want struct {
	status  Status
	finding string
	remedy  string
}

func (w want) check(t *testing.T, got Result) {
	t.Helper()
	if got.Status != w.status || !strings.Contains(got.Finding, w.finding) || !strings.Contains(got.Remedy, w.remedy) {
		t.Errorf("got %s: %q, remedy %q\nwant %s with %q, remedy with %q", got.Status, got.Finding, got.Remedy, w.status, w.finding, w.remedy)
	}
	if (got.Status == Fail || got.Status == Warning) && got.Remedy == "" {
		t.Errorf("%s without a remedy: %s", got.Status, got.Finding)
	}
}

func TestJudgeCapabilities(t *testing.T) {
	known := []capability.Cap{capability.CAP_SYS_ADMIN, capability.CAP_NET_ADMIN, capability.CAP_SYS_RESOURCE, capability.CAP_SYS_TIME}
	for name, test := range map[string]struct {
		missing []capability.Cap
		want    want
	}{
		"all":          {nil, want{Pass, "all 4", ""}},
		"needed":       {[]capability.Cap{capability.CAP_NET_ADMIN, capability.CAP_SYS_TIME}, want{Fail, "missing CAP_NET_ADMIN: ", "--privileged"}},
		"sys_resource": {[]capability.Cap{capability.CAP_SYS_RESOURCE}, want{Warning, "oom_score_adj", "all capabilities"}},
		"sys_time":     {[]capability.Cap{capability.CAP_SYS_TIME}, want{Warning, "missing CAP_SYS_TIME", ""}},
	} {
		t.Run(name, func(t *testing.T) {
			test.want.check(t, judgeCapabilities(known, func(c capability.Cap) bool { return !slices.Contains(test.missing, c) }))
		})
	}
}

func TestJudgeMemory(t *testing.T) {
	for name, test := range map[string]struct {
		total uint64
		agent bool
		want  want
	}{
		"board sold with 1 GiB": {units.GiB - 64*units.MiB, false, want{Pass, "960 MiB", ""}},
		"768 MiB":               {768 * units.MiB, false, want{Warning, "little is left", ""}},
		"256 MiB":               {256 * units.MiB, false, want{Warning, "OOM", ""}},
		"512 MiB agent":         {512 * units.MiB, true, want{Pass, "512 MiB", ""}},
	} {
		t.Run(name, func(t *testing.T) { test.want.check(t, judgeMemory(test.total, test.total/2, test.agent)) })
	}
}

func TestJudgeSwap(t *testing.T) {
	want{Pass, "none", ""}.check(t, judgeSwap(nil))
	want{Warning, "/var/swap (100 MiB, 1 MiB used)", "swapoff -a"}.check(t, judgeSwap([]*procfs.Swap{{Filename: "/var/swap", Size: 100 << 10, Used: 1 << 10}}))
	want{Info, "compressed memory", ""}.check(t, judgeSwap([]*procfs.Swap{{Filename: "/dev/zram0", Size: 100 << 10}}))
}

func TestJudgeClock(t *testing.T) {
	built := time.Date(2026, 9, 1, 0, 0, 0, 0, time.UTC)
	for name, test := range map[string]struct {
		now    time.Time
		synced bool
		want   want
	}{
		"right":    {built.AddDate(1, 0, 0), true, want{Pass, "2027-09-01 00:00:00 UTC, synchronised, error at most 1ms", ""}},
		"unsynced": {built.AddDate(1, 0, 0), false, want{Warning, "STA_UNSYNC", "set-ntp"}},
		"no rtc":   {time.Unix(0, 0), true, want{Fail, "1970-01-01 00:00:00 UTC is before", "date -s"}},
		"future":   {built.AddDate(30, 0, 0), true, want{Fail, "2056", "date -s"}},
	} {
		t.Run(name, func(t *testing.T) {
			test.want.check(t, judgeClock(test.now, built, test.synced, ", error at most 1ms"))
		})
	}
}

func TestJudgeNodeName(t *testing.T) {
	for name, test := range map[string]struct {
		configured, host string
		want             want
	}{
		"host name":    {"", "edge-1.example.org", want{Pass, "edge-1.example.org", ""}},
		"capitals":     {"", "RaspberryPi", want{Warning, `"raspberrypi"`, "hostnamectl set-hostname raspberrypi"}},
		"underscore":   {"", "my_board", want{Fail, `"my_board"`, "--node-name"}},
		"empty":        {"", "", want{Fail, `""`, "--node-name"}},
		"loaded":       {"raspberrypi", "RaspberryPi", want{Warning, `"raspberrypi"`, "hostnamectl"}},
		"configured":   {"n1", "my_board", want{Pass, "n1 (from --node-name)", ""}},
		"bad override": {"N1", "host", want{Fail, `"N1" (from --node-name)`, ""}},
		"localhost":    {"", "localhost.localdomain", want{Warning, "second machine", ""}},
		"too long":     {"", strings.Repeat("a", 40) + "." + strings.Repeat("b", 40), want{Fail, "kubernetes.io/hostname", ""}},
	} {
		t.Run(name, func(t *testing.T) { test.want.check(t, judgeNodeName(test.configured, test.host)) })
	}
}

func TestJudgeKernel(t *testing.T) {
	for release, w := range map[string]want{
		"6.18.44-fc-v657":      {Pass, "6.18.44", ""},
		"5.10.0-30-amd64":      {Warning, "5.13", "--proxy-mode"},
		"3.10.0-1160.el7":      {Fail, "older than 4.19", ""},
		"not a kernel release": {Unknown, "", ""},
	} {
		t.Run(release, func(t *testing.T) { w.check(t, judgeKernel(release, "auto")) })
	}
	want{Pass, "5.10", ""}.check(t, judgeKernel("5.10.0-30-amd64", "ipvs"))
}

func TestJudgeCgroups(t *testing.T) {
	v1 := strings.Fields("cpu cpuacct cpuset memory devices pids freezer blkio")
	without := func(list []string, name string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return s == name })
	}
	v2 := strings.Fields("cpuset cpu io memory pids")
	for name, test := range map[string]struct {
		state cgroupState
		want  want
	}{
		"v2":           {cgroupState{unified: true, mounted: v2}, want{Pass, "version 2: cpuset cpu io memory pids", ""}},
		"raspberry pi": {cgroupState{unified: true, mounted: without(v2, "memory"), kernel: map[string]bool{"memory": false}}, want{Fail, "lacks memory", "cgroup_enable=memory"}},
		"newer pi":     {cgroupState{unified: true, mounted: without(v2, "memory")}, want{Fail, "lacks memory", "cgroup_enable=memory"}},
		"not handed":   {cgroupState{unified: true, mounted: without(v2, "pids")}, want{Fail, "lacks pids", "cgroup.controllers"}},
		"no cpuset":    {cgroupState{unified: true, mounted: without(v2, "cpuset")}, want{Warning, "lacks cpuset", ""}},
		"read-only":    {cgroupState{unified: true, mounted: v2, refused: map[string]string{"/sys/fs/cgroup": "read-only file system"}}, want{Fail, "read-only", "--cgroupns=private"}},
		"v1":           {cgroupState{mounted: v1}, want{Warning, "deprecated", "unified_cgroup_hierarchy"}},
		"v1 no cpuset": {cgroupState{mounted: without(v1, "cpuset"), kernel: map[string]bool{"cpuset": true}}, want{Fail, "lacks cpuset", "mount -t cgroup -o cpuset"}},
		"v1 no blkio":  {cgroupState{mounted: without(v1, "blkio")}, want{Warning, "lacks blkio", "built without"}},
		"nothing":      {cgroupState{}, want{Fail, "no control group", "mount -t cgroup2"}},
	} {
		t.Run(name, func(t *testing.T) { test.want.check(t, judgeCgroups(test.state)) })
	}
}

func TestJudgeLimits(t *testing.T) {
	want{Pass, "8192 instances", ""}.check(t, judgeInotify(8192, 1<<20))
	want{Info, "128 instances", "max_user_instances=1024"}.check(t, judgeInotify(128, 1<<20))
	want{Warning, "64 instances", "max_user_instances=1024"}.check(t, judgeInotify(64, 1<<20))
	want{Warning, "1024 watches", "max_user_watches"}.check(t, judgeInotify(8192, 1024))
	want{Pass, "1048576", ""}.check(t, judgeOpenFiles(1<<20))
	want{Warning, "20000", "LimitNOFILE"}.check(t, judgeOpenFiles(20000))
	want{Pass, "10 of 262144", ""}.check(t, judgeConntrack(10, 262144, true))
	want{Warning, "soon be dropped", "nf_conntrack_max"}.check(t, judgeConntrack(7000, 8192, true))
	want{Info, "cannot be raised", "nf_conntrack_max"}.check(t, judgeConntrack(10, 8192, false))
}

func TestJudgeDataDir(t *testing.T) {
	for name, test := range map[string]struct {
		mount mountinfo.Info
		want  want
	}{
		"ext4":      {mountinfo.Info{FSType: "ext4", Options: "rw,relatime", VFSOptions: "rw"}, want{Pass, "/data is on ext4, mounted at /", ""}},
		"read-only": {mountinfo.Info{FSType: "ext4", Options: "rw,relatime", VFSOptions: "ro"}, want{Fail, "read-only", "remount,rw /"}},
		"noexec":    {mountinfo.Info{FSType: "ext4", Options: "rw,noexec"}, want{Fail, "noexec", "remount,exec /"}},
		"nosuid":    {mountinfo.Info{FSType: "xfs", Options: "rw,nosuid"}, want{Warning, "setuid", "remount,suid"}},
		"nfs":       {mountinfo.Info{FSType: "nfs4", Options: "rw"}, want{Fail, "nfs4", "--data-dir"}},
		"vfat":      {mountinfo.Info{FSType: "vfat", Options: "rw"}, want{Fail, "vfat", "--data-dir"}},
		"tmpfs":     {mountinfo.Info{FSType: "tmpfs", Options: "rw"}, want{Warning, "lost", "--data-dir"}},
		"fuse":      {mountinfo.Info{FSType: "fuse.sshfs", Options: "rw"}, want{Warning, "slow", "--data-dir"}},
	} {
		t.Run(name, func(t *testing.T) {
			test.mount.Mountpoint = "/"
			test.want.check(t, judgeDataDir("/data", &test.mount))
		})
	}
}

func TestJudgePropagation(t *testing.T) {
	want{Pass, "/ is shared", ""}.check(t, judgePropagation(&mountinfo.Info{Mountpoint: "/", Optional: "shared:1 master:2"}))
	want{Warning, "not a shared", "--make-rshared /"}.check(t, judgePropagation(&mountinfo.Info{Mountpoint: "/", Optional: "master:2"}))
}

func TestJudgeSpace(t *testing.T) {
	base := spaceState{dirs: []string{"/var/lib/kedge"}, total: 100 * units.GiB, fail: units.GiB, warn: 5 * units.GiB, inodesTotal: 1 << 20, inodesFree: 1 << 19}
	for name, test := range map[string]struct {
		free, inodes uint64
		want         want
	}{
		"room":      {50 * units.GiB, 1 << 19, want{Pass, "50 GiB free of 100 GiB", ""}},
		"little":    {3 * units.GiB, 1 << 19, want{Warning, "less than 5 GiB", "du -xh"}},
		"full":      {100 * units.MiB, 1 << 19, want{Fail, "1 GiB", "du -xh"}},
		"inodes":    {50 * units.GiB, 100, want{Fail, "100 of 1048576 inodes", "du -xh"}},
		"inodes 2%": {50 * units.GiB, 20000, want{Warning, "20000 of", "du -xh"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := base
			s.free, s.inodesFree = test.free, test.inodes
			test.want.check(t, judgeSpace(s))
		})
	}
	s := base
	s.free, s.inodesFree, s.inodesTotal = 50*units.GiB, 0, 0 // btrfs has no inode table
	want{Pass, "", ""}.check(t, judgeSpace(s))
}

func TestJudgeFsync(t *testing.T) {
	series := func(usual, slow time.Duration) []time.Duration {
		l := slices.Repeat([]time.Duration{usual}, 98)
		return append([]time.Duration{slow, slow}, l...)
	}
	for name, test := range map[string]struct {
		latencies []time.Duration
		want      want
	}{
		"ssd":        {series(400*time.Microsecond, 2*time.Millisecond), want{Pass, "median 400µs, 99% within 2ms (100 synced writes)", ""}},
		"sufficient": {series(3*time.Millisecond, 15*time.Millisecond), want{Pass, "sufficient", ""}},
		"hard disk":  {series(9*time.Millisecond, 40*time.Millisecond), want{Warning, "99% within 40ms", "SSD"}},
		"sd card":    {series(20*time.Millisecond, 300*time.Millisecond), want{Warning, "far too slow", "SD cards"}},
		"one":        {[]time.Duration{2 * time.Second}, want{Warning, "99% within 2s (1 synced", "SD cards"}},
	} {
		t.Run(name, func(t *testing.T) { test.want.check(t, judgeFsync("/var/lib", test.latencies)) })
	}
}

func TestJudgeRanges(t *testing.T) {
	o := Options{}.withDefaults()
	prefix := netip.MustParsePrefix
	for name, test := range map[string]struct {
		routes []route
		want   want
	}{
		"home":        {[]route{{prefix("192.168.1.0/24"), "eth0"}, {prefix("10.0.0.0/24"), "eth1"}}, want{Pass, "", ""}},
		"own devices": {[]route{{prefix("10.42.1.0/24"), "flannel.1"}, {prefix("10.42.0.7/32"), "veth0f3a"}}, want{Pass, "", ""}},
		"LAN in pods": {[]route{{prefix("10.42.8.0/24"), "eth0"}}, want{Warning, "10.42.8.0/24 by eth0", "--cluster-cidr"}},
		"VPN":         {[]route{{prefix("10.0.0.0/8"), "wg0"}}, want{Warning, "10.0.0.0/8 by wg0", "--cluster-cidr"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := judgeRanges(o, test.routes)
			if got.Status == Warning {
				checkWorst(t, got)
			}
			for _, item := range got.Items {
				if item.Name == "pods" {
					test.want.check(t, item.Result)
				}
			}
		})
	}
}

// checkWorst checks that a result of items is as bad as its worst item.
func checkWorst(t *testing.T, r Result) {
	t.Helper()
	if !slices.ContainsFunc(r.Items, func(i Item) bool { return i.Status == r.Status }) {
		t.Errorf("status %s comes from none of the items %+v", r.Status, r.Items)
	}
}

func TestJudgeResolvers(t *testing.T) {
	addrs := func(list ...string) (out []netip.Addr) {
		for _, s := range list {
			out = append(out, netip.MustParseAddr(s))
		}
		return out
	}
	const etc, stub = "/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"
	for name, test := range map[string]struct {
		first, instead resolvers
		missing        bool
		want           want
	}{
		"router":        {first: resolvers{path: etc, usable: addrs("192.168.1.1", "fe80::1%eth0")}, want: want{Pass, "192.168.1.1, fe80::1%eth0", ""}},
		"resolved":      {first: resolvers{path: etc, local: addrs("127.0.0.53")}, instead: resolvers{path: stub, usable: addrs("192.168.1.1")}, want: want{Info, "192.168.1.1 from " + stub, ""}},
		"dnsmasq":       {first: resolvers{path: etc, local: addrs("127.0.0.1")}, want: want{Warning, "names only 127.0.0.1", "--resolv-conf"}},
		"both":          {first: resolvers{path: etc, local: addrs("::1"), usable: addrs("9.9.9.9")}, want: want{Info, "9.9.9.9; ::1 is this machine", ""}},
		"empty":         {first: resolvers{path: etc}, want: want{Warning, "names no server", "nameserver"}},
		"missing":       {first: resolvers{path: etc}, missing: true, want: want{Warning, "does not exist", "nameserver"}},
		"dangling link": {first: resolvers{path: etc}, missing: true, instead: resolvers{path: stub, usable: addrs("192.168.1.1")}, want: want{Info, stub, ""}},
	} {
		t.Run(name, func(t *testing.T) { test.want.check(t, judgeResolvers(test.first, test.instead, test.missing)) })
	}
}

func TestJudgePort(t *testing.T) {
	any4 := netip.IPv4Unspecified()
	api := Port{Port: 6443, Proto: "tcp", Purpose: purposeAPI}
	dns := Port{Port: 53, Proto: "udp", Addr: netip.MustParseAddr("10.43.0.10"), Purpose: purposeDNS}
	holders := map[uint64]holder{7: {pid: 12, name: "k3s"}, 8: {pid: 99, name: "kedge [controlplane]", kedge: true}}
	for name, test := range map[string]struct {
		port    Port
		inode   uint64
		running bool
		want    want
	}{
		"other":           {api, 7, true, want{Fail, "wanted for Kubernetes API, in use by k3s (pid 12) on 0.0.0.0", "--https-listen-port"}},
		"unseen":          {api, 9, true, want{Fail, "the kernel or an unseen process", "ss -lntp 'sport = :6443'"}},
		"own, expected":   {api, 8, true, want{Pass, "in use by a running kedge (kedge [controlplane], pid 99)", ""}},
		"own, unexpected": {api, 8, false, want{Warning, "in use by a running kedge", "kedge status"}},
		"dns server":      {dns, 7, true, want{Fail, "wanted for cluster DNS", "10.43.0.10 must stay free"}},
		"udp":             {Port{Port: 8472, Proto: "udp", Purpose: "VXLAN"}, 7, true, want{Fail, "k3s", "ss -lnup"}},
	} {
		t.Run(name, func(t *testing.T) {
			test.want.check(t, judgePort(test.port, []socket{{addr: any4, port: test.port.Port, inode: test.inode}}, holders, test.running))
		})
	}
	want{Pass, "flannel.1", ""}.check(t, judgeVXLANPort([]string{"flannel.1"}))
	want{Pass, "flannel.1, flannel-v6.1", ""}.check(t, judgeVXLANPort([]string{"flannel.1", "flannel-v6.1"}))
	want{Warning, "flannel.1, cilium_vxlan", "$ ip link delete cilium_vxlan"}.check(t, judgeVXLANPort([]string{"flannel.1", "cilium_vxlan"}))
	want{Warning, "cilium_vxlan", "ip link delete cilium_vxlan"}.check(t, judgeVXLANPort([]string{"cilium_vxlan"}))
}

func TestClashing(t *testing.T) {
	addr := netip.MustParseAddr
	taken := []socket{
		{addr("0.0.0.0"), 6443, 1}, {addr("127.0.0.53"), 53, 2}, {addr("192.168.1.2"), 53, 3}, {addr("::"), 53, 4}, {addr("127.0.0.1"), 2380, 5},
	}
	for name, test := range map[string]struct {
		port Port
		want []uint64
	}{
		"all against all":       {Port{Port: 6443}, []uint64{1}},
		"one against all":       {Port{Port: 6443, Addr: addr("10.0.0.1")}, []uint64{1}},
		"one against others":    {Port{Port: 53, Addr: addr("10.43.0.10")}, []uint64{4}},
		"all against one":       {Port{Port: 2380}, []uint64{5}},
		"unspecified means all": {Port{Port: 2380, Addr: addr("::")}, []uint64{5}},
		"free":                  {Port{Port: 10250}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var got []uint64
			for _, s := range clashing(test.port, taken) {
				got = append(got, s.inode)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got sockets %v, want %v", got, test.want)
			}
		})
	}
}

func TestDefaultPorts(t *testing.T) {
	list := func(ports []Port) string {
		var s []string
		for _, p := range ports {
			s = append(s, p.String())
		}
		return strings.Join(s, " ")
	}
	for name, test := range map[string]struct {
		options Options
		api     netip.AddrPort
		want    string
	}{
		"server":  {Options{}, netip.AddrPort{}, "6443/tcp 2380/tcp 127.0.0.1:6444/tcp 10250/tcp 10256/tcp 8472/udp 10.43.0.10:53/udp 10.43.0.10:53/tcp"},
		"agent":   {Options{Agent: true}, netip.AddrPort{}, "127.0.0.1:6444/tcp 10250/tcp 10256/tcp 8472/udp 10.43.0.10:53/udp 10.43.0.10:53/tcp"},
		"host-gw": {Options{FlannelBackend: "host-gw", ProxyMode: "none"}, netip.MustParseAddrPort("10.0.0.1:443"), "10.0.0.1:443/tcp 2380/tcp 127.0.0.1:6444/tcp 10250/tcp 10.43.0.10:53/udp 10.43.0.10:53/tcp"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := list(DefaultPorts(test.options, test.api)); got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
		})
	}
}

func TestJudgeNeighbours(t *testing.T) {
	want{Pass, "no other", ""}.check(t, judgeKubernetes([]process{{1, "dockerd"}}))
	want{Fail, "k3s-server (k3s, pid 7)", "systemctl disable --now k3s\n"}.check(t, judgeKubernetes([]process{{7, "k3s-server"}}))
	want{Fail, "MicroK8s", "snap disable"}.check(t, judgeKubernetes([]process{{7, "kubelite"}}))
	want{Info, "Docker, containerd runs beside", ""}.check(t, judgeContainers([]process{{1, "dockerd"}, {2, "containerd"}, {3, "containerd"}}))
	want{Pass, "none", ""}.check(t, judgeContainers(nil))

	o := Options{}.withDefaults()
	want{Pass, "none found", ""}.check(t, judgeFirewall(firewallState{}, o))
	want{Warning, "firewalld", "--add-port=6443/tcp --add-port=2380/tcp --add-port=10250/tcp --add-port=10256/tcp --add-port=8472/udp\n$ firewall-cmd --permanent --zone=trusted --add-source=10.42.0.0/16"}.
		check(t, judgeFirewall(firewallState{firewalld: true}, o))
	want{Warning, "ufw", "ufw allow 6443/tcp && "}.check(t, judgeFirewall(firewallState{ufw: true}, o))
	want{Warning, "filter/FORWARD", "ip-forward-no-drop"}.check(t, judgeFirewall(firewallState{drops: []string{"filter/FORWARD"}, docker: true}, o))
	want{Warning, "inet/input", "8472/udp"}.check(t, judgeFirewall(firewallState{drops: []string{"inet/input"}}, o))
}

func TestDroppingChain(t *testing.T) {
	drop, accept := nftables.ChainPolicyDrop, nftables.ChainPolicyAccept
	table := &nftables.Table{Name: "filter"}
	for name, test := range map[string]struct {
		chain nftables.Chain
		want  bool
	}{
		"forward drops":  {nftables.Chain{Table: table, Hooknum: nftables.ChainHookForward, Policy: &drop}, true},
		"input accepts":  {nftables.Chain{Table: table, Hooknum: nftables.ChainHookInput, Policy: &accept}, false},
		"output drops":   {nftables.Chain{Table: table, Hooknum: nftables.ChainHookOutput, Policy: &drop}, false},
		"regular chain":  {nftables.Chain{Table: table}, false},
		"Kedge's policy": {nftables.Chain{Table: &nftables.Table{Name: "kedge-netpolicy"}, Hooknum: nftables.ChainHookForward, Policy: &drop}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := droppingChain(&test.chain); got != test.want {
				t.Errorf("got %t, want %t", got, test.want)
			}
		})
	}
}

func TestConfiguration(t *testing.T) {
	want{Pass, "accepted", ""}.check(t, probeConfiguration(t.Context(), Options{}))
	want{Fail, "--a: bad; --b: bad", "Correct"}.check(t, probeConfiguration(t.Context(), Options{ConfigErr: errors.Join(errors.New("--a: bad"), errors.New("--b: bad"))}))
}

// After a Kedge was killed its children's ports are waited for, and nobody else's.
func TestLingers(t *testing.T) {
	clash := func(inodes ...uint64) (list []socket) {
		for _, inode := range inodes {
			list = append(list, socket{addr: netip.IPv6Unspecified(), port: 6443, inode: inode})
		}
		return list
	}
	holders := map[uint64]holder{
		1: {pid: 1, name: "kedge [controlplane]", kedge: true},
		2: {pid: 2, name: "exe", ending: true},
		3: {pid: 3, name: "nginx"},
	}
	for _, test := range []struct {
		name   string
		use    portUse
		kernel bool
		want   bool
	}{
		{"free", portUse{}, false, false},
		{"a child of Kedge", portUse{clash(1), holders}, false, true},
		{"a process without memory", portUse{clash(2), holders}, false, true},
		{"nobody to be seen", portUse{clash(4), holders}, false, true},
		{"all of them", portUse{clash(1, 2, 4), holders}, false, true},
		{"another program", portUse{clash(3), holders}, false, false},
		{"another program, too", portUse{clash(1, 3), holders}, false, false},
		{"a VXLAN device", portUse{clash(4), nil}, true, false},
	} {
		if got := test.use.lingers(test.kernel); got != test.want {
			t.Errorf("%s: %t", test.name, got)
		}
	}
}
