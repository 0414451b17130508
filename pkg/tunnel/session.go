// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

// lingerTimeout is how long Close waits until the last bytes written are on their way.
const lingerTimeout = 2 * time.Second

// session is one open tunnel, on the API server's side.
type session struct {
	node string
	link *link
	http *http.ClientConn
}

// newSession starts HTTP/2.
func newSession(ctx context.Context, node string, l *link, h health) (*session, error) {
	transport := &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return l, nil },
		Protocols:   http2Only(), HTTP2: http2Config(h), DisableCompression: true, MaxResponseHeaderBytes: 8 << 10,
	}
	conn, err := transport.NewClientConn(ctx, "http", net.JoinHostPort("node", "http"))
	if err != nil {
		return nil, err
	}
	return &session{node: node, link: l, http: conn}, nil
}

func (s *session) close(reason error) {
	s.link.because(reason)
	s.link.Close()
}

// answer is the node's word that it did not connect.
type answer struct {
	status int
	text   string
}

func (a *answer) Error() string { return "the node answers: " + a.text }

// dial has the node dial addr. ctx is about the dialling, not the connection.
func (s *session) dial(ctx context.Context, addr string) (_ net.Conn, err error) {
	ours, theirs := net.Pipe()
	c := &conn{Conn: ours, session: s, sent: make(chan struct{}), addr: addr}
	life, cancel := context.WithCancel(context.Background()) // without the values of ctx: it may have traces of another request
	c.cancel = cancel
	defer func() {
		if err != nil {
			cancel()
			ours.Close()
		}
	}()
	stop := context.AfterFunc(ctx, cancel)
	var sent sync.Once
	life = httptrace.WithClientTrace(life, &httptrace.ClientTrace{WroteRequest: func(httptrace.WroteRequestInfo) { sent.Do(func() { close(c.sent) }) }})
	req := (&http.Request{
		Method: http.MethodConnect, URL: &url.URL{Scheme: "http", Host: addr}, Host: addr,
		Header: http.Header{"User-Agent": {""}}, Body: theirs, ContentLength: -1,
	}).WithContext(life)
	res, err := s.http.RoundTrip(req)
	if err != nil {
		if reason := s.link.why(); ctx.Err() != nil {
			err = ctx.Err()
		} else if reason != nil {
			err = fmt.Errorf("the tunnel has ended: %w", reason)
		}
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(res.Body, 1<<10)) // what has come of it
		res.Body.Close()
		return nil, &answer{status: res.StatusCode, text: strings.TrimSpace(string(text))}
	}
	if !stop() {
		res.Body.Close()
		return nil, context.Cause(ctx)
	}
	c.body, c.chunks = res.Body, httputil.NewChunkedReader(res.Body)
	return c, nil
}

// conn is one stream. Its embedded pipe is what is written to; HTTP/2 reads the request's body from the other end.
type conn struct {
	net.Conn
	session *session
	addr    string
	body    io.Closer
	chunks  io.Reader
	cancel  context.CancelFunc
	sent    chan struct{} // closed when the last byte, or an error, was sent
	once    sync.Once

	mu      sync.Mutex
	timer   *time.Timer
	expired bool
}

// Read reads what the target sends. An end that the target did not send is io.ErrUnexpectedEOF.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.chunks.Read(p)
	if err == nil || errors.Is(err, io.EOF) {
		return n, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.expired {
		return n, os.ErrDeadlineExceeded
	}
	if reason := c.session.link.why(); reason != nil {
		return n, fmt.Errorf("the tunnel of node %s has ended: %w", c.session.node, reason)
	}
	return n, err
}

// WriteTo is io.Copy's way, with a buffer of half the usual size.
func (c *conn) WriteTo(w io.Writer) (int64, error) {
	return io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{c}, make([]byte, frameSize))
}

// ReadFrom is io.Copy's way, with a buffer of half the usual size.
func (c *conn) ReadFrom(r io.Reader) (int64, error) {
	return io.CopyBuffer(struct{ io.Writer }{c.Conn}, struct{ io.Reader }{r}, make([]byte, frameSize))
}

// CloseWrite tells the target that nothing more comes.
func (c *conn) CloseWrite() error { return c.Conn.Close() }

// Close ends the stream. What was written before still goes to the target, as with a socket.
func (c *conn) Close() error {
	c.once.Do(func() {
		c.Conn.Close()
		linger := time.NewTimer(lingerTimeout)
		defer linger.Stop()
		select {
		case <-c.sent:
		case <-c.session.link.closed:
		case <-linger.C:
		}
		_ = c.SetReadDeadline(time.Time{})
		c.abort()
	})
	return nil
}

// abort resets the stream if it has not ended. The context alone would not: HTTP/2 does not look at it while it waits for what to
// send.
func (c *conn) abort() {
	c.cancel() // or Close would wait for HTTP/2
	c.body.Close()
}

// LocalAddr is that of the tunnel's connection.
func (c *conn) LocalAddr() net.Addr { return c.session.link.LocalAddr() }

// RemoteAddr is what was dialled.
func (c *conn) RemoteAddr() net.Addr { return streamAddr(c.addr) }

// SetDeadline sets both deadlines.
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline breaks the stream when the time has come: unlike a socket's, it cannot be used any more.
func (c *conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	if t.IsZero() {
		return nil
	}
	var timer *time.Timer
	timer = time.AfterFunc(time.Until(t), func() {
		c.mu.Lock()
		current := c.timer == timer
		c.expired = c.expired || current
		c.mu.Unlock()
		if current {
			c.abort()
		}
	})
	c.timer = timer
	return nil
}

// streamAddr is the address of a stream's target.
type streamAddr string

// Network is needed for a net.Addr.
func (streamAddr) Network() string { return "tcp" }

func (a streamAddr) String() string { return string(a) }
