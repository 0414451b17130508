// SPDX-License-Identifier: Apache-2.0

package check

// The groups, in the order in which they are shown.
const (
	groupMachine    = "Machine"
	groupKernel     = "Kernel"
	groupStorage    = "Storage"
	groupNetwork    = "Network"
	groupNeighbours = "Other software"
)

// Probes gives all probes in the order in which they are shown.
func Probes() []Probe {
	return []Probe{
		{Name: "configuration", Group: groupMachine, Fatal: true, Run: probeConfiguration},
		{Name: "root", Group: groupMachine, Fatal: true, Run: probeRoot},
		{Name: "capabilities", Group: groupMachine, Fatal: true, Run: probeCapabilities},
		{Name: "cpu", Group: groupMachine, Fatal: true, Run: probeCPU},
		{Name: "memory", Group: groupMachine, Run: probeMemory},
		{Name: "swap", Group: groupMachine, Run: probeSwap},
		{Name: "clock", Group: groupMachine, Fatal: true, Run: probeClock},
		{Name: "node-name", Group: groupMachine, Fatal: true, Run: probeNodeName},

		{Name: "kernel", Group: groupKernel, Fatal: true, Run: probeKernel},
		{Name: "cgroups", Group: groupKernel, Fatal: true, Run: probeCgroups},
		{Name: "namespaces", Group: groupKernel, Fatal: true, Run: probeNamespaces},
		{Name: "user-namespaces", Group: groupKernel, Run: probeUserNamespaces},
		{Name: "seccomp", Group: groupKernel, Run: probeSeccomp},
		{Name: "security-module", Group: groupKernel, Run: probeSecurityModule},
		{Name: "kmsg", Group: groupKernel, Fatal: true, Run: probeKmsg},
		{Name: "sysctls", Group: groupKernel, Fatal: true, Run: probeSysctls},
		{Name: "inotify", Group: groupKernel, Run: probeInotify},
		{Name: "open-files", Group: groupKernel, Run: probeOpenFiles},

		{Name: "data-dir", Group: groupStorage, Fatal: true, Run: probeDataDir},
		{Name: "disk-space", Group: groupStorage, Fatal: true, Run: probeDiskSpace},
		{Name: "overlayfs", Group: groupStorage, Fatal: true, Run: probeOverlay},
		{Name: "mount-propagation", Group: groupStorage, Run: probeMountPropagation},
		{Name: "fsync", Group: groupStorage, Run: probeFsync, alone: true},

		{Name: "ports", Group: groupNetwork, Fatal: true, Run: probePorts},
		{Name: "address-ranges", Group: groupNetwork, Run: probeAddressRanges},
		{Name: "resolv-conf", Group: groupNetwork, Run: probeResolvConf},
		{Name: "veth", Group: groupNetwork, Run: probeVeth},
		{Name: "vxlan", Group: groupNetwork, Run: probeVXLAN},
		{Name: "wireguard", Group: groupNetwork, Run: probeWireGuard},
		{Name: "nftables", Group: groupNetwork, Run: probeNFTables},
		{Name: "ipvs", Group: groupNetwork, Run: probeIPVS},
		{Name: "conntrack", Group: groupNetwork, Run: probeConntrack},
		{Name: "br-netfilter", Group: groupNetwork, Run: probeBrNetfilter},

		{Name: "firewall", Group: groupNeighbours, Run: probeFirewall},
		{Name: "kubernetes", Group: groupNeighbours, Fatal: true, Run: probeOtherKubernetes},
		{Name: "containers", Group: groupNeighbours, Run: probeOtherContainers},
	}
}
