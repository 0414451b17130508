// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/google/renameio/v2"
	miekg "github.com/miekg/dns"
)

const (
	etcResolvConf = "/etc/resolv.conf"
	// maxUpstreams is what CoreDNS's forward plugin takes.
	maxUpstreams = 15
	// maxKubeletServers is what the C library reads (MAXNS); the kubelet complains about more in an event for every pod.
	maxKubeletServers = 3
)

// fullResolvConfs are where local caching resolvers say whom they ask themselves: systemd-resolved and NetworkManager with dnsmasq.
func fullResolvConfs() []string {
	return []string{"/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf"}
}

// HostResolv is what a host's resolv.conf says.
type HostResolv struct {
	// Path is the file that was read.
	Path string
	// Nameservers can be asked, in the file's order.
	Nameservers []netip.Addr
	// Skipped are nameservers that cannot: loopback addresses (another thing in a pod, and a likely loop), the cluster DNS itself,
	// and what is no address.
	Skipped []string
	// Search are the search domains.
	Search []string
}

// HostResolvConf reads the host's resolv.conf at path. With an empty path it reads /etc/resolv.conf, or, if that names only resolvers on the
// loopback device (systemd-resolved's stub), the file in which those say whom they ask. Nameservers in clusterDNS are skipped. A missing
// file is an error that wraps [fs.ErrNotExist]; a file without nameservers is none.
func HostResolvConf(path string, clusterDNS ...netip.Addr) (HostResolv, error) {
	if path != "" {
		return readResolvConf(path, clusterDNS)
	}
	return chooseResolvConf(etcResolvConf, fullResolvConfs(), clusterDNS)
}

func chooseResolvConf(first string, others []string, clusterDNS []netip.Addr) (HostResolv, error) {
	r, err := readResolvConf(first, clusterDNS)
	if err == nil && (len(r.Nameservers) > 0 || len(r.Skipped) == 0) {
		return r, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r, err
	}
	for _, other := range others {
		if full, err := readResolvConf(other, clusterDNS); err == nil && len(full.Nameservers) > 0 {
			return full, nil
		}
	}
	return r, err
}

func readResolvConf(path string, clusterDNS []netip.Addr) (HostResolv, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return HostResolv{Path: path}, fmt.Errorf("read the host's resolvers: %w", err)
	}
	r, err := parseResolvConf(text, clusterDNS)
	if err != nil {
		return HostResolv{Path: path}, fmt.Errorf("read the host's resolvers: %s: %w", path, err)
	}
	r.Path = path
	return r, nil
}

// parseResolvConf reads the format of resolv.conf(5). Upstream parser, then a check of each address.
func parseResolvConf(text []byte, clusterDNS []netip.Addr) (HostResolv, error) {
	conf, err := miekg.ClientConfigFromReader(bytes.NewReader(text))
	if err != nil {
		return HostResolv{}, err
	}
	var r HostResolv
	for _, server := range conf.Servers {
		a, err := netip.ParseAddr(server)
		a = a.Unmap()
		switch {
		case err != nil, a.IsLoopback(), a.IsUnspecified(), a.IsMulticast(), slices.Contains(clusterDNS, a.WithZone("")), !validZone(a.Zone()):
			r.Skipped = append(r.Skipped, server)
		case !slices.Contains(r.Nameservers, a):
			r.Nameservers = append(r.Nameservers, a)
		}
	}
	for _, domain := range conf.Search {
		if _, ok := miekg.IsDomainName(domain); ok && domain != "." && !strings.ContainsFunc(domain, notInDomain) {
			r.Search = append(r.Search, domain)
		}
	}
	return r, nil
}

// validZone is whether the zone of an address can be a device's name and be written in a Corefile.
func validZone(zone string) bool {
	return !strings.ContainsFunc(zone, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`"{}%\#:[]/`, r) })
}

func notInDomain(r rune) bool {
	return !(r == '-' || r == '_' || r == '.' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z')
}

// upstreams returns the addresses to forward to, as many as CoreDNS takes.
func (r HostResolv) upstreams(addrPort func(netip.Addr) netip.AddrPort) []string {
	var out []string
	for _, a := range r.Nameservers[:min(len(r.Nameservers), maxUpstreams)] {
		out = append(out, addrPort(a).String())
	}
	return out
}

func dnsPort(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, DefaultPort) }

// WriteKubelet writes a resolv.conf for the kubelet's setting resolvConf: pods with dnsPolicy Default get its nameservers, and others its search
// domains after the cluster's. It has the usable nameservers (at most three; none is fine) and, if search is set, the host's search
// domains. Without them a wildcard record in the host's domain cannot catch the names that pods look up. The file is replaced atomically
// and left alone when nothing changed.
func (r HostResolv) WriteKubelet(path string, search bool) error {
	var b strings.Builder
	b.WriteString("# Written by Kedge for pods, from " + r.Path + ".\n")
	for _, a := range r.Nameservers[:min(len(r.Nameservers), maxKubeletServers)] {
		b.WriteString("nameserver " + a.String() + "\n")
	}
	if search && len(r.Search) > 0 {
		b.WriteString("search " + strings.Join(r.Search, " ") + "\n")
	}
	return writeIfChanged(path, b.String())
}

func writeIfChanged(path, text string) error {
	if old, err := os.ReadFile(path); err == nil && string(old) == text {
		return nil
	}
	return renameio.WriteFile(path, []byte(text), 0o644)
}
