// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"
)

const (
	// headStart is what one way has before the next one is tried beside it.
	headStart = time.Second
	// avoidFor is how long a direct way that did not work is not the first one.
	avoidFor = time.Minute
)

// path is a direct way: to a node itself, or to its pods.
type path struct {
	node string
	pod  bool
}

// Dial connects to a kubelet, a pod or anything else. It fits the API server's egress selector.
//
// In mode Auto it tries the direct way and, if that fails or takes longer than a second, the tunnel beside it: the first
// connection wins. Refused is no final answer of the direct way, as firewalls refuse, too, and a node's address behind a router
// may be another machine's here; the node's own answer is.
func (s *Server) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	t, err := s.locate(addr)
	if err != nil {
		return nil, err
	}
	if t.node == "" {
		return s.direct(ctx, network, t.direct)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if _, port, _ := net.SplitHostPort(t.inside); port == strconv.Itoa(KedgePort) && !t.pod {
		return s.dialKedge(ctx, t)
	}
	direct := path{t.node, t.pod}
	ways := s.ways(network, t)
	conn, won, failures := race(ctx, ways)
	switch {
	case failures != nil:
		return nil, &dialError{target: t, failures: failures}
	case ways[won].name == directName:
		s.setAvoid(direct, time.Time{})
	case won > 0:
		s.setAvoid(direct, time.Now().Add(avoidFor))
	}
	return conn, nil
}

// dialKedge connects to the Kedge of a node.
func (s *Server) dialKedge(ctx context.Context, t target) (net.Conn, error) {
	if t.node == s.cfg.NodeName {
		return (&net.Dialer{}).DialContext(ctx, "unix", s.cfg.Socket)
	}
	now := make(chan struct{})
	close(now)
	session, err := s.await(ctx, t, now)
	if err != nil {
		return nil, &dialError{target: t, failures: []failure{{tunnelName, err}}}
	}
	return session.dial(ctx, t.inside)
}

// The names of ways in messages.
const (
	directName = "direct"
	tunnelName = "tunnel"
)

// way is one of several to make a connection.
type way struct {
	name string
	dial func(ctx context.Context) (net.Conn, error)
}

// ways gives the ways to a target, the first choice first.
func (s *Server) ways(network string, t target) []way {
	ended := make(chan struct{}) // the direct way
	direct := way{directName, func(ctx context.Context) (net.Conn, error) {
		defer close(ended)
		return s.direct(ctx, network, t.direct)
	}}
	tunnel := way{tunnelName, func(ctx context.Context) (net.Conn, error) {
		session, err := s.await(ctx, t, ended)
		if err != nil {
			return nil, err
		}
		if session.node == t.node {
			return session.dial(ctx, t.inside)
		}
		conn, err := session.dial(ctx, t.direct)
		if err != nil {
			err = fmt.Errorf("that of node %s: %w", session.node, err)
		}
		return conn, err
	}}
	open := s.pick(t) != nil && len(t.rivals) == 0
	switch {
	case s.cfg.Mode == Direct:
		return []way{direct}
	case s.cfg.Mode == Always && open && t.node != s.cfg.NodeName: // this machine has no tunnel to itself, and others may not reach its pods
		node := t
		node.pod = false
		if s.pick(node) != nil {
			return []way{tunnel}
		}
		// It may be about to come back, and what another node reaches is not certain.
		own := way{tunnelName, func(ctx context.Context) (net.Conn, error) {
			session, err := s.await(ctx, node, nil)
			if err != nil {
				return nil, err
			}
			return session.dial(ctx, t.inside)
		}}
		return []way{own, tunnel}
	case open && s.avoided(path{t.node, t.pod}):
		return []way{tunnel, direct}
	}
	return []way{direct, tunnel}
}

var errNoTunnel = errors.New("none is open from the node: is its kedge agent running?")

// await gives a session for the target. If there is none it waits for one as long as the direct way is under way: nodes are
// about to come back when this API server has just been started.
func (s *Server) await(ctx context.Context, t target, ended <-chan struct{}) (*session, error) {
	if len(t.rivals) > 0 {
		return nil, fmt.Errorf("the address is also that of %s in another network: give the nodes different addresses by --node-ip", strings.Join(t.rivals, ", "))
	}
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		if session := s.pick(t); session != nil {
			return session, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, errNoTunnel
		case <-ended:
			return nil, errNoTunnel
		}
	}
}

// pick gives a session by which the target can be reached: the node's own, or, for a pod, that of any node.
func (s *Server) pick(t target) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	if own := s.sessions[t.node]; len(own) > 0 {
		return own[len(own)-1]
	}
	if !t.pod {
		return nil
	}
	for node, others := range s.sessions { // in random order
		if _, err := s.cfg.Nodes.Get(node); err == nil {
			return others[len(others)-1]
		}
	}
	return nil
}

func (s *Server) avoided(p path) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.avoid[p])
}

func (s *Server) setAvoid(p path, until time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	for p, until := range s.avoid {
		if !until.After(now) {
			delete(s.avoid, p)
		}
	}
	if until.IsZero() {
		delete(s.avoid, p)
	} else {
		s.avoid[p] = until
	}
}

// failure is why a way failed.
type failure struct {
	way string
	err error
}

// race tries ways beside each other, each a head start after the one before, or at once when that has failed. It returns the first
// connection and which way that was, or all the failures, and leaves nothing behind.
func race(ctx context.Context, ways []way) (net.Conn, int, []failure) {
	ctx, cancel := context.WithCancel(ctx)
	type result struct {
		way  int
		conn net.Conn
		err  error
	}
	results := make(chan result)
	started, ended := 0, 0
	start := func() {
		i, began := started, time.Now()
		started++
		go func() {
			conn, err := ways[i].dial(ctx)
			results <- result{i, conn, explain(err, time.Since(began))}
		}()
	}
	defer func() {
		cancel()
		for ; ended < started; ended++ {
			if late := <-results; late.conn != nil {
				late.conn.Close()
			}
		}
	}()
	failures := make([]failure, len(ways))
	start()
	next := time.NewTimer(headStart)
	defer next.Stop()
	for {
		var begin <-chan time.Time
		if started < len(ways) {
			begin = next.C
		}
		select {
		case r := <-results:
			ended++
			if r.err == nil {
				return r.conn, r.way, nil
			}
			failures[r.way] = failure{ways[r.way].name, r.err}
			if ended == len(ways) {
				return nil, 0, failures
			}
			if started == ended {
				start()
				next.Reset(headStart)
			}
		case <-begin:
			start()
			next.Reset(headStart)
		}
	}
}

// explain makes a way's error fit to follow its name.
func explain(err error, took time.Duration) error {
	switch {
	case err == nil:
		return nil
	case isTimeout(err) || errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("no answer within %s%w", took.Round(100*time.Millisecond), silent{err})
	}
	return cause(err)
}

// silent is an error for errors.Is, but not for people.
type silent struct{ error }

func (silent) Error() string { return "" }

func (s silent) Unwrap() error { return s.error }

// dialError says which node, which ways, and what was wrong with each.
type dialError struct {
	target   target
	failures []failure
}

func (e *dialError) Error() string {
	var b strings.Builder
	if e.target.pod {
		fmt.Fprintf(&b, "pod %s on node %s", e.target.direct, e.target.node)
	} else {
		fmt.Fprintf(&b, "node %s (%s)", e.target.node, e.target.direct)
	}
	for i, f := range e.failures {
		b.WriteString([]string{": ", "; "}[min(i, 1)])
		fmt.Fprintf(&b, "%s: %s", f.way, f.err)
	}
	return b.String()
}

// Unwrap gives the failures to errors.Is.
func (e *dialError) Unwrap() []error {
	var errs []error
	for _, f := range e.failures {
		errs = append(errs, f.err)
	}
	return errs
}
