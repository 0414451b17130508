// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/plugin/pkg/transport"
	miekg "github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

const (
	servingTimeout = 3 * time.Second
	servingPoll    = 5 * time.Millisecond
	pingTimeout    = 200 * time.Millisecond
	stopTimeout    = 7 * time.Second // dnsserver gives queries under way 5 s
)

// engine runs at most one CoreDNS instance and swaps its Corefile. Not for concurrent use.
type engine struct {
	server    *Server
	instance  *caddy.Instance
	listeners map[listener]struct{}
}

// load brings text into effect, or returns why not and leaves what ran before running. path is what imports are relative to and errors
// name; dir is the server blocks' root.
//
// New listeners are tried (by setupKedge) before CoreDNS opens any: a Restart that fails half-way leaves sockets open, and with SO_REUSEPORT,
// which CoreDNS sets, a socket that nobody reads gets its share of the queries. There is no separate validation, as setup functions (hosts)
// start goroutines that only the shutdown of a whole instance ends.
func (e *engine) load(text []byte, path, dir string) (err error) {
	defer func() {
		if r := recover(); r != nil { // a plugin's setup; it must not take the kubelet with it
			err = fmt.Errorf("CoreDNS panicked on this configuration: %v\n%s", r, debug.Stack())
		}
	}()
	blocks, err := caddyfile.Parse(path, bytes.NewReader(text), directives())
	if err != nil {
		return err
	}
	a := &attempt{server: e.server, dir: dir}
	for _, b := range blocks {
		a.blocks = append(a.blocks, b.Keys)
	}
	name := e.server.cfg.listen()
	attempts.Store(name, a)
	defer attempts.Delete(name)

	input := caddy.CaddyfileInput{Filepath: path, Contents: text, ServerTypeName: "dns"}
	next, err := e.replace(input)
	if a.listenErr != nil {
		return a.listenErr
	}
	if err != nil {
		return errors.New(strings.TrimPrefix(err.Error(), "starting with listener file descriptors: "))
	}
	e.instance, e.listeners = next, a.listeners
	e.awaitServing()
	return nil
}

// awaitServing returns when every listener answers. CoreDNS's Start and Restart return before their servers run, and Stop does nothing to a
// server that does not run yet: the next Restart would leave it serving the old configuration on the same socket for good, and waiting for
// the end of the instance would take forever.
func (e *engine) awaitServing() {
	deadline := time.Now().Add(servingTimeout)
	for l := range e.listeners {
		if l.transport != transport.DNS {
			continue
		}
		for _, network := range []string{"udp", "tcp"} {
			for err := l.ping(network); err != nil; err = l.ping(network) {
				if time.Now().After(deadline) {
					e.server.log.Warn("CoreDNS listens but does not answer yet", "network", network, "address", l.host, "port", l.port, "error", err)
					return
				}
				time.Sleep(servingPoll)
			}
		}
	}
}

// ping sends a message with an opcode that the server rejects by itself, before any plugin sees it.
func (l listener) ping(network string) error {
	m := new(miekg.Msg).SetQuestion(".", miekg.TypeNS)
	m.Opcode = miekg.OpcodeStatus
	c := miekg.Client{Net: network, Timeout: pingTimeout}
	_, _, err := c.Exchange(m, net.JoinHostPort(l.host, l.port))
	return err
}

func (e *engine) replace(input caddy.Input) (*caddy.Instance, error) {
	if e.instance == nil {
		return caddy.Start(input)
	}
	// Restart hands the sockets on, so no query gets lost.
	next, err := e.instance.Restart(input)
	if err == nil && next == nil { // what it returns after a panic, which it has logged
		err = errors.New("CoreDNS panicked on this configuration")
	}
	return next, err
}

// stop ends the instance and waits for it, for at most stopTimeout: a server that does not stop must not keep the process.
func (e *engine) stop() error {
	if e.instance == nil {
		return nil
	}
	instance := e.instance
	e.instance, e.listeners = nil, nil
	errs := instance.ShutdownCallbacks()
	errs = append(errs, instance.Stop())
	ended := make(chan struct{})
	go func() { instance.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(stopTimeout):
		errs = append(errs, fmt.Errorf("servers still run after %s", stopTimeout))
	}
	return errors.Join(errs...)
}

// errListen marks errors of listeners: they may be gone at the next try.
var errListen = errors.New("listen")

// probe opens the sockets and closes them again.
func (l listener) probe() error {
	lc := net.ListenConfig{Control: reusePort}
	addr := net.JoinHostPort(l.host, l.port)
	if l.transport != transport.QUIC {
		s, err := lc.Listen(context.Background(), "tcp", addr)
		if err != nil {
			return listenError(addr, err)
		}
		defer s.Close()
	}
	if l.transport == transport.DNS || l.transport == transport.QUIC {
		s, err := lc.ListenPacket(context.Background(), "udp", addr)
		if err != nil {
			return listenError(addr, err)
		}
		defer s.Close()
	}
	return nil
}

func listenError(addr string, err error) error {
	hint := ""
	if errors.Is(err, syscall.EADDRINUSE) {
		hint = "; another DNS server on this machine takes this address or all addresses: find it with \"ss -lnp sport = :53\" and " +
			"let it listen on its own addresses only (dnsmasq: bind-interfaces)"
	}
	return fmt.Errorf("%w on %s: %w%s", errListen, addr, err, hint)
}

func reusePort(_, _ string, c syscall.RawConn) error {
	var err error
	if ctl := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }); ctl != nil {
		return ctl
	}
	return err
}
