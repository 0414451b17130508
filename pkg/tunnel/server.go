// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/endpoints/request"
	listers "k8s.io/client-go/listers/core/v1"
)

// Mode says when tunnels are used.
type Mode string

// The modes, as --egress-selector-mode takes them.
const (
	Auto   Mode = "auto"   // when the direct way does not work
	Direct Mode = "direct" // never
	Always Mode = "tunnel" // to all nodes and pods for which there is one
)

// Modes lists the modes, the default first.
func Modes() []Mode { return []Mode{Auto, Direct, Always} }

// The user that a kubelet's certificate makes.
const (
	nodeUserPrefix = "system:node:"
	nodesGroup     = "system:nodes"
)

// ServerConfig is what an API server's side needs.
type ServerConfig struct {
	Mode Mode // empty is Auto
	// Nodes tells whose an address is. Nodes that the cluster no longer has are not used.
	Nodes listers.NodeLister
	// NodeName and Socket are this machine's, which has no tunnel to itself: see KedgePort. Its pods are dialled directly in each mode.
	NodeName, Socket string
	Log              *slog.Logger
}

// Server is the API server's side.
type Server struct {
	cfg    ServerConfig
	log    *slog.Logger
	health health
	direct func(ctx context.Context, network, addr string) (net.Conn, error)

	stopped  chan struct{}
	watchers sync.WaitGroup // one for each session

	mu       sync.Mutex
	sessions map[string][]*session // by node, the newest last
	changed  chan struct{}         // closed when a session was added
	avoid    map[path]time.Time    // until when direct ways are not tried first
}

// NewServer returns a server without tunnels.
func NewServer(cfg ServerConfig) *Server {
	return &Server{
		cfg: cfg, log: cfg.Log.With("component", "tunnel"), health: serverHealth,
		stopped:  make(chan struct{}),
		direct:   (&net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}).DialContext,
		sessions: map[string][]*session{}, changed: make(chan struct{}), avoid: map[path]time.Time{},
	}
}

// Sessions lists the nodes that have a tunnel open.
func (s *Server) Sessions() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.sessions))
}

// Why sessions are closed from this side.
var (
	errStops   = errors.New("the API server stops")
	errTooMany = errors.New("the node has opened too many")
)

// Close ends all tunnels and takes no new ones.
func (s *Server) Close() {
	s.mu.Lock()
	if !s.isClosed() {
		close(s.stopped)
	}
	s.mu.Unlock()
	s.watchers.Wait()
}

// ServeHTTP takes a node's connection at ConnectPath. It belongs behind the API server's authentication and authorization. It
// returns as soon as the tunnel is open, so that to the API server's limits and its shutdown this is a short request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	node, refusal := caller(r)
	if refusal == nil {
		refusal = checkUpgrade(r)
	}
	hijacker, ok := w.(http.Hijacker)
	switch {
	case refusal == nil && !ok:
		refusal = apierrors.NewInternalError(errors.New("a filter before this handler does not let it have the connection"))
	case refusal == nil && s.isClosed():
		refusal = apierrors.NewServiceUnavailable("this API server stops: the node will try again")
	}
	if refusal != nil {
		refuse(w, refusal)
		return
	}
	conn, buffered, err := hijacker.Hijack()
	if err != nil {
		refuse(w, apierrors.NewInternalError(err))
		return
	}
	// net/http has lifted its deadlines.
	_ = conn.SetWriteDeadline(time.Now().Add(openTimeout))
	if _, err := fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", upgradeProtocol); err != nil {
		conn.Close()
		return
	}
	_ = conn.SetWriteDeadline(time.Time{})
	session, err := newSession(r.Context(), node, newLink(conn, buffered.Reader, s.health.after), s.health)
	if err != nil {
		s.log.Warn("a node's tunnel failed at once", "node", node, "reason", err)
		conn.Close()
		return
	}
	s.add(session)
}

func (s *Server) isClosed() bool {
	select {
	case <-s.stopped:
		return true
	default:
		return false
	}
}

// maxSessions of one node. Streams in the older ones go on; those that a node has lost end with the next ping.
const maxSessions = 4

// add makes a session its node's, until it ends.
//
// An earlier one may be dead without this side knowing, or alive, when a node knows this API server by two addresses. To close it
// would cut its streams, and in the second case the node would come back at once and have the other one closed.
func (s *Server) add(t *session) {
	s.mu.Lock()
	if s.isClosed() {
		s.mu.Unlock()
		t.close(errStops)
		return
	}
	s.watchers.Go(func() {
		select {
		case <-t.link.closed:
		case <-s.stopped:
			t.close(errStops)
		}
		s.remove(t)
	})
	all := append(s.sessions[t.node], t)
	surplus := all[:max(0, len(all)-maxSessions)]
	s.sessions[t.node] = all
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
	s.log.Info("a node's tunnel is open", "node", t.node, "from", t.link.RemoteAddr().String(), "tunnels", len(all))
	for _, old := range surplus {
		old.close(errTooMany)
	}
}

func (s *Server) remove(t *session) {
	s.mu.Lock()
	left := slices.DeleteFunc(slices.Clone(s.sessions[t.node]), func(other *session) bool { return other == t })
	if len(left) > 0 {
		s.sessions[t.node] = left
	} else {
		delete(s.sessions, t.node)
	}
	s.mu.Unlock()
	t.http.Close() // streams that HTTP/2 has not ended yet
	s.log.Info("a node's tunnel has ended", "node", t.node, "reason", t.link.why(), "tunnels", len(left))
}

// caller is the node that asks.
func caller(r *http.Request) (string, *apierrors.StatusError) {
	user, ok := request.UserFrom(r.Context())
	if !ok {
		return "", apierrors.NewUnauthorized("tunnels are for nodes, by the client certificate of their kubelet")
	}
	node, ok := strings.CutPrefix(user.GetName(), nodeUserPrefix)
	if !ok || node == "" || !slices.Contains(user.GetGroups(), nodesGroup) {
		return "", apierrors.NewForbidden(schema.GroupResource{Resource: "tunnels"}, "",
			fmt.Errorf("%q is not a node: tunnels are opened with the client certificate of a kubelet", user.GetName()))
	}
	return node, nil
}

// checkUpgrade says what is wrong with a request that does not ask for a tunnel.
func checkUpgrade(r *http.Request) *apierrors.StatusError {
	switch {
	case r.Method != http.MethodGet:
		return apierrors.NewMethodNotSupported(schema.GroupResource{Resource: "tunnels"}, r.Method)
	case r.ProtoMajor != 1:
		return apierrors.NewBadRequest("a tunnel starts as HTTP/1.1, as HTTP/2 has no upgrade")
	case !strings.EqualFold(r.Header.Get("Upgrade"), upgradeProtocol) || !strings.EqualFold(r.Header.Get("Connection"), "upgrade"):
		return apierrors.NewBadRequest("this is where nodes open tunnels: it takes an upgrade to " + upgradeProtocol)
	}
	return nil
}

// refuse answers as the API does.
func refuse(w http.ResponseWriter, refusal *apierrors.StatusError) {
	status := refusal.Status()
	status.Kind, status.APIVersion = "Status", "v1"
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(int(status.Code))
	_ = json.NewEncoder(w).Encode(status)
}
