// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// link is a connection that carries a tunnel, on either side. HTTP/2 closes it without saying why; link finds out.
type link struct {
	net.Conn
	early *bufio.Reader // has what was read together with the HTTP/1.1 head
	quiet time.Duration // a connection that was closed after so much silence did not answer a ping

	seen   atomic.Int64 // last read, in nanoseconds
	closed chan struct{}
	once   sync.Once
	mu     sync.Mutex
	reason error
}

func newLink(conn net.Conn, early *bufio.Reader, quiet time.Duration) *link {
	l := &link{Conn: conn, early: early, quiet: quiet, closed: make(chan struct{})}
	l.seen.Store(time.Now().UnixNano())
	return l
}

// Read reads from the connection.
func (l *link) Read(p []byte) (int, error) {
	var n int
	var err error
	if l.early.Buffered() > 0 {
		n, err = l.early.Read(p)
	} else {
		n, err = l.Conn.Read(p)
	}
	switch {
	case errors.Is(err, io.EOF):
		l.because(errors.New("the other side closed it"))
	case err != nil && !isTimeout(err):
		l.because(cause(err))
	case n > 0:
		l.seen.Store(time.Now().UnixNano())
	}
	return n, err
}

// because notes why the connection ends. The first reason counts.
func (l *link) because(reason error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.reason == nil {
		l.reason = reason
	}
}

// why says why the connection ended.
func (l *link) why() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.reason
}

// Close closes the connection. Of all that calls it only HTTP/2 does so without having noted a reason.
func (l *link) Close() error {
	err := net.ErrClosed
	l.once.Do(func() {
		if silence := time.Since(time.Unix(0, l.seen.Load())); silence >= l.quiet {
			l.because(fmt.Errorf("no sign of life for %s", silence.Round(time.Second)))
		}
		l.because(errors.New("HTTP/2 closed it"))
		close(l.closed)
		if t, ok := l.Conn.(*tls.Conn); ok {
			// TLS wants to say goodbye and waits five seconds for a peer that does not take it.
			force := time.AfterFunc(250*time.Millisecond, func() { t.NetConn().Close() })
			defer force.Stop()
		}
		err = l.Conn.Close()
	})
	return err
}
