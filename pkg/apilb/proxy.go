// SPDX-License-Identifier: Apache-2.0

package apilb

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Pauses after a failed accept: out of file descriptors, it fails again at once.
const (
	acceptPauseFirst = 5 * time.Millisecond
	acceptPauseLast  = time.Second
)

// buffer is lent to a direction of a connection only while bytes pass. io.Copy would splice, but keeps a pipe, two file descriptors, for
// each direction of each connection, and nearly all connections to an API server are idle nearly always.
type buffer [32 << 10]byte

// link is a connection to a server.
type link struct {
	epoch   time.Time
	server  *server
	backend *net.TCPConn
	client  *net.TCPConn // nil if it was made by Dial

	touched atomic.Int64 // when bytes passed, as a Duration since epoch
	half    atomic.Bool  // one direction has ended
	homeBy  time.Time    // when it is closed for coming home even if it is busy
}

func (l *link) touch()              { l.touched.Store(int64(time.Since(l.epoch))) }
func (l *link) last() time.Duration { return time.Duration(l.touched.Load()) }

// cut ends a connection at once: what is on its way to a dead server must not keep kernel and client waiting.
func (l *link) cut() {
	// Neither error would change anything: both sockets are gone afterwards.
	l.backend.SetLinger(0) //nolint:errcheck
	l.backend.Close()
	if l.client != nil {
		l.client.Close()
	}
}

// accept serves a listener until it is closed, and waits for the connections to end.
func (b *Balancer) accept(ctx context.Context, listener net.Listener) {
	var running sync.WaitGroup
	defer running.Wait()
	pause := acceptPauseFirst
	var failed notice
	for {
		conn, err := listener.Accept()
		if err == nil {
			pause = acceptPauseFirst
			running.Go(func() { b.serve(ctx, conn.(*net.TCPConn)) })
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if failed.bad(time.Now()) {
			b.log.Warn("cannot accept connections, trying again", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, acceptPauseLast)
	}
}

// serve proxies one connection until it ends.
func (b *Balancer) serve(ctx context.Context, client *net.TCPConn) {
	defer client.Close()
	l, err := b.open(ctx, client)
	if err != nil {
		b.log.Debug("a client is turned away", "error", err)
		return
	}
	defer l.backend.Close()
	defer b.drop(l)
	var up sync.WaitGroup
	up.Go(func() { b.pump(l, l.backend, client) })
	b.pump(l, client, l.backend)
	up.Wait()
}

// pump copies one direction. Its end is passed on, so that the other direction can go on; an error ends both.
func (b *Balancer) pump(l *link, dst, src *net.TCPConn) {
	if err := b.copy(l, dst, src); err != nil {
		l.cut()
		return
	}
	// It fails when that side is gone already, as the other direction will see.
	dst.CloseWrite() //nolint:errcheck
	l.half.Store(true)
	dst.SetReadDeadline(time.Now().Add(b.timing.linger)) //nolint:errcheck
}

// copy copies until the end of src.
func (b *Balancer) copy(l *link, dst, src *net.TCPConn) error {
	raw, err := src.SyscallConn()
	if err != nil {
		return err
	}
	var buf *buffer
	var n int
	read := func(fd uintptr) bool {
		buf = b.buffers.Get().(*buffer)
		for {
			if n, err = unix.Read(int(fd), buf[:]); err != unix.EINTR {
				break
			}
		}
		if err == unix.EAGAIN {
			b.buffers.Put(buf)
			return false // called again when there is something to read
		}
		return true
	}
	for {
		if l.half.Load() {
			// A client that is gone looks like one that has only finished sending: its server must not hold it for ever.
			if err := src.SetReadDeadline(time.Now().Add(b.timing.linger)); err != nil {
				return err
			}
		}
		if failed := raw.Read(read); failed != nil {
			return failed
		}
		if err == nil && n == 0 {
			err = io.EOF
		}
		if err == nil {
			l.touch()
			_, err = dst.Write(buf[:n])
		}
		b.buffers.Put(buf)
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}
