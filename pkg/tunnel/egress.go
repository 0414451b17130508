// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"
)

// EgressConfig is the API server's --egress-selector-config-file for a socket of ServeEgress.
//
// Traffic "cluster" goes to kubelets, pods, and webhooks and APIs that are Services. The other two are left out, not Direct: that
// would make the API server dial etcd's unix socket as TCP.
func EgressConfig(socket string) []byte {
	return fmt.Appendf(nil, `apiVersion: apiserver.k8s.io/v1beta1
kind: EgressSelectorConfiguration
egressSelections:
- name: cluster
  connection:
    proxyProtocol: HTTPConnect
    transport:
      uds:
        udsName: %q
`, socket)
}

// ServeEgress is the HTTP CONNECT proxy on a unix socket by which the API server dials. It returns when ctx has ended and its
// connections have.
func (s *Server) ServeEgress(ctx context.Context, socket string) error {
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("egress socket: %w", err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("egress socket: %w", err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		l.Close()
		return fmt.Errorf("egress socket: %w", err)
	}
	var relays sync.RWMutex // held for reading by each
	srv := &http.Server{
		ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 8 << 10, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return ctx },
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			relays.RLock()
			defer relays.RUnlock()
			s.egress(ctx, w, r)
		}),
	}
	defer context.AfterFunc(ctx, func() { srv.Close() })()
	err = srv.Serve(l)
	relays.Lock()
	defer relays.Unlock()
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("egress socket: %w", err)
}

// egress serves one connection of the API server.
func (s *Server) egress(ctx context.Context, w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect {
		http.Error(w, "this is the API server's way to nodes and pods: it knows CONNECT only", http.StatusMethodNotAllowed)
		return
	}
	far, dialErr := s.Dial(r.Context(), "tcp", r.Host)
	if dialErr == nil {
		defer far.Close()
	}
	near, buffered, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer near.Close()
	_ = near.SetWriteDeadline(time.Now().Add(dialTimeout))
	if dialErr != nil {
		_, _ = io.WriteString(near, refusalHead(dialErr))
		return
	}
	// Nothing may follow in the same packet: the client would take it for an error. It speaks first.
	if _, err := io.WriteString(near, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}
	_ = near.SetWriteDeadline(time.Time{})
	defer context.AfterFunc(ctx, func() { near.Close(); far.Close() })()
	early := io.LimitReader(buffered.Reader, int64(buffered.Reader.Buffered()))
	if _, err := io.Copy(far, early); err != nil {
		return
	}
	relay(near, far)
}

// refusalHead is an answer whose status line has the reason: of all that a proxy answers, the API server shows that line to users.
func refusalHead(err error) string {
	status := http.StatusBadGateway
	if isTimeout(err) || errors.Is(err, context.DeadlineExceeded) {
		status = http.StatusGatewayTimeout
	}
	text := []rune(strings.Map(func(c rune) rune {
		if unicode.IsControl(c) || c == unicode.ReplacementChar {
			return ' '
		}
		return c
	}, err.Error()))
	return fmt.Sprintf("HTTP/1.1 %d %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", status, string(text[:min(len(text), 1000)]))
}

// relay carries bytes both ways until both directions have ended, or one has failed.
func relay(a, b net.Conn) {
	var other sync.WaitGroup
	other.Go(func() { half(a, b) })
	half(b, a)
	other.Wait()
}

// half carries bytes one way and then the end of them.
func half(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if closer, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
		_ = closer.CloseWrite()
		return
	}
	to.Close()
	from.Close()
}
