// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// greet answers everybody on TCP and UDP ports, and remembers who came: `NAME CLIENT` once a connection is open, then an echo of
// every line; the same for every datagram. NAME is the variable NAME or the host's.
func (s *server) greet(ports string) error {
	for port := range strings.FieldsFuncSeq(ports, func(r rune) bool { return r == ',' }) {
		l, err := net.Listen("tcp", ":"+port)
		if err != nil {
			return err
		}
		go s.greetConnections(l)
		if err := s.greetDatagramsOn(port); err != nil {
			return err
		}
	}
	return nil
}

// greetDatagramsOn listens on each address by itself: an answer from a socket for all addresses has the one that the kernel likes.
func (s *server) greetDatagramsOn(port string) error {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	done := map[string]bool{} // several interfaces of a node have one address
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		if !ok || n.IP.IsLinkLocalUnicast() || done[n.IP.String()] {
			continue
		}
		done[n.IP.String()] = true
		p, err := net.ListenPacket("udp", net.JoinHostPort(n.IP.String(), port))
		if err != nil {
			return err
		}
		go s.greetDatagrams(p)
	}
	return nil
}

func (s *server) greetConnections(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		s.saw("tcp", c.RemoteAddr())
		go func() {
			defer c.Close()
			if _, err := fmt.Fprintln(c, s.name, c.RemoteAddr()); err == nil {
				_, _ = io.Copy(c, c) // until the client goes away
			}
		}()
	}
}

func (s *server) greetDatagrams(p net.PacketConn) {
	b := make([]byte, 1500)
	for {
		_, client, err := p.ReadFrom(b)
		if err != nil {
			return
		}
		s.saw("udp", client)
		_, _ = p.WriteTo(fmt.Appendln(nil, s.name, client), client) // the client tells whether it got there
	}
}

// visitor is who came to a port of greet.
type visitor struct {
	First, Last time.Time
	Count       int
}

func (s *server) saw(network string, client net.Addr) {
	host, _, err := net.SplitHostPort(client.String())
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.seen[network+" "+host]
	if !ok {
		v = &visitor{First: time.Now()}
		s.seen[network+" "+host] = v
	}
	v.Last = time.Now()
	v.Count++
}

// target is something to reach, as text a word and an address with port:
//
//	tcp, udp            a port of greet, each time with a new socket
//	held-tcp, held-udp  the same with one socket that is kept
//	connect             any TCP port
//	dns                 a DNS server
type target struct {
	kind, addr string

	conn  net.Conn // of the held ones
	lines *bufio.Reader
}

func parseTargets(text string) []*target {
	var targets []*target
	for line := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == '\n' || r == ';' }) {
		kind, addr, _ := strings.Cut(strings.TrimSpace(line), " ")
		targets = append(targets, &target{kind: kind, addr: addr})
	}
	return targets
}

// question is a DNS query for the root's name servers.
const question = "\x4b\x45\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x01"

// try reaches the target once and returns its answer.
func (t *target) try(ctx context.Context) (string, error) {
	network, held := strings.CutPrefix(t.kind, "held-")
	switch network {
	case "dns":
		network = "udp"
	case "connect":
		network = "tcp"
	}
	if t.conn == nil {
		c, err := new(net.Dialer).DialContext(ctx, network, t.addr)
		if err != nil || t.kind == "connect" {
			if err == nil {
				err = c.Close()
			}
			return "", err
		}
		t.conn, t.lines = c, bufio.NewReader(c)
		if !held {
			defer func() {
				c.Close()
				t.conn = nil
			}()
		}
		if network == "tcp" {
			text, err := t.line(ctx, "")
			if err != nil && held {
				c.Close()
				t.conn = nil
			}
			return text, err
		}
	}
	switch t.kind {
	case "dns":
		return "", t.ask(ctx)
	case "udp", "held-udp":
		return t.line(ctx, "hello\n")
	}
	return t.line(ctx, time.Now().Format(time.RFC3339Nano)+"\n")
}

// line says something and returns the line that is answered; over TCP it has to be the same.
func (t *target) line(ctx context.Context, say string) (string, error) {
	deadline, _ := ctx.Deadline()
	if err := t.conn.SetDeadline(deadline); err != nil {
		return "", err
	}
	if _, err := io.WriteString(t.conn, say); err != nil {
		return "", err
	}
	got, err := t.lines.ReadString('\n')
	if err == nil && t.kind == "held-tcp" && say != "" && got != say {
		err = fmt.Errorf("answered %q instead of %q", got, say) // an earlier answer, late
	}
	return strings.TrimSpace(got), err
}

func (t *target) ask(ctx context.Context) error {
	deadline, _ := ctx.Deadline()
	_, err := io.WriteString(t.conn, question)
	if err := errors.Join(err, t.conn.SetDeadline(deadline)); err != nil {
		return err
	}
	b := make([]byte, 4096)
	n, err := t.conn.Read(b)
	if err == nil && (n < 12 || string(b[:2]) != question[:2]) {
		err = fmt.Errorf("no answer of a DNS server: %x", b[:n])
	}
	return err
}

// watched is a target that is tried again and again, and how that went. After a failure a held TCP connection that was open is never
// tried again: that another one can be opened is not the question.
type watched struct {
	Target            string
	Tries, OK         int
	FirstOK, LastOK   time.Time
	FirstBad, LastBad time.Time
	Streak, Worst     int // of failures: the last one, the longest one
	Error             string
}

// watch tries a target until ctx ends.
func (s *server) watch(ctx context.Context, t *target, every, timeout time.Duration) {
	w := &watched{Target: t.kind + " " + t.addr}
	s.mu.Lock()
	s.watches = append(s.watches, w)
	s.mu.Unlock()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		begin := time.Now()
		attempt, cancel := context.WithTimeout(ctx, timeout)
		_, err := t.try(attempt)
		cancel()
		if ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		w.add(begin, err)
		lost := err != nil && t.kind == "held-tcp" && w.OK > 0
		s.mu.Unlock()
		if lost {
			<-ctx.Done()
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (w *watched) add(at time.Time, err error) {
	w.Tries++
	if err == nil {
		w.OK++
		w.Streak, w.LastOK = 0, at
		if w.FirstOK.IsZero() {
			w.FirstOK = at
		}
		return
	}
	w.Streak++
	w.Worst, w.LastBad, w.Error = max(w.Worst, w.Streak), at, err.Error()
	if w.FirstBad.IsZero() {
		w.FirstBad = at
	}
}
