// SPDX-License-Identifier: Apache-2.0

// Package apilb is the API load balancer in the supervisor of every node: a TCP proxy on loopback that knows all API servers. TLS
// passes through it untouched. This machine's own server comes first; the others come in an order that differs from node to node.
//
// One server is in use at a time. It is probed every second, the others rarely, and at once when the one in use is slow to answer.
// What happens then depends on what the probes say:
//
//   - A server that does not answer is left at once, in less than two seconds after it fell silent: connections to it are closed,
//     so that the clients come back and get another one.
//   - A server that answers but cannot serve, since its datastore is away, is left when that has lasted longer than the election of a
//     leader, and only for one that can.
//   - Without a better one nothing is closed. New connections try all servers, each a little after the one before: a false alarm
//     costs nothing.
//   - A preferred server that has been ready again for a while gets the connections back, each in a moment in which it is quiet.
//
// Nothing but HTTPSProbe knows what kind of servers they are.
package apilb

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"
)

// Config of a Balancer. Addresses are host:port.
type Config struct {
	// Listen is the address to serve, on loopback.
	Listen string
	// Local is this machine's own API server, preferred whenever it is ready. Empty on agents. It should be the address that SetServers
	// gets, too: under two addresses it counts as two servers, and a single one is probed as if there were another to go to.
	Local string
	// Join is the last resort when no other server answers. Its host may be a DNS name, which is resolved at each connection.
	Join string
	// File keeps the list of servers over restarts.
	File string
	// NodeName makes the order of preference differ between nodes, so that agents spread over the servers.
	NodeName string
	// Probe asks a server how it is and returns before ctx is over. A NotReadyError means that it answers but cannot serve.
	Probe  func(ctx context.Context, address string) error
	Logger *slog.Logger
	// Changed, if set, is called after each change of what Servers returns, except for the number of connections, without locks held.
	Changed func()
}

// Server is what `kedge status` shows of one API server.
type Server struct {
	Address string `json:"address"`
	Healthy bool   `json:"healthy"`
	// Reason says why it is not healthy.
	Reason string `json:"reason,omitempty"`
	Local  bool   `json:"local,omitempty"`
	// Active says that new connections go there.
	Active      bool `json:"active,omitempty"`
	Connections int  `json:"connections"`
}

// timing is how long things take. Detection takes interval + timeout at most, which has to stay below two seconds.
type timing struct {
	interval time.Duration // from probe to probe of the server in use, and of all when that one is not ready
	timeout  time.Duration // of a probe
	suspect  time.Duration // without an answer of the server in use: the others are asked, so that they are known at the timeout
	rare     time.Duration // from probe to probe of the others
	patience time.Duration // for a server in use that answers but is not ready; the election of an etcd leader takes 1 to 1.5 s
	home     time.Duration // a preferred server has to be ready before connections come back to it
	spread   time.Duration // added to home at random, so that not all agents come back at once
	quiet    time.Duration // without traffic: a connection may be closed for coming home
	force    time.Duration // until a connection that is never quiet is closed for coming home
	stagger  time.Duration // between attempts to connect
	connect  time.Duration // until an attempt to find any server is given up
	linger   time.Duration // one direction of a connection may stay open without traffic after the other has ended
}

func defaultTiming() timing {
	return timing{
		interval: time.Second, timeout: 750 * time.Millisecond, suspect: 250 * time.Millisecond, rare: 10 * time.Second,
		patience: 1500 * time.Millisecond, home: 30 * time.Second, spread: 2 * time.Minute, quiet: 2 * time.Second, force: time.Minute,
		stagger: 250 * time.Millisecond, connect: 10 * time.Second, linger: 2 * time.Minute,
	}
}

// Balancer is the load balancer. It can be used as soon as New has returned it; Run makes it listen and probe.
type Balancer struct {
	cfg      Config
	log      *slog.Logger
	timing   timing
	resolver *net.Resolver
	dialer   *net.Dialer
	epoch    time.Time
	buffers  sync.Pool     // of *buffer
	kick     chan struct{} // wakes the loop that probes

	saving sync.Mutex // held while the list is replaced and written; taken before mu
	saved  []string   // what the file holds

	mu      sync.Mutex // guards what follows, the fields of all servers and link.homeBy; never held during input and output
	addr    string
	closed  bool
	servers []*server // in the order of preference
	active  *server   // one of servers; nil without any
	served  bool      // a server was ready once
	down    bool      // no server is ready
	outage  notice    // tells that
}

// New reads the list of the last run. A file that is missing or damaged is no error: the join address helps then.
func New(cfg Config) (*Balancer, error) {
	if cfg.Probe == nil || cfg.Logger == nil {
		return nil, errors.New("load balancer: no probe or no logger")
	}
	for name, address := range map[string]*string{"address to listen on": &cfg.Listen, "local server": &cfg.Local, "join address": &cfg.Join} {
		if *address == "" && address != &cfg.Listen {
			continue
		}
		parsed, err := parseAddress(*address, address == &cfg.Listen)
		if err != nil {
			return nil, fmt.Errorf("load balancer: %s: %w", name, err)
		}
		*address = parsed
	}
	if cfg.Listen == cfg.Join || cfg.Listen == cfg.Local {
		return nil, fmt.Errorf("load balancer: %s is its own address and cannot be a server's: give the address of a server", cfg.Listen)
	}
	b := &Balancer{
		cfg: cfg, log: cfg.Logger, timing: defaultTiming(), resolver: net.DefaultResolver, dialer: backendDialer(), epoch: time.Now(),
		kick: make(chan struct{}, 1), addr: cfg.Listen,
	}
	b.buffers.New = func() any { return new(buffer) }
	list, err := ReadFile(cfg.File)
	if err != nil {
		b.log.Warn("the list of servers of the last run is damaged; it is written anew when a server has been reached", "file", cfg.File, "error", err)
	}
	if err == nil {
		b.saved = list
	}
	b.adopt(list, time.Now(), &step{})
	return b, nil
}

// Run listens, proxies and probes until ctx ends, then closes all connections. It is called once.
func (b *Balancer) Run(ctx context.Context) error {
	// Keep-alive is for the other side: on loopback nobody gets lost. Neither has it several paths.
	listen := net.ListenConfig{KeepAlive: -1}
	listen.SetMultipathTCP(false)
	listener, err := listen.Listen(ctx, "tcp", b.cfg.Listen)
	if err != nil {
		return fmt.Errorf("load balancer: %w: stop what uses the address, or choose another port", err)
	}
	b.mu.Lock()
	b.addr = listener.Addr().String()
	b.mu.Unlock()
	var running sync.WaitGroup
	running.Go(func() { b.accept(ctx, listener) })
	running.Go(func() { b.probeLoop(ctx) })
	<-ctx.Done()
	err = listener.Close()
	for _, l := range b.shut() {
		l.cut()
	}
	running.Wait()
	return err
}

// shut keeps new connections from being added and returns all there are.
func (b *Balancer) shut() []*link {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	var all []*link
	for _, s := range b.servers {
		all = append(all, s.take()...)
	}
	return all
}

// Addr is where the load balancer listens.
func (b *Balancer) Addr() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.addr
}

// Servers lists the servers in the order of preference.
func (b *Balancer) Servers() []Server {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := make([]Server, 0, len(b.servers))
	for _, s := range b.servers {
		all = append(all, Server{
			Address: s.address, Healthy: s.state == ready, Reason: s.reason, Local: s.local, Active: s == b.active, Connections: len(s.links),
		})
	}
	return all
}

// SetServers takes over the list that the cluster holds and writes it to the file. Connections to servers that are no longer in it
// are closed. An empty list is ignored: a cluster that answers has a server. Of a list with invalid addresses the valid ones are
// used; the error names the others.
func (b *Balancer) SetServers(addresses []string) error {
	list, err := parseList(addresses)
	list = slices.DeleteFunc(list, func(address string) bool { return address == b.cfg.Listen })
	if len(list) == 0 {
		return err
	}
	b.saving.Lock()
	defer b.saving.Unlock()
	var out step
	b.mu.Lock()
	b.adopt(list, time.Now(), &out)
	b.mu.Unlock()
	b.finish(&out)
	if slices.Equal(list, b.saved) {
		return err
	}
	if failed := writeList(b.cfg.File, list); failed != nil {
		return errors.Join(err, fmt.Errorf("write the list of servers: %w", failed))
	}
	b.saved = list
	return err
}
