// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// pair gives two nodes of which each way got no reply, or none for large packets; heard is what each says, nil if it does not know.
func pair(err error, device string, heardByA, heardByB []Heard) Facts {
	node := func(name, peer, address string, heard []Heard) *NodeReport {
		w := Way{Path: Path{peer, Overlay, netip.AddrPortFrom(netip.MustParseAddr(address), 0), "the pods", false}}
		if err != nil {
			w.Error = err.Error()
		}
		return &NodeReport{Node: name, Version: "v1", Ways: []Way{w}, Heard: heard, Links: []Link{{"eth0", 1500, false}, {device, 1450, true}}}
	}
	return Facts{Reports: map[string]*NodeReport{"a": node("a", "b", "10.42.2.0", heardByA), "b": node("b", "a", "10.42.1.0", heardByB)}}
}

func TestJudgeOverlay(t *testing.T) {
	lost, tooLarge := errors.New("no reply"), error(&mtuError{1450, errors.New("no reply")})
	none := []Heard{}
	of := func(peer string, large bool) []Heard { return []Heard{{peer, false, large}} }
	onlyOne := pair(lost, "flannel.1", none, of("a", true))
	onlyOne.Reports["b"].Ways[0].Error = ""
	for name, tt := range map[string]struct {
		facts Facts
		want  []string // level, about, parts of text and remedy
	}{
		"open":           {pair(nil, "flannel.1", nil, nil), nil},
		"closed to b":    {pair(lost, "flannel.1", of("b", true), none), []string{"problem a|of b (10.42.2.0): nothing that a sends arrives there; what b sends arrives here|port 8472 (VXLAN) from a to b:"}},
		"closed to a":    {pair(lost, "flannel.1", none, of("a", true)), []string{"problem b|of a (10.42.1.0): nothing that b sends arrives there; what a sends arrives here|port 8472 (VXLAN) from b to a:"}},
		"noticed by one": {onlyOne, []string{"problem b|nothing that b sends|from b to a:"}},
		"both":           {pair(lost, "flannel.1", none, none), []string{"problem a|in neither direction|between a and b in both directions"}},
		"wireguard":      {pair(lost, "flannel-wg", none, none), []string{"problem a|in neither direction|port 51820 (WireGuard) between a and b"}},
		"answers again":  {pair(lost, "flannel.1", of("b", true), of("a", true)), []string{"warning a|arrive in both directions|drops ICMP"}},
		"large to b":     {pair(tooLarge, "flannel.1", of("b", true), of("a", false)), []string{"problem a|small packets from a arrive there, those of 1450 bytes do not; in the other direction both|MTU"}},
		"large both": {pair(tooLarge, "flannel.1", of("b", false), of("a", false)),
			[]string{"problem a|small packets from a arrive|MTU", "problem b|small packets from b arrive|MTU"}},
		"nothing and large": {pair(lost, "flannel.1", of("b", false), none), []string{"problem a|nothing that a sends|from a to b:", "problem b|small packets from b arrive|MTU"}},
		"other family":      {pair(lost, "flannel.1", []Heard{{"b", true, true}}, of("a", true)), []string{"problem b|nothing that b sends|from b to a:"}},
		"one does not know": {pair(lost, "flannel.1", of("b", true), nil), []string{"problem a|no reply|between a and b in both", "problem b|no reply|between b and a in both"}},
		"none knows":        {pair(lost, "flannel-wg", nil, nil), []string{"problem a|no reply|51820", "problem b|no reply|51820"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := Judge(tt.facts)
			if len(got) != len(tt.want) {
				t.Fatalf("findings: %+v", got)
			}
			for i, f := range got {
				want := strings.Split(tt.want[i], "|")
				if string(f.Level)+" "+f.About != want[0] || !strings.Contains(f.Text, want[1]) || !strings.Contains(f.Remedy, want[2]) || f.Check != "ways" {
					t.Errorf("got %+v, want %q", f, want)
				}
			}
		})
	}
}

// Who is asked again sends on what failed in either direction, and what an old Kedge says is not taken for silence.
func TestSecondStep(t *testing.T) {
	f := pair(errors.New("no reply"), "flannel.1", nil, nil)
	f.Reports["b"].Ways[0].Error = ""
	f.Reports["c"] = &NodeReport{Node: "c"}
	asked := make(chan string, 9)
	var nonces [2][]byte
	err := f.listen(t.Context(), func(_ context.Context, node string, q Question) (*NodeReport, error) {
		for _, p := range q.Listen.Send {
			asked <- node + " " + p.Peer + " " + p.Address.Addr().String()
		}
		if node == "a" {
			nonces[0] = q.Listen.Nonce
			return &NodeReport{Heard: []Heard{}}, nil
		}
		nonces[1] = q.Listen.Nonce
		return &NodeReport{}, nil
	})
	close(asked)
	got := slices.Sorted(chanValues(asked))
	if diff := cmp.Diff([]string{"a b 10.42.2.0", "b a 10.42.1.0"}, got); diff != "" || err != nil {
		t.Error(err, diff)
	}
	if len(nonces[0]) != nonceSize || !slices.Equal(nonces[0], nonces[1]) || slices.Equal(nonces[0], make([]byte, nonceSize)) {
		t.Errorf("nonces %x", nonces)
	}
	if f.Reports["a"].Heard == nil || f.Reports["b"].Heard != nil || f.directed("a", "b") {
		t.Errorf("heard: %+v, %+v", f.Reports["a"].Heard, f.Reports["b"].Heard)
	}
}

func chanValues(c <-chan string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for s := range c {
			if !yield(s) {
				return
			}
		}
	}
}

func FuzzProbe(f *testing.F) {
	nonce := []byte("0123456789abcdef")
	ip4, ip6 := append([]byte{0x45}, make([]byte, 27)...), append([]byte{0x60}, make([]byte, 47)...)
	f.Add(append(slices.Clone(ip4), probe(nonce, small, "n1", 0)...))
	f.Add(append(slices.Clone(ip6), probe(nonce, large, "n2.example", 1400)...))
	f.Add(append(slices.Clone(ip4), nonce...))
	f.Add(append(append(slices.Clone(ip4), nonce...), "snever-ends"...))
	f.Fuzz(func(t *testing.T, packet []byte) {
		h, ok := parseProbe(packet, nonce)
		if ok != (h.Peer != "") || ok && len(packet) < nonceSize+3 {
			t.Errorf("%x: %+v, %v", packet, h, ok)
		}
	})
}

func TestOverlayMTU(t *testing.T) {
	v4, v6 := netip.MustParseAddr("10.42.0.0"), netip.MustParseAddr("fd42::")
	vxlan := []Link{{"eth0", 1500, false}, {"flannel-v6.1", 1430, true}, {"flannel.1", 1450, true}}
	wireguard := []Link{{"flannel-wg", 1420, true}, {"flannel-wg-v6", 1400, true}}
	for _, tt := range []struct {
		links []Link
		to    netip.Addr
		want  int
	}{{vxlan, v4, 1450}, {vxlan, v6, 1430}, {wireguard, v4, 1420}, {wireguard, v6, 1400}, {wireguard[:1], v6, 1420}, {vxlan[1:2], v6, 1430}, {vxlan[:1], v4, 0}} {
		if got := overlayMTU(tt.links, tt.to); got != tt.want {
			t.Errorf("%v to %s: %d, want %d", tt.links, tt.to, got, tt.want)
		}
	}
}

func TestProbe(t *testing.T) {
	nonce := []byte("0123456789abcdef")
	packet := append([]byte{0x60}, probe(nonce, large, "n2", 1000)...)
	if h, ok := parseProbe(packet, nonce); !ok || h != (Heard{"n2", true, true}) || len(packet) != 1001 {
		t.Errorf("%+v, %v, %d bytes", h, ok, len(packet))
	}
	if _, ok := parseProbe(packet, []byte("another nonce 16")); ok {
		t.Error("a probe of somebody else was taken")
	}
}
