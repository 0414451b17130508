// SPDX-License-Identifier: Apache-2.0

// Package tunnel connects API servers to kubelets and pods, directly or through a connection that the node has opened.
//
// Client is the node's side, in the supervisor. It keeps one TLS connection open to every API server: an HTTP/1.1 upgrade at
// ConnectPath, so that the API server's authentication, authorization and audit apply, and HTTP/2 from then on, with the roles
// turned round: the node is the HTTP/2 server. Server is the API server's side. Its Dial chooses the way, and ServeEgress
// offers that to the API server's egress selector.
//
// Each connection is one stream of method CONNECT whose authority is the address that the node shall dial. The request body is
// what goes to the target, plainly; its end is the half-close. The response body is what comes from the target, in HTTP/1.1's
// chunked coding; the last chunk is the half-close, and a body without one was cut off. The coding is there because net/http
// ends a response only when its handler returns, which ends the request, too (docs/decisions/tunnel.md).
package tunnel

import (
	"errors"
	"net"
	"net/http"
	"os"
	"time"
)

// ConnectPath is where the API server takes tunnels.
const ConnectPath = "/kedge/v1/connect"

// upgradeProtocol is what the Upgrade header asks for.
const upgradeProtocol = "kedge-tunnel"

// KedgePort is the port of a node's own addresses at which API servers ask the Kedge of that node: what is sent there goes to
// ClientConfig.Socket, through the node's tunnel. Nothing listens at it (tcpmux, whose number it is, is not used any more), and so
// nodes/http:NAME:1/proxy of the API server is this, behind the API server's authentication and authorization.
const KedgePort = 1

// KubeletPort is the port at a node's own addresses that its kubelet serves.
const KubeletPort = 10250

const (
	// dialTimeout bounds a Dial. The egress client waits for its proxy without a limit of its own.
	dialTimeout = 10 * time.Second
	// targetTimeout bounds the node's part of it, so that its answer comes in time.
	targetTimeout = 8 * time.Second
	// openTimeout bounds the opening of a tunnel.
	openTimeout = 15 * time.Second
)

// health is when a quiet connection is asked for a sign of life, and how long the answer may take.
type health struct{ after, timeout time.Duration }

// The API server's side asks; the node's would only if it were not asked, so that an idle tunnel costs one ping. A dead peer is
// noticed after 35 and 45 seconds. Home routers forget a connection after a minute of silence or more.
var (
	serverHealth = health{after: 20 * time.Second, timeout: 15 * time.Second}
	nodeHealth   = health{after: 30 * time.Second, timeout: 15 * time.Second}
)

const (
	// frameSize is HTTP/2's smallest limit: each open stream holds a few buffers of that size.
	frameSize = 16 << 10
	// streamWindow bounds what a side keeps of one stream whose reader is slow: 10 MB/s at 50 ms of round trip. A stream whose
	// reader is not slow keeps nothing.
	streamWindow = 512 << 10
	// connWindow is as good as none: slow readers hold up themselves only, never the streams beside them.
	connWindow = 1 << 30
	// maxStreams at a time in a tunnel.
	maxStreams = 4096
)

// http2Config is the configuration of either side.
func http2Config(h health) *http.HTTP2Config {
	return &http.HTTP2Config{
		MaxConcurrentStreams:          maxStreams,
		MaxReadFrameSize:              frameSize,
		MaxReceiveBufferPerConnection: connWindow,
		MaxReceiveBufferPerStream:     streamWindow,
		SendPingTimeout:               h.after,
		PingTimeout:                   h.timeout,
	}
}

// http2Only is HTTP/2 without an upgrade or a negotiation: the connection has both behind it.
func http2Only() *http.Protocols {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return p
}

// cause leaves out of an error what its reader knows already: operation and addresses, which have ports that change.
func cause(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err
	}
	if sys, ok := errors.AsType[*os.SyscallError](err); ok {
		err = sys.Err
	}
	return err
}

// isTimeout says whether nobody answered, as opposed to an answer that is an error.
func isTimeout(err error) bool {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return true
	}
	timeout, ok := errors.AsType[net.Error](err)
	return ok && timeout.Timeout()
}
