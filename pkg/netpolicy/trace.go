// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

const tracePath = "/v1/trace"

// Question is about a new connection.
type Question struct {
	From     netip.Addr `json:"from"`
	To       netip.Addr `json:"to"`
	Protocol string     `json:"protocol"` // tcp, udp or sctp
	Port     uint16     `json:"port"`
}

// Answer is what the rules of one node say. A direction is nil when the pod that it is about is not on that node.
type Answer struct {
	Node    string    `json:"node"`
	Egress  *Decision `json:"egress,omitempty"`
	Ingress *Decision `json:"ingress,omitempty"`
}

// Query asks the node process whose socket is on this machine.
func Query(ctx context.Context, socket string, q Question) (Answer, error) {
	var answer Answer
	body, err := json.Marshal(q)
	if err != nil {
		return answer, err
	}
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://kedge"+tracePath, bytes.NewReader(body))
	if err != nil {
		return answer, err
	}
	res, err := client.Do(req)
	if err != nil {
		return answer, fmt.Errorf("the node process does not answer at %s: does Kedge run here, with network policies, and are you root? %w", socket, err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return answer, err
	}
	if res.StatusCode != http.StatusOK {
		return answer, errors.New(strings.TrimSpace(string(text)))
	}
	return answer, json.Unmarshal(text, &answer)
}

// trace decides by the rules that the kernel has now, not by those that it should have.
func (c *Controller) trace(ctx context.Context, q Question) (Answer, error) {
	answer := Answer{Node: c.cfg.NodeName}
	if !q.From.IsValid() || !q.To.IsValid() || familyOf(q.From.Unmap()) != familyOf(q.To.Unmap()) || !slices.Contains(protocols(), q.Protocol) {
		return answer, errors.New("two addresses of one family and a protocol out of tcp, udp and sctp are needed")
	}
	k, err := newKernel()
	if err != nil {
		return answer, err
	}
	rules, _, err := k.read(ctx)
	if err != nil {
		return answer, err
	}
	if rules == nil {
		return answer, errors.New("no rules are loaded on this node: nothing is enforced, and no pod is started")
	}
	local, err := localAddresses()
	if err != nil {
		return answer, err
	}
	c.mu.Lock()
	cidrs := c.podCIDRs
	c.mu.Unlock()
	f := flow{from: q.From.Unmap(), to: q.To.Unmap(), proto: q.Protocol, port: q.Port}
	for _, d := range directions() {
		var decision *Decision
		pod := f.side(d)
		switch mine := slices.ContainsFunc(cidrs, func(p netip.Prefix) bool { return p.Contains(pod) }); {
		case d == ingress && local[f.from] && rules.knows(pod):
			decision = &Decision{Allowed: true, Reason: "the node may always reach its own pods"}
		case rules.knows(pod):
			decision = new(rules.decide(d, f))
		case mine && !local[pod]:
			decision = &Decision{Reason: fmt.Sprintf("%s is in this node's range, but no pod that Kedge knows has it", pod)}
		}
		if d == ingress {
			answer.Ingress = decision
		} else {
			answer.Egress = decision
		}
	}
	return answer, nil
}
