// SPDX-License-Identifier: Apache-2.0

package config

import (
	"net/netip"
	"strings"
)

// AnnotationExternalIP is where a Node has the addresses of --node-external-ip, with commas between them. The control plane makes
// addresses of the Node's status out of it: a kubelet only leaves alone what others have written there, if it is told that there is
// a cloud.
const AnnotationExternalIP = "kedge.io/node-external-ip"

// ExternalIPs reads the value of AnnotationExternalIP. What is no address is left out.
func ExternalIPs(annotation string) []netip.Addr {
	var list []netip.Addr
	for text := range strings.SplitSeq(annotation, ",") {
		if a, err := netip.ParseAddr(text); err == nil {
			list = append(list, a)
		}
	}
	return list
}
