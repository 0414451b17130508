// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// drainTimeout is how long what a server has sent may take to reach the target when the server has let go of the stream.
const drainTimeout = 10 * time.Second

// forward is the node's handler of one stream: it dials the target and carries bytes both ways.
func (c *Client) forward(w http.ResponseWriter, r *http.Request) {
	c.handlers.RLock()
	defer c.handlers.RUnlock()
	target, err := netip.ParseAddrPort(r.Host)
	network, address := "tcp", r.Host
	switch {
	case r.Method != http.MethodConnect:
		http.Error(w, "a tunnel knows the method CONNECT only", http.StatusMethodNotAllowed)
		return
	case err != nil:
		http.Error(w, "a tunnel dials addresses with a port: "+err.Error(), http.StatusBadRequest)
		return
	case target.Port() == KedgePort && c.cfg.Socket != "":
		own, err := isOwn(target.Addr().Unmap())
		if err != nil || !own {
			http.Error(w, target.Addr().String()+" is another machine's: not allowed", http.StatusForbidden)
			return
		}
		network, address = "unix", c.cfg.Socket
	case !c.cfg.Allow(target):
		http.Error(w, fmt.Sprintf("%s is neither this node's kubelet nor a pod: not allowed", target), http.StatusForbidden)
		return
	}
	conn, err := (&net.Dialer{Timeout: targetTimeout}).DialContext(r.Context(), network, address)
	switch {
	case err != nil && isTimeout(err):
		http.Error(w, fmt.Sprintf("no answer within %s", targetTimeout), http.StatusGatewayTimeout)
	case err != nil:
		http.Error(w, cause(err).Error(), http.StatusBadGateway)
	default:
		carry(w, r, conn.(closer))
	}
}

// closer is a connection of which each direction ends for itself.
type closer interface {
	net.Conn
	CloseWrite() error
}

// carry connects a stream and a connection until both directions have ended, or one has failed.
func carry(w http.ResponseWriter, r *http.Request, conn closer) {
	defer conn.Close()
	ctl := http.NewResponseController(w)
	w.WriteHeader(http.StatusOK)
	if ctl.Flush() != nil {
		return
	}
	// When the server lets go of the stream, nothing is read from the target any more, but it still gets what was sent.
	defer context.AfterFunc(r.Context(), func() {
		_ = conn.SetReadDeadline(time.Now())
		_ = conn.SetWriteDeadline(time.Now().Add(drainTimeout))
	})()
	var toTarget sync.WaitGroup
	toTarget.Go(func() {
		body := &reader{Reader: r.Body}
		_, err := io.CopyBuffer(struct{ io.Writer }{conn}, body, make([]byte, frameSize))
		switch {
		case body.err != nil:
			if tcp, ok := conn.(*net.TCPConn); ok {
				_ = tcp.SetLinger(0) // the sender broke off: so does the node
			}
			_ = conn.SetReadDeadline(time.Now())
		case err == nil:
			_ = conn.CloseWrite()
		} // Else the target takes no more. What it sends still counts; if nothing, reading fails as well.
	})
	if err := fromTarget(w, ctl, conn); err != nil {
		_ = ctl.SetReadDeadline(time.Now()) // ends the other direction
	}
	toTarget.Wait()
}

// reader remembers that reading failed, to tell it from writing.
type reader struct {
	io.Reader
	err error
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return n, err
}

// fromTarget sends what comes from the target, each piece as one chunk in one frame. The last chunk says that it is complete.
func fromTarget(w io.Writer, ctl *http.ResponseController, conn io.Reader) error {
	const head, tail = len("0000\r\n"), len("\r\n")
	buf := make([]byte, frameSize)
	for {
		n, err := conn.Read(buf[head : frameSize-tail])
		if n > 0 {
			copy(buf, fmt.Sprintf("%04x\r\n", n))
			copy(buf[head+n:], "\r\n")
			if _, err := w.Write(buf[:head+n+tail]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			_, err = io.WriteString(w, "0\r\n\r\n")
			return errors.Join(err, ctl.Flush())
		case err != nil:
			return err
		}
		if err := ctl.Flush(); err != nil {
			return err
		}
	}
}
