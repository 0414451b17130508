// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// end of a connection.
type end struct {
	namespace, name string // of a pod, or
	addr            netip.Addr

	node string // of the pod
	host bool   // it has its node's network
}

// destination has the port besides.
type destination struct {
	end
	protocol string
	port     string // by number or name
	number   uint16
}

func (e end) isPod() bool { return e.name != "" }

func (e end) title() string {
	if e.isPod() {
		return e.namespace + "/" + e.name
	}
	return e.addr.String()
}

func (e end) String() string {
	if e.isPod() {
		return fmt.Sprintf("%s (%s, node %s)", e.title(), e.addr, e.node)
	}
	return e.title()
}

// parseFrom takes NAMESPACE/NAME or an address.
func parseFrom(text string) (end, error) {
	if namespace, name, isPod := strings.Cut(text, "/"); isPod {
		if namespace == "" || name == "" || strings.ContainsAny(name, "/:") || strings.Contains(namespace, ":") {
			return end{}, fmt.Errorf("%q: a pod is NAMESPACE/NAME", text)
		}
		return end{namespace: namespace, name: name}, nil
	}
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" {
		return end{}, fmt.Errorf("%q is neither a pod, NAMESPACE/NAME, nor an address", text)
	}
	return end{addr: a.Unmap()}, nil
}

// parseTo takes what parseFrom takes, with :PORT and maybe /PROTOCOL. An IPv6 address is in brackets.
func parseTo(text string) (destination, error) {
	i := strings.LastIndexByte(text, ':')
	if _, err := netip.ParseAddr(text); i < 0 || err == nil {
		return destination{}, fmt.Errorf("%q has no port: NAMESPACE/NAME:PORT, ADDRESS:PORT or [ADDRESS]:PORT, with /udp or /sctp where it is not TCP", text)
	}
	host, port := text[:i], text[i+1:]
	port, protocol, given := strings.Cut(port, "/")
	if !given {
		protocol = "tcp"
	}
	protocol = strings.ToLower(protocol)
	if !slices.Contains([]string{"tcp", "udp", "sctp"}, protocol) {
		return destination{}, fmt.Errorf("%q: the protocol is tcp, udp or sctp", text)
	}
	if inside, ok := strings.CutPrefix(host, "["); ok {
		if inside, ok = strings.CutSuffix(inside, "]"); !ok {
			return destination{}, fmt.Errorf("%q: a bracket is missing", text)
		}
		host = inside
	}
	e, err := parseFrom(host)
	if err != nil {
		return destination{}, err
	}
	d := destination{end: e, protocol: protocol, port: port}
	if n, err := strconv.ParseUint(port, 10, 16); err == nil && n > 0 {
		d.number = uint16(n)
	} else if err == nil || port == "" || strings.Trim(port, "0123456789") == "" {
		return destination{}, fmt.Errorf("%q: a port is a number from 1 to 65535 or a name", text)
	} else if !e.isPod() {
		return destination{}, fmt.Errorf("%q: only pods have ports with names", text)
	}
	return d, nil
}

// resolve finds pods' nodes, ports and addresses, of one family.
func (t tracer) resolve(ctx context.Context, from *end, to *destination) error {
	source, err := t.addresses(ctx, from, nil)
	if err != nil {
		return err
	}
	target, err := t.addresses(ctx, &to.end, to)
	if err != nil {
		return err
	}
	for _, a := range source {
		for _, b := range target {
			if a.Is4() == b.Is4() {
				from.addr, to.addr = a, b
				return nil
			}
		}
	}
	return fmt.Errorf("%s and %s have no addresses of the same family", from.title(), to.title())
}

// addresses of an end, whose node it notes; of a destination the number of the port, too.
func (t tracer) addresses(ctx context.Context, e *end, d *destination) ([]netip.Addr, error) {
	if !e.isPod() {
		return []netip.Addr{e.addr}, nil
	}
	client, err := t.client()
	if err != nil {
		return nil, err
	}
	pod, err := client.CoreV1().Pods(e.namespace).Get(ctx, e.name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	e.node, e.host = pod.Spec.NodeName, pod.Spec.HostNetwork
	if d != nil && d.number == 0 {
		if d.number, err = portOf(pod, d.port, d.protocol); err != nil {
			return nil, err
		}
	}
	var addrs []netip.Addr
	for _, ip := range pod.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			addrs = append(addrs, a.Unmap())
		}
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("pod %s has no address yet: phase %s", e.title(), pod.Status.Phase)
	}
	return addrs, nil
}

func portOf(pod *corev1.Pod, name, protocol string) (uint16, error) {
	for _, c := range slices.Concat(pod.Spec.Containers, pod.Spec.InitContainers) {
		for _, p := range c.Ports {
			if p.Name == name && strings.EqualFold(string(p.Protocol), protocol) {
				return uint16(p.ContainerPort), nil
			}
		}
	}
	return 0, errors.New("pod " + pod.Namespace + "/" + pod.Name + " has no port " + name + " with protocol " + protocol)
}
