// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// errForeign is behind errors of rules that are not as this package writes them.
var errForeign = errors.New("not as Kedge writes it")

// The parts of nft's JSON that are read.
type (
	nftList struct {
		Objects []nftObject `json:"nftables"`
	}
	nftObject struct {
		Chain *nftChain `json:"chain"`
		Set   *nftSet   `json:"set"`
		Map   *nftSet   `json:"map"`
		Rule  *nftRule  `json:"rule"`
	}
	nftChain struct {
		Name string `json:"name"`
	}
	nftSet struct {
		Name string            `json:"name"`
		Type json.RawMessage   `json:"type"` // a name or a list of names
		Elem []json.RawMessage `json:"elem"`
		Keep int               `json:"timeout"` // s
	}
	nftRule struct {
		Chain   string    `json:"chain"`
		Comment string    `json:"comment"`
		Expr    []nftExpr `json:"expr"`
	}
	nftExpr struct {
		Match    *nftMatch        `json:"match"`
		Counter  *json.RawMessage `json:"counter"`
		Accept   present          `json:"accept"`
		Return   present          `json:"return"`
		Continue present          `json:"continue"`
		Drop     present          `json:"drop"`
	}
	nftMatch struct {
		Left struct {
			Payload struct{ Protocol, Field string } `json:"payload"`
			Meta    struct{ Key string }             `json:"meta"`
			Concat  []json.RawMessage                `json:"concat"`
		} `json:"left"`
		Right json.RawMessage `json:"right"`
	}
	nftValue struct {
		Set    []json.RawMessage `json:"set"`
		Range  []json.RawMessage `json:"range"`
		Concat []json.RawMessage `json:"concat"`
		Prefix *struct {
			Addr netip.Addr `json:"addr"`
			Len  int        `json:"len"`
		} `json:"prefix"`
		Jump *struct {
			Target string `json:"target"`
		} `json:"jump"`
	}
)

// present notes that a key is there: verdicts are keys without a value.
type present bool

// UnmarshalJSON implements [json.Unmarshaler].
func (p *present) UnmarshalJSON([]byte) error { *p = true; return nil }

// parseTable reads what `nft -j list table` prints. Of the rules of the fixed part it gives the comments.
func parseTable(text []byte) (*ruleset, map[string][]string, error) {
	var list nftList
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, nil, fmt.Errorf("nft: %w", err)
	}
	rules, base := &ruleset{chains: map[string][]rule{}, sets: map[string]set{}}, map[string][]string{}
	var errs []error
	for _, o := range list.Objects {
		var err error
		switch {
		case o.Chain != nil:
			if _, ours := directionOf(o.Chain.Name); ours {
				rules.chains[o.Chain.Name] = []rule{}
			}
		case o.Set != nil:
			err = rules.parseSet(o.Set, false)
		case o.Map != nil:
			err = rules.parseSet(o.Map, true)
		case o.Rule != nil:
			d, ours := directionOf(o.Rule.Chain)
			if !ours {
				base[o.Rule.Chain] = append(base[o.Rule.Chain], o.Rule.Comment)
				continue
			}
			var r rule
			if r, err = parseRule(o.Rule, d); err == nil {
				rules.chains[o.Rule.Chain] = append(rules.chains[o.Rule.Chain], r)
			}
		}
		errs = append(errs, err)
	}
	return rules, base, errors.Join(errs...)
}

func (s *ruleset) parseSet(n *nftSet, isMap bool) error {
	parsed := set{isMap: isMap, keep: time.Duration(n.Keep) * time.Second}
	var types []string
	if err := json.Unmarshal(n.Type, &types); err == nil {
		parsed.typ = strings.Join(types, " . ")
	} else if err := json.Unmarshal(n.Type, &parsed.typ); err != nil {
		return fmt.Errorf("set %s: %w", n.Name, err)
	}
	if parsed.keep > 0 {
		s.sets[n.Name] = parsed
		return nil
	}
	parsed.elems = make(map[string]string, len(n.Elem))
	for _, e := range n.Elem {
		value := ""
		if isMap {
			var pair [2]json.RawMessage
			var verdict nftValue
			if json.Unmarshal(e, &pair) != nil || json.Unmarshal(pair[1], &verdict) != nil || verdict.Jump == nil {
				return fmt.Errorf("map %s: element %s: %w", n.Name, e, errForeign)
			}
			e, value = pair[0], verdict.Jump.Target
		}
		key, err := parseKey(e)
		if err != nil {
			return fmt.Errorf("set %s: %w", n.Name, err)
		}
		parsed.elems[key] = value
	}
	s.sets[n.Name] = parsed
	return nil
}

// parseKey gives the key of an element in the notation of ruleset.
func parseKey(e json.RawMessage) (string, error) {
	var v nftValue
	if err := json.Unmarshal(e, &v); err != nil || len(v.Concat) == 0 {
		return parseScalar(e)
	}
	parts := make([]string, len(v.Concat))
	for i, c := range v.Concat {
		var err error
		if parts[i], err = parseScalar(c); err != nil {
			return "", err
		}
	}
	if len(parts) == 3 {
		parts[1] = protocolName(parts[1])
	}
	return strings.Join(parts, " . "), nil
}

// protocolName undoes what nft does without a list of protocols' names.
func protocolName(text string) string {
	switch text {
	case "6":
		return "tcp"
	case "17":
		return "udp"
	case "132":
		return "sctp"
	}
	return text
}

// parseScalar takes a string or a number. Addresses become the notation of netip, protocols names.
func parseScalar(e json.RawMessage) (string, error) {
	var text string
	if err := json.Unmarshal(e, &text); err != nil {
		var number uint32
		if err := json.Unmarshal(e, &number); err != nil {
			return "", fmt.Errorf("element %s: %w", e, errForeign)
		}
		return fmt.Sprint(number), nil
	}
	if a, err := netip.ParseAddr(text); err == nil {
		return a.String(), nil
	}
	return text, nil
}

func parseRule(n *nftRule, d direction) (rule, error) {
	r := rule{comment: n.Comment}
	for _, e := range n.Expr {
		switch {
		case e.Match != nil:
			if err := r.parseMatch(e.Match, d); err != nil {
				return r, fmt.Errorf("chain %s: %w", n.Chain, err)
			}
		case bool(e.Accept), bool(e.Return):
			r.verdict = d.allow()
			if bool(e.Accept) != (d == ingress) {
				return r, fmt.Errorf("chain %s: verdict: %w", n.Chain, errForeign)
			}
		case bool(e.Continue):
			r.verdict = verdictNone
		case bool(e.Drop):
			r.verdict = verdictDrop
		case e.Counter == nil:
			return r, fmt.Errorf("chain %s: statement: %w", n.Chain, errForeign)
		}
	}
	return r, nil
}

func (r *rule) parseMatch(m *nftMatch, d direction) error {
	var name string
	_ = json.Unmarshal(m.Right, &name) // a name, or something else below
	switch left := m.Left; {
	case len(left.Concat) == 3 && strings.HasPrefix(name, "@"):
		r.named = strings.TrimPrefix(name, "@")
		var first struct{ Payload struct{ Protocol string } }
		if err := json.Unmarshal(left.Concat[0], &first); err != nil {
			return err
		}
		return r.parseFamily(first.Payload.Protocol)
	case left.Meta.Key == "l4proto":
		name, err := parseScalar(m.Right)
		r.proto = protocolName(name)
		return err
	case left.Payload.Field == "dport":
		r.proto = left.Payload.Protocol
		var err error
		r.ports, err = parseRanges(m.Right, parsePorts)
		return err
	case left.Payload.Field == d.peer():
		if err := r.parseFamily(left.Payload.Protocol); err != nil {
			return err
		}
		if strings.HasPrefix(name, "@") {
			r.peers = strings.TrimPrefix(name, "@")
			return nil
		}
		var err error
		r.ranges, err = parseRanges(m.Right, parseAddrs)
		return err
	}
	return fmt.Errorf("match: %w", errForeign)
}

func (r *rule) parseFamily(protocol string) error {
	for _, f := range []family{v4, v6} {
		if f.ip() == protocol {
			r.family = f
			return nil
		}
	}
	return fmt.Errorf("match of %s: %w", protocol, errForeign)
}

// parseRanges takes one value, prefix or range, or a set of them.
func parseRanges[T any](text json.RawMessage, parse func(json.RawMessage) (T, error)) (all []T, err error) {
	items := []json.RawMessage{text}
	var v nftValue
	if json.Unmarshal(text, &v) == nil && v.Set != nil {
		items = v.Set
	}
	for _, item := range items {
		r, err := parse(item)
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return slices.Clip(all), nil
}

func parsePorts(text json.RawMessage) (r portRange, err error) {
	r.from, r.to, err = parseBounds[uint16](text)
	return r, err
}

func parseAddrs(text json.RawMessage) (r addrRange, err error) {
	var v nftValue
	if json.Unmarshal(text, &v) == nil && v.Prefix != nil {
		prefix, err := v.Prefix.Addr.Prefix(v.Prefix.Len)
		if err != nil {
			return r, err
		}
		return rangeOf(prefix), nil
	}
	r.from, r.to, err = parseBounds[netip.Addr](text)
	return r, err
}

func parseBounds[T any](text json.RawMessage) (from, to T, err error) {
	var v nftValue
	if json.Unmarshal(text, &v) == nil && len(v.Range) == 2 {
		err = errors.Join(json.Unmarshal(v.Range[0], &from), json.Unmarshal(v.Range[1], &to))
		return from, to, err
	}
	err = json.Unmarshal(text, &from)
	return from, from, err
}
