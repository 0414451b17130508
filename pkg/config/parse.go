// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"k8s.io/apimachinery/pkg/api/validate/content"
	"k8s.io/apimachinery/pkg/util/validation"
	kubeletapis "k8s.io/kubelet/pkg/apis"
	"k8s.io/kubernetes/pkg/util/taints"
)

type (
	addr     = netip.Addr
	addrList = []netip.Addr
	fileMode = fs.FileMode
)

// maxSocketDir leaves room for a name in the 107 bytes of a unix socket's path (unix(7)).
const maxSocketDir = 64

func nonEmpty(s string) (string, error) {
	if strings.TrimSpace(s) == "" {
		return "", errors.New("is empty; leave it out to get the default")
	}
	return s, nil
}

func boolText(s string) (bool, error) {
	b, err := strconv.ParseBool(s)
	if err != nil {
		return false, fmt.Errorf("%q is not a truth value; accepted: true, false", s)
	}
	return b, nil
}

func oneOf[T ~string](accepted ...T) func(string) (T, error) {
	return func(s string) (T, error) {
		names := make([]string, len(accepted))
		for i, a := range accepted {
			if s == string(a) {
				return a, nil
			}
			names[i] = string(a)
		}
		return "", fmt.Errorf("%q is unknown%s; accepted: %s", s, didYouMean(s, names), strings.Join(names, ", "))
	}
}

// hinted puts the answer to a value that other distributions know in front of the list of what is accepted.
func hinted[T ~string](hints map[string]string, parse func(string) (T, error)) func(string) (T, error) {
	return func(s string) (T, error) {
		t, err := parse(s)
		if hint := hints[s]; err != nil && hint != "" {
			err = fmt.Errorf("%q: %s", s, hint)
		}
		return t, err
	}
}

func flannelBackend(s string) (FlannelMode, error) {
	return hinted(flannelHints(), oneOf(FlannelVXLAN, FlannelHostGW, FlannelWireGuard, FlannelNone))(s)
}

func snapshotter(s string) (Snapshotter, error) {
	return hinted(snapshotterHints(), oneOf(SnapshotterOverlayFS, SnapshotterNative))(s)
}

func disable(s string) (string, error) {
	return hinted(disableHints(), oneOf(packaged()...))(s)
}

func absolutePath(s string) (string, error) {
	if _, err := nonEmpty(s); err != nil {
		return "", err
	}
	if !filepath.IsAbs(s) {
		return "", fmt.Errorf("%q is a relative path; give an absolute one", s)
	}
	clean := filepath.Clean(s)
	if clean == "/" {
		return "", fmt.Errorf("%q is the root of the file system", s)
	}
	return clean, nil
}

func socketDir(s string) (string, error) {
	path, err := absolutePath(s)
	if err == nil && len(path) > maxSocketDir {
		err = fmt.Errorf("%q is longer than %d characters; the paths of the sockets in it would be too long", s, maxSocketDir)
	}
	return path, err
}

func parseFileMode(s string) (fs.FileMode, error) {
	mode, err := strconv.ParseUint(strings.TrimPrefix(s, "0o"), 8, 32)
	if err != nil || mode > 0o777 {
		return 0, fmt.Errorf("%q is not a file mode; accepted: three octal digits, for example 0600 or 640", s)
	}
	return fs.FileMode(mode), nil
}

func nodeName(s string) (string, error) {
	if problems := validation.IsDNS1123Subdomain(s); len(problems) > 0 {
		return "", fmt.Errorf("%q cannot be a node name: %s", s, strings.Join(problems, "; "))
	}
	return s, nil
}

func namespaceName(s string) (string, error) {
	if problems := validation.IsDNS1123Label(s); len(problems) > 0 {
		return "", fmt.Errorf("%q cannot be a namespace: %s", s, strings.Join(problems, "; "))
	}
	return s, nil
}

func nodeLabel(s string) (string, error) {
	key, val, ok := strings.Cut(s, "=")
	if !ok {
		return "", fmt.Errorf("%q is not of the form key=value", s)
	}
	problems := append(content.IsLabelKey(key), content.IsLabelValue(val)...)
	if len(problems) > 0 {
		return "", fmt.Errorf("%q is not a valid label: %s", s, strings.Join(problems, "; "))
	}
	// The rule of the NodeRestriction admission plugin, which the kubelet applies to --node-labels too:
	// k8s.io/kubernetes/cmd/kubelet/app/options, ValidateKubeletFlags.
	if inKubernetesNamespace(key) && !kubeletapis.IsKubeletLabel(key) {
		return "", fmt.Errorf("%q: a node may not give itself this label; when it has joined, run: kedge kubectl label node NAME %s", s, s)
	}
	return s, nil
}

func inKubernetesNamespace(key string) bool {
	namespace, _, ok := strings.Cut(key, "/")
	if !ok {
		return false
	}
	for _, owned := range []string{"kubernetes.io", "k8s.io"} {
		if namespace == owned || strings.HasSuffix(namespace, "."+owned) {
			return true
		}
	}
	return false
}

func nodeTaint(s string) (string, error) {
	add, _, err := taints.ParseTaints([]string{s})
	if err == nil && len(add) != 1 {
		err = errors.New("it has no effect")
	}
	if err != nil {
		return "", fmt.Errorf("%q is not a taint: %w; accepted: key=value:effect or key:effect with effect NoSchedule, PreferNoSchedule or NoExecute", s, err)
	}
	return s, nil
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q is not an IP address", s)
	}
	return a.Unmap(), nil
}

func bindAddress(s string) (netip.Addr, error) {
	a, err := parseAddr(s)
	if err == nil && a.IsLoopback() {
		err = fmt.Errorf("%s is reachable from this machine only, pods could not use the API; accepted: 0.0.0.0, :: or an address of this machine", a)
	}
	return a, err
}

// hostAddress accepts what other machines can reach.
func hostAddress(s string) (netip.Addr, error) {
	a, err := parseAddr(s)
	if err == nil && (!a.IsGlobalUnicast() || a.IsLoopback()) {
		err = fmt.Errorf("%s is a loopback, link-local, multicast or unspecified address; other machines and pods could not reach it", a)
	}
	return a, err
}

func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, fmt.Errorf("%q is not a network like 10.42.0.0/16 or fd42::/56", s)
	}
	if p.Addr().Is4In6() {
		return p, fmt.Errorf("%q is an IPv4-mapped IPv6 network; write it as IPv4", s)
	}
	if p.Masked() != p {
		return p, fmt.Errorf("%q is an address inside of a network; the network is %s", s, p.Masked())
	}
	return p, nil
}

func port(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > 65535 {
		return 0, fmt.Errorf("%q is not a port; accepted: 1 to 65535", s)
	}
	return n, nil
}

// serverURL accepts what package join does: https://HOST:PORT, with defaults for scheme and port.
func serverURL(s string) (string, error) { return endpoint(s, "6443", "https://192.0.2.1:6443") }

func endpointURL(s string) (string, error) { return endpoint(s, "2379", "https://etcd.example:2379") }

func endpoint(s, defaultPort, example string) (string, error) {
	wrong := fmt.Errorf("%q is not the address of a server; accepted: for example %s", s, example)
	full := s
	if !strings.Contains(s, "://") {
		full = "https://" + s
	}
	u, err := url.Parse(full)
	if err != nil || !isHost(u.Hostname()) || u.Scheme != "https" || u.Path != "" && u.Path != "/" || u.User != nil ||
		u.RawQuery != "" || u.ForceQuery || strings.Contains(s, "#") || strings.HasSuffix(u.Host, ":") {
		return "", wrong
	}
	p := cmp.Or(u.Port(), defaultPort)
	if _, err := port(p); err != nil {
		return "", fmt.Errorf("%q: %w", s, err)
	}
	return "https://" + net.JoinHostPort(strings.ToLower(u.Hostname()), p), nil
}

// isHost accepts a name or an address of a machine. An address with a zone is one of a single link, and no certificate can hold it.
func isHost(s string) bool {
	if a, err := netip.ParseAddr(s); err == nil {
		return a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast()
	}
	return len(validation.IsDNS1123Subdomain(strings.ToLower(strings.TrimSuffix(s, ".")))) == 0
}

func duration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is not a duration; accepted: for example 90s, 5m, 1h30m, or 0s", s)
	}
	return d, nil
}

func parsePortRange(s string) (PortRange, error) {
	first, last, ok := strings.Cut(s, "-")
	var r PortRange
	var errFirst, errLast error
	r.First, errFirst = port(strings.TrimSpace(first))
	r.Last, errLast = port(strings.TrimSpace(last))
	if !ok || errFirst != nil || errLast != nil || r.First > r.Last {
		return PortRange{}, fmt.Errorf("%q is not a range of ports; accepted: first-last, for example 30000-32767", s)
	}
	return r, nil
}

func clusterDomain(s string) (string, error) {
	if trimmed := strings.TrimSuffix(s, "."); trimmed != s {
		return "", fmt.Errorf("%q ends in a dot; write %q", s, trimmed)
	}
	if problems := validation.IsDNS1123Subdomain(s); len(problems) > 0 {
		return "", fmt.Errorf("%q is not a domain: %s", s, strings.Join(problems, "; "))
	}
	return s, nil
}

func certName(s string) (string, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return a.String(), nil
	}
	problems := validation.IsDNS1123Subdomain(s)
	if strings.HasPrefix(s, "*.") {
		problems = validation.IsWildcardDNS1123Subdomain(s)
	}
	if len(problems) > 0 {
		return "", fmt.Errorf("%q is neither an IP address nor a host name: %s", s, strings.Join(problems, "; "))
	}
	return s, nil
}

func imageReference(s string) (string, error) {
	if _, err := reference.ParseDockerRef(s); err != nil {
		return "", fmt.Errorf("%q is not an image name: %w; accepted: for example registry.example/pause:3.10", s, err)
	}
	return s, nil
}

// argText accepts key=value with or without leading dashes and gives it without.
func argText(s string) (string, error) {
	arg := strings.TrimLeft(s, "-")
	key, _, ok := strings.Cut(arg, "=")
	if !ok || key == "" || strings.ContainsAny(key, " \t\n") {
		return "", fmt.Errorf("%q is not of the form key=value (a switch is written key=true)", s)
	}
	return arg, nil
}
