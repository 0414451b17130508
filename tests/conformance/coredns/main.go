// SPDX-License-Identifier: Apache-2.0

// Command coredns is the CoreDNS of the image agnhost, with the plugins that the tests configure.
package main

import (
	"github.com/coredns/coredns/core/dnsserver" //policy:allow imports a program of a test image
	"github.com/coredns/coredns/coremain"       //policy:allow imports a program of a test image
	_ "github.com/coredns/coredns/plugin/hosts" //policy:allow imports a program of a test image
	_ "github.com/coredns/coredns/plugin/log"   //policy:allow imports a program of a test image
)

func main() {
	dnsserver.Directives = []string{"log", "hosts"}
	coremain.Run()
}
