// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"fmt"
	"sync"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"

	// The plugins that a cluster uses, one by one: core/plugin would bring three cloud SDKs and a tracer.
	_ "github.com/coredns/coredns/plugin/acl"
	_ "github.com/coredns/coredns/plugin/any"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/bufsize"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/file"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/header"
	_ "github.com/coredns/coredns/plugin/hosts"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/local"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/metadata"
	_ "github.com/coredns/coredns/plugin/metrics"
	_ "github.com/coredns/coredns/plugin/minimal"
	_ "github.com/coredns/coredns/plugin/rewrite"
	_ "github.com/coredns/coredns/plugin/root"
	_ "github.com/coredns/coredns/plugin/template"
	_ "github.com/coredns/coredns/plugin/view"
	_ "github.com/coredns/coredns/plugin/whoami"
)

// Kedge's own directives.
const (
	// dirKedge stands in the main server block. It gives every server block that names no address of its own ("bind") the cluster DNS
	// address and the check of the query's source, and each one a "root": the directory with the files of coredns-custom.
	dirKedge = "kedge"
	// dirCluster answers names of the cluster from the Kubernetes API.
	dirCluster = "cluster"
	// dirUnresolved is the end of the chain when there is no upstream.
	dirUnresolved = "unresolved"
)

// directives returns what a Corefile may contain, in the order of execution: CoreDNS's order (dnsserver.Directives), with the own ones
// where they belong. "kedge" must come after "bind" and "root", whose results it looks at, and before everything that answers.
func directives() []string {
	return []string{
		"root", "metadata", "bufsize", "bind", "prometheus", "errors", "log", dirKedge, "local", "any", "loadbalance", "rewrite", "acl",
		"cache", "header", "minimal", "template", "hosts", dirCluster, "file", "forward", "whoami", dirUnresolved, "view",
	}
}

// registerDirectives tells CoreDNS, once per process, which directives there are.
var registerDirectives = sync.OnceValue(func() error {
	if err := dnsserver.SetDirectives(directives()); err != nil {
		return fmt.Errorf("register the Corefile's directives: %w", err)
	}
	plugin.Register(dirKedge, setupKedge)
	plugin.Register(dirCluster, setupCluster)
	plugin.Register(dirUnresolved, setupUnresolved)
	caddy.Quiet, dnsserver.Quiet = true, true // they print to stdout otherwise
	return nil
})

// attempts leads from the argument of "kedge" in a Corefile (the listening address) to the Server that loads it. Caddy's plugin registry is
// one per process and hands a setup function nothing but the Corefile, so there is no other way to tell two Servers apart.
var attempts sync.Map //policy:allow variable one registry per process, see above

// attempt is one loading of a Corefile.
type attempt struct {
	server *Server
	dir    string     // files of coredns-custom
	blocks [][]string // keys of the server blocks, in the Corefile's order

	listeners map[listener]struct{} // set by setupKedge
	listenErr error                 // also in what caddy returns, but only as text
}

// listener is a socket that a Corefile asks for.
type listener struct{ transport, host, port string }

type attemptKey struct{}

func setupKedge(c *caddy.Controller) error {
	var name string
	if !c.Next() || !c.Args(&name) {
		return plugin.Error(dirKedge, c.ArgErr())
	}
	v, ok := attempts.Load(name)
	if !ok {
		return plugin.Error(dirKedge, c.Errf("this directive belongs to Kedge and cannot be used"))
	}
	a := v.(*attempt)
	c.Set(attemptKey{}, a)
	a.listeners = map[listener]struct{}{}
	for i, keys := range a.blocks {
		first := configAt(c, i, 0)
		unbound := len(first.ListenHosts) == 1 && first.ListenHosts[0] == ""
		if unbound {
			first.ListenHosts = []string{a.server.cfg.Addr.String()}
		}
		if unbound || i == c.ServerBlockIndex {
			first.AddPlugin(func(next plugin.Handler) plugin.Handler { return sourceCheck{next: next, local: &a.server.local} })
		}
		if first.Root == "" {
			first.Root = a.dir
		}
		for j := range keys {
			cfg := configAt(c, i, j)
			for _, host := range first.ListenHosts {
				a.listeners[listener{cfg.Transport, host, cfg.Port}] = struct{}{}
			}
		}
	}
	for l := range a.listeners {
		if _, ours := a.server.engine.listeners[l]; !ours && a.listenErr == nil {
			a.listenErr = l.probe()
		}
	}
	return a.listenErr
}

// configAt returns the configuration of a key of a server block. Caller: block and key exist, dnsserver would add them otherwise.
func configAt(c *caddy.Controller, block, key int) *dnsserver.Config {
	at := *c
	at.ServerBlockIndex, at.ServerBlockKeyIndex = block, key
	return dnsserver.GetConfig(&at)
}

func setupCluster(c *caddy.Controller) error {
	if err := noArguments(c); err != nil {
		return plugin.Error(dirCluster, err)
	}
	a, ok := c.Get(attemptKey{}).(*attempt)
	if !ok {
		return plugin.Error(dirCluster, c.Err("no Kubernetes API is known here"))
	}
	dnsserver.GetConfig(c).AddPlugin(func(next plugin.Handler) plugin.Handler { return clusterNames{server: a.server, next: next} })
	return nil
}

func setupUnresolved(c *caddy.Controller) error {
	if err := noArguments(c); err != nil {
		return plugin.Error(dirUnresolved, err)
	}
	dnsserver.GetConfig(c).AddPlugin(func(plugin.Handler) plugin.Handler { return unresolved{} })
	return nil
}

func noArguments(c *caddy.Controller) error {
	for c.Next() {
		if len(c.RemainingArgs()) > 0 {
			return c.ArgErr()
		}
	}
	return nil
}
