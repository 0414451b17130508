// SPDX-License-Identifier: Apache-2.0

package join

import (
	"net/url"
	"strings"
	"testing"
)

func TestParseServer(t *testing.T) {
	for text, want := range map[string]string{
		"https://192.0.2.1:6443":     "https://192.0.2.1:6443",
		"https://192.0.2.1:6443/":    "https://192.0.2.1:6443",
		"https://192.0.2.1":          "https://192.0.2.1:6443",
		"192.0.2.1":                  "https://192.0.2.1:6443",
		"192.0.2.1:443":              "https://192.0.2.1:443",
		" HTTPS://Server.Example\n":  "https://server.example:6443",
		"server":                     "https://server:6443",
		"https://[2001:db8::1]:6443": "https://[2001:db8::1]:6443",
		"[2001:db8::1]":              "https://[2001:db8::1]:6443",
		"[2001:DB8::1]:7000":         "https://[2001:db8::1]:7000",
	} {
		got, err := ParseServer(text)
		if err != nil || got != want {
			t.Errorf("%q: got %q, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"":                            "the server address is empty: give https://HOST:6443",
		"http://192.0.2.1:6443":       `the server address "http://192.0.2.1:6443" cannot be used: without TLS nothing can be checked; use https://`,
		"ftp://192.0.2.1":             `the server address "ftp://192.0.2.1" cannot be used: "ftp" is not https`,
		"https://192.0.2.1/api":       `the server address "https://192.0.2.1/api" cannot be used: there is something behind the port; only https://HOST:PORT is expected`,
		"https://192.0.2.1?x=1":       `the server address "https://192.0.2.1?x=1" cannot be used: there is something behind the port; only https://HOST:PORT is expected`,
		"https://192.0.2.1#":          `the server address "https://192.0.2.1#" cannot be used: there is something behind the port; only https://HOST:PORT is expected`,
		"https://me:pw@192.0.2.1":     `the server address "https://me:pw@192.0.2.1" cannot be used: there is a user name in it; only https://HOST:PORT is expected`,
		"2001:db8::1":                 `the server address "2001:db8::1" cannot be used: an IPv6 address stands in brackets, as in https://[2001:db8::1]:6443`,
		"https://2001:db8::1:6443":    `the server address "https://2001:db8::1:6443" cannot be used: an IPv6 address stands in brackets, as in https://[2001:db8::1:6443]:6443`,
		"https://[fe80::1%25eth0]:1":  `the server address "https://[fe80::1%25eth0]:1" cannot be used: fe80::1%eth0 is an address of one link only, and no certificate can hold it; use another address of the server`,
		"0.0.0.0":                     `the server address "0.0.0.0" cannot be used: 0.0.0.0 is not the address of a machine`,
		"https://":                    `the server address "https://" cannot be used: there is no host in it; give https://HOST:6443`,
		"https://:6443":               `the server address "https://:6443" cannot be used: there is no host in it; give https://HOST:6443`,
		"https://a:":                  `the server address "https://a:" cannot be used: the port behind the colon is missing`,
		"https://a:0":                 `the server address "https://a:0" cannot be used: 0 is no port: 1 to 65535`,
		"https://a:65536":             `the server address "https://a:65536" cannot be used: 65536 is no port: 1 to 65535`,
		"https://a:b":                 `the server address "https://a:b" cannot be used: it must be https://HOST:6443: invalid port ":b" after host`,
		"https://my_host":             `the server address "https://my_host" cannot be used: "my_host" is neither an IP address nor the name of a machine`,
		"https://192.0.2.1:6443 kedg": `the server address "https://192.0.2.1:6443 kedg" cannot be used: it must be https://HOST:6443: invalid port ":6443 kedg" after host`,
	} {
		if got, err := ParseServer(text); err == nil || err.Error() != want {
			t.Errorf("%q: got %q\n  %v\nwant\n  %s", text, got, err, want)
		}
	}
}

func FuzzParseServer(f *testing.F) {
	for _, s := range []string{"https://192.0.2.1:6443", "[2001:db8::1]:1", "host", "http://x", "a:b", "https://a@b/c?d#e", "[fe80::1%25eth0]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := ParseServer(text)
		if err != nil {
			return
		}
		again, err := ParseServer(got)
		if err != nil || again != got {
			t.Fatalf("%q became %q, and that %q, %v", text, got, again, err)
		}
		u, err := url.Parse(got)
		if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.Port() == "" || got != "https://"+u.Host || strings.ContainsAny(got, " @?#") {
			t.Errorf("%q became %q, %v", text, got, err)
		}
	})
}
