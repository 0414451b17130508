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

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/plugin/pkg/transport"
	"golang.org/x/sys/unix"
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
	return nil
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

// stop ends the instance and waits for it.
func (e *engine) stop() error {
	if e.instance == nil {
		return nil
	}
	errs := e.instance.ShutdownCallbacks()
	errs = append(errs, e.instance.Stop())
	e.instance.Wait()
	e.instance, e.listeners = nil, nil
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
