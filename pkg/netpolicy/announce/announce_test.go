// SPDX-License-Identifier: Apache-2.0

package announce

import (
	"net/netip"
	"strings"
	"testing"
)

func TestValidate(t *testing.T) {
	good := Pod{Container: "0123abc", Namespace: "a", Name: "p", Addresses: []netip.Addr{netip.MustParseAddr("10.42.0.2"), netip.MustParseAddr("fd00::2")}}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Pod){
		"path":       func(p *Pod) { p.Container = "../x" },
		"no ID":      func(p *Pod) { p.Container = "" },
		"hidden":     func(p *Pod) { p.Container = ".x" },
		"no name":    func(p *Pod) { p.Name = "" },
		"no address": func(p *Pod) { p.Addresses = nil },
		"mapped":     func(p *Pod) { p.Addresses = []netip.Addr{netip.MustParseAddr("::ffff:10.0.0.1")} },
		"zone":       func(p *Pod) { p.Addresses = []netip.Addr{netip.MustParseAddr("fe80::1%eth0")} },
		"invalid":    func(p *Pod) { p.Addresses = []netip.Addr{{}} },
	} {
		bad := good
		change(&bad)
		if bad.Validate() == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestAnswer(t *testing.T) {
	for text, want := range map[string]string{
		"HTTP/1.0 204 No Content\r\n\r\n":                              "",
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok":               "",
		"HTTP/1.0 503 Service Unavailable\r\nA: b\r\n\r\nthe reason\n": "the reason",
		"HTTP/1.0 503 Service Unavailable\r\n":                         "the node process's answer: EOF",
		"SSH-2.0-x\r\n\r\n":                                            `the node process's answer: "SSH-2.0-x" is not HTTP`,
		"HTTP/1.0 abc\r\n\r\n":                                         `the node process's answer: status "abc"`,
		"":                                                             "the node process's answer: EOF",
	} {
		got := ""
		if err := readAnswer(strings.NewReader(text)); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add("HTTP/1.0 503 Service Unavailable\r\nA: b\r\n\r\nthe reason\n")
	f.Fuzz(func(t *testing.T, text string) {
		if err := readAnswer(strings.NewReader(text)); err == nil && !strings.HasPrefix(text, "HTTP/1.") {
			t.Errorf("%q: no error", text)
		}
	})
}
