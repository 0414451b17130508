// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
)

// Back-off of a client. A server that comes back is used again at once, and a hundred nodes do not come back in one instant.
const (
	reconnectFirst = 300 * time.Millisecond
	reconnectLast  = 10 * time.Second
	reconnectReset = time.Minute // a connection that has lasted so long was a good one
)

// ClientConfig is what a node's side needs.
type ClientConfig struct {
	// TLS is called for each connection and gives the kubelet's client certificate, as it is then, and the server's CA.
	TLS func() (*tls.Config, error)
	// Allow decides what servers may have dialled: see Policy.
	Allow func(netip.AddrPort) bool
	// Socket is a unix socket that serves what servers may ask of this node's Kedge: see KedgePort. Empty: nothing.
	Socket string
	Log    *slog.Logger
}

// Client is the node's side: one connection to each server, opened again when it breaks.
type Client struct {
	cfg    ClientConfig
	log    *slog.Logger
	health health
	dialer interface { // of servers
		DialContext(ctx context.Context, network, addr string) (net.Conn, error)
	}

	accept   acceptor
	handlers sync.RWMutex // held for reading by each stream
	kick     chan struct{}

	mu      sync.Mutex
	servers []string
	links   map[string]Link
}

// Link is the state of the connection to one server.
type Link struct {
	Server string    `json:"server"`
	Open   bool      `json:"open"`
	Since  time.Time `json:"since"`
	Reason string    `json:"reason,omitempty"` // why it is not open
}

// NewClient returns a client without servers.
func NewClient(cfg ClientConfig) *Client {
	return &Client{
		cfg: cfg, log: cfg.Log.With("component", "tunnel"), health: nodeHealth,
		// Pings tell more than TCP's keep-alive and cost the same.
		dialer: &net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: false}, KeepAlive: -1},
		accept: acceptor{conns: make(chan net.Conn), closed: make(chan struct{})},
		kick:   make(chan struct{}, 1),
		links:  map[string]Link{},
	}
}

// SetServers says which API servers there are, as host:port, each once. Connections to others are closed.
func (c *Client) SetServers(addrs []string) {
	c.mu.Lock()
	c.servers = slices.Clone(addrs)
	c.mu.Unlock()
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// Links gives the state of the connections, by server.
func (c *Client) Links() []Link {
	c.mu.Lock()
	defer c.mu.Unlock()
	var links []Link
	for _, l := range c.links {
		links = append(links, l)
	}
	slices.SortFunc(links, func(a, b Link) int { return strings.Compare(a.Server, b.Server) })
	return links
}

// Run keeps the connections until ctx ends, and returns when everything has ended. It is called once.
func (c *Client) Run(ctx context.Context) error {
	srv := &http.Server{
		Handler: http.HandlerFunc(c.forward), Protocols: http2Only(), HTTP2: http2Config(c.health), MaxHeaderBytes: 8 << 10,
		ErrorLog: slog.NewLogLogger(c.log.Handler(), slog.LevelDebug), ReadHeaderTimeout: openTimeout,
	}
	var running sync.WaitGroup
	running.Go(func() { _ = srv.Serve(&c.accept) })
	keepers := map[string]context.CancelFunc{}
	for ctx.Err() == nil {
		c.mu.Lock()
		want := slices.Clone(c.servers)
		c.mu.Unlock()
		for server, stop := range keepers {
			if !slices.Contains(want, server) {
				stop()
				delete(keepers, server)
			}
		}
		for _, server := range want {
			if keepers[server] == nil {
				var one context.Context
				one, keepers[server] = context.WithCancel(ctx)
				running.Go(func() { c.keep(one, server) })
			}
		}
		select {
		case <-ctx.Done():
		case <-c.kick:
		}
	}
	for _, stop := range keepers {
		stop()
	}
	_ = srv.Close() // all connections, and with them their streams
	running.Wait()
	c.handlers.Lock() // the last stream
	defer c.handlers.Unlock()
	return nil
}

// keep has a connection to one server for as long as ctx lives.
func (c *Client) keep(ctx context.Context, server string) {
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !slices.Contains(c.servers, server) {
			delete(c.links, server)
		}
	}()
	fresh := wait.Backoff{Duration: reconnectFirst, Factor: 2, Jitter: 0.5, Steps: 8, Cap: reconnectLast}
	for backoff, said := fresh, ""; ; {
		opened, err := c.once(ctx, server)
		if ctx.Err() != nil {
			return
		}
		if opened.IsZero() {
			err = fmt.Errorf("cannot open it: %w", err)
		} else if time.Since(opened) > reconnectReset {
			backoff, said = fresh, ""
		}
		next := backoff.Step()
		c.note(Link{Server: server, Reason: err.Error()})
		// One line for one reason, however often it is tried.
		level := slog.LevelDebug
		if said != err.Error() {
			said, level = err.Error(), slog.LevelWarn
		}
		c.log.Log(ctx, level, "no tunnel to the server, will keep trying", "server", server, "reason", err, "in", next.Round(time.Millisecond))
		select {
		case <-ctx.Done():
			return
		case <-time.After(next):
		}
	}
}

// once opens a connection and has it served until it ends. It returns since when it was open, if it was, and why it is not.
func (c *Client) once(ctx context.Context, server string) (time.Time, error) {
	l, err := c.open(ctx, server)
	if err != nil {
		return time.Time{}, err
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	if !c.accept.offer(l) {
		l.Close()
		return time.Time{}, net.ErrClosed
	}
	opened := time.Now()
	c.note(Link{Server: server, Open: true})
	c.log.Info("tunnel to the server is open", "server", server)
	<-l.closed
	return opened, l.why()
}

// note keeps the state of a connection for Links.
func (c *Client) note(l Link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if have, ok := c.links[l.Server]; ok && have.Open == l.Open {
		l.Since = have.Since
	} else {
		l.Since = time.Now()
	}
	c.links[l.Server] = l
}

// open connects to a server and makes the connection a tunnel.
func (c *Client) open(ctx context.Context, server string) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	host, _, err := net.SplitHostPort(server)
	if err != nil {
		return nil, fmt.Errorf("address of a server: %w", err)
	}
	shared, err := c.cfg.TLS()
	if err != nil {
		return nil, fmt.Errorf("the node's client certificate: %w", err)
	}
	cfg := shared.Clone()
	cfg.NextProtos = []string{"http/1.1"} // HTTP/2 has no upgrade
	if cfg.ServerName == "" {
		cfg.ServerName = host
	}
	raw, err := c.dialer.DialContext(ctx, "tcp", server)
	if err != nil {
		return nil, cause(err)
	}
	conn := tls.Client(raw, cfg)
	// Everything until the upgrade's answer ends with ctx.
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	early, err := upgrade(ctx, conn, server)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		raw.Close()
		switch {
		case ctx.Err() != nil:
			err = fmt.Errorf("no answer within %s", openTimeout)
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			err = errors.New("the server closed the connection without an answer")
		}
		return nil, cause(err)
	}
	return newLink(conn, early, c.health.after), nil
}

// upgrade asks for the tunnel. The reader may hold the first bytes of HTTP/2.
func upgrade(ctx context.Context, conn *tls.Conn, server string) (*bufio.Reader, error) {
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+server+ConnectPath, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", upgradeProtocol)
	req.Header.Set("User-Agent", "kedge")
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	r := bufio.NewReader(conn)
	res, err := http.ReadResponse(r, req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode == http.StatusSwitchingProtocols && strings.EqualFold(res.Header.Get("Upgrade"), upgradeProtocol) {
		return r, nil
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(res.Body, 4<<10)) // what has come of it
	var status metav1.Status
	if err := json.Unmarshal(body, &status); err == nil && status.Message != "" {
		return nil, fmt.Errorf("the server answers %s: %s", res.Status, status.Message)
	}
	return nil, fmt.Errorf("the server answers %s: is it of a Kedge version without tunnels?", res.Status)
}

// acceptor is the listener that hands the tunnels to the HTTP server.
type acceptor struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

// offer says whether the connection was taken.
func (a *acceptor) offer(conn net.Conn) bool {
	select {
	case a.conns <- conn:
		return true
	case <-a.closed:
		return false
	}
}

// Accept waits for a tunnel.
func (a *acceptor) Accept() (net.Conn, error) {
	select {
	case conn := <-a.conns:
		return conn, nil
	case <-a.closed:
		return nil, net.ErrClosed
	}
}

// Close makes Accept return.
func (a *acceptor) Close() error {
	a.once.Do(func() { close(a.closed) })
	return nil
}

// Addr is needed for a net.Listener.
func (a *acceptor) Addr() net.Addr { return pipeAddr{} }

// pipeAddr is the address of what has none.
type pipeAddr struct{}

// Network is needed for a net.Addr.
func (pipeAddr) Network() string { return "tunnel" }

func (pipeAddr) String() string { return "tunnel" }
