// SPDX-License-Identifier: Apache-2.0

package apilb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What ends a connection to a server that does not even acknowledge any more, when there is no better server and the load balancer keeps
// it. It is long enough for a connection to survive an outage that TCP survives, some lost keep-alive packets (with a user timeout set,
// Linux ends an idle connection as soon as the time is over and a probe is unanswered), and a server too busy to read for a while (the
// user timeout counts a closed window, too). It is short beside the 45 seconds after which Kubernetes' clients give up by themselves.
const (
	userTimeout       = 20 * time.Second
	keepAliveIdle     = 10 * time.Second
	keepAliveInterval = 3 * time.Second
	keepAliveCount    = 4
)

// maxResolved limits how many addresses of one DNS name are tried.
const maxResolved = 8

func backendDialer() *net.Dialer {
	return &net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: keepAliveIdle, Interval: keepAliveInterval, Count: keepAliveCount},
		Control: func(_, _ string, c syscall.RawConn) error {
			var err error
			failed := c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
			})
			return errors.Join(failed, err)
		},
	}
}

// Dial connects to the server that a client of the load balancer would get. The connection is closed in the same cases as theirs.
func (b *Balancer) Dial(ctx context.Context) (net.Conn, error) {
	l, err := b.open(ctx, nil)
	if err != nil {
		return nil, err
	}
	return &dialed{Conn: l.backend, b: b, l: l}, nil
}

// dialed is a connection that was made by Dial.
type dialed struct {
	net.Conn
	b *Balancer
	l *link
}

func (c *dialed) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.l.touch()
	return n, err
}

func (c *dialed) Write(p []byte) (int, error) {
	c.l.touch()
	return c.Conn.Write(p)
}

func (c *dialed) CloseWrite() error { return c.l.backend.CloseWrite() }

func (c *dialed) Close() error {
	c.b.drop(c.l)
	return c.Conn.Close()
}

// open connects to a server and keeps the connection in its books. client is the other end of a proxied one.
func (b *Balancer) open(ctx context.Context, client *net.TCPConn) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, b.timing.connect)
	defer cancel()
	servers := b.candidates()
	conn, i, err := race(ctx, len(servers), b.timing.stagger, func(ctx context.Context, i int) (*net.TCPConn, error) {
		conn, err := dialHost(ctx, b.dialer, b.resolver, b.timing.stagger, servers[i].address)
		if err != nil && ctx.Err() == nil {
			b.alarm(nil)
		}
		return conn, err
	})
	switch {
	case len(servers) == 0:
		return nil, errors.New("no server is known: the list of servers is empty and there is no join address")
	case err != nil:
		return nil, fmt.Errorf("no server can be reached: %w", err)
	case i > 0:
		b.alarm(nil)
	}
	l := &link{epoch: b.epoch, server: servers[i], backend: conn, client: client}
	l.touch()
	if err := b.add(l); err != nil {
		l.cut()
		return nil, err
	}
	return l, nil
}

// add puts a connection into the books, unless its server or all of them have been given up meanwhile.
func (b *Balancer) add(l *link) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.closed:
		return errors.New("the load balancer has stopped")
	case l.server.removed:
		return fmt.Errorf("server %s has just been removed", l.server.address)
	}
	l.server.links[l] = struct{}{}
	return nil
}

// drop takes a connection out of the books.
func (b *Balancer) drop(l *link) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(l.server.links, l)
}

// dialHost connects to host:port. A name is resolved each time, and its addresses are tried like servers: the first one may be off.
func dialHost(ctx context.Context, dialer *net.Dialer, resolver *net.Resolver, stagger time.Duration, address string) (*net.TCPConn, error) {
	dial := func(ctx context.Context, address string) (*net.TCPConn, error) {
		conn, err := dialer.DialContext(ctx, "tcp", address)
		if err != nil {
			return nil, err
		}
		return conn.(*net.TCPConn), nil
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return dial(ctx, address)
	}
	ips, err := resolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	ips = ips[:min(len(ips), maxResolved)]
	conn, _, err := race(ctx, len(ips), stagger, func(ctx context.Context, i int) (*net.TCPConn, error) {
		return dial(ctx, net.JoinHostPort(ips[i].Unmap().String(), port))
	})
	return conn, err
}

// race calls try with 0 to n-1, each when the one before has failed or has taken longer than stagger, and returns the first connection
// and whose it is. All calls have returned then; the connections of the others are closed.
func race(ctx context.Context, n int, stagger time.Duration, try func(ctx context.Context, i int) (*net.TCPConn, error)) (*net.TCPConn, int, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		conn *net.TCPConn
		i    int
		err  error
	}
	results := make(chan result)
	begun, running := 0, 0
	next := func() {
		if i := begun; i < n {
			begun++
			running++
			go func() {
				conn, err := try(ctx, i)
				results <- result{conn, i, err}
			}()
		}
	}
	next()
	timer := time.NewTicker(stagger)
	defer timer.Stop()
	var errs []string
	var won *result
	for running > 0 {
		select {
		case <-timer.C:
			if won == nil && ctx.Err() == nil {
				next()
			}
		case r := <-results:
			running--
			switch {
			case r.err != nil:
				errs = append(errs, r.err.Error())
				if won == nil && ctx.Err() == nil {
					next()
					timer.Reset(stagger)
				}
			case won != nil:
				r.conn.Close()
			default:
				won = &r
				cancel()
			}
		}
	}
	if won == nil {
		return nil, 0, errors.New(strings.Join(errs, "; "))
	}
	return won.conn, won.i, nil
}
