// SPDX-License-Identifier: Apache-2.0

package join

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
)

const defaultPort = "6443"

// ParseServer reads the address of a server as people type it and completes it to https://HOST:PORT.
func ParseServer(text string) (string, error) {
	text = strings.TrimSpace(text)
	wrong := func(format string, args ...any) (string, error) {
		return "", fmt.Errorf("the server address %q cannot be used: %w", text, fmt.Errorf(format, args...))
	}
	scheme, rest, ok := strings.Cut(text, "://")
	if !ok {
		scheme, rest = "https", text
	}
	switch {
	case text == "":
		return "", fmt.Errorf("the server address is empty: give https://HOST:%s", defaultPort)
	case strings.EqualFold(scheme, "http"):
		return wrong("without TLS nothing can be checked; use https://")
	case !strings.EqualFold(scheme, "https"):
		return wrong("%q is not https", scheme)
	}
	// Bare IPv6 addresses are refused because the last group could be meant as a port.
	if _, err := netip.ParseAddr(rest); err == nil && strings.Contains(rest, ":") {
		return wrong("an IPv6 address stands in brackets, as in https://[%s]:%s", rest, defaultPort)
	}
	u, err := url.Parse("https://" + rest)
	if err != nil {
		return wrong("it must be https://HOST:%s: %w", defaultPort, rootOf(err))
	}
	switch {
	case u.User != nil:
		return wrong("there is a user name in it; only https://HOST:PORT is expected")
	case u.Path != "" && u.Path != "/", u.RawQuery != "", u.ForceQuery, u.Fragment != "", strings.HasSuffix(rest, "#"):
		return wrong("there is something behind the port; only https://HOST:PORT is expected")
	}
	host, port := u.Hostname(), u.Port()
	if err := checkHost(host); err != nil {
		return wrong("%w", err)
	}
	if port == "" {
		if strings.HasSuffix(u.Host, ":") {
			return wrong("the port behind the colon is missing")
		}
		port = defaultPort
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return wrong("%s is no port: 1 to 65535", port)
	}
	return "https://" + net.JoinHostPort(strings.ToLower(host), port), nil
}

func checkHost(host string) error {
	if addr, err := netip.ParseAddr(host); err == nil {
		switch {
		case addr.Zone() != "":
			return fmt.Errorf("%s is an address of one link only, and no certificate can hold it; use another address of the server", host)
		case addr.IsUnspecified() || addr.IsMulticast():
			return fmt.Errorf("%s is not the address of a machine", host)
		}
		return nil
	}
	if host == "" {
		return fmt.Errorf("there is no host in it; give https://HOST:%s", defaultPort)
	}
	if errs := validation.IsDNS1123Subdomain(strings.ToLower(strings.TrimSuffix(host, "."))); len(errs) > 0 {
		return fmt.Errorf("%q is neither an IP address nor the name of a machine", host)
	}
	return nil
}
