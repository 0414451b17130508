// SPDX-License-Identifier: Apache-2.0

// Command coredns is the CoreDNS of the stock side of the benchmark, with the plugins of the Corefile that kubeadm writes.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"       //policy:allow imports a program of the benchmark, not part of Kedge
	"github.com/coredns/coredns/coremain"             //policy:allow imports a program of the benchmark, not part of Kedge
	_ "github.com/coredns/coredns/plugin/cache"       //policy:allow imports a program of the benchmark, not part of Kedge
	_ "github.com/coredns/coredns/plugin/errors"      //policy:allow imports a program of the benchmark, not part of Kedge
	_ "github.com/coredns/coredns/plugin/forward"     //policy:allow imports a program of the benchmark, not part of Kedge
	_ "github.com/coredns/coredns/plugin/health"      //policy:allow imports a program of the benchmark, not part of Kedge
	_ "github.com/coredns/coredns/plugin/kubernetes"  //policy:allow imports a program of the benchmark, not part of Kedge
	_ "github.com/coredns/coredns/plugin/loadbalance" //policy:allow imports a program of the benchmark, not part of Kedge
	_ "github.com/coredns/coredns/plugin/loop"        //policy:allow imports a program of the benchmark, not part of Kedge
	_ "github.com/coredns/coredns/plugin/metrics"     //policy:allow imports a program of the benchmark, not part of Kedge
	_ "github.com/coredns/coredns/plugin/ready"       //policy:allow imports a program of the benchmark, not part of Kedge
	_ "github.com/coredns/coredns/plugin/reload"      //policy:allow imports a program of the benchmark, not part of Kedge
)

func main() {
	// CoreDNS's own order, which its list of all plugins has, too.
	dnsserver.Directives = []string{"reload", "ready", "health", "prometheus", "errors", "loadbalance", "cache", "kubernetes", "loop", "forward"}
	coremain.Run()
}
