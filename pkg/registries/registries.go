// SPDX-License-Identifier: Apache-2.0

// Package registries turns registries.yaml (mirrors, TLS settings and credentials of image registries, in the format
// that k3s users know) into what containerd reads: a directory of hosts.toml files, which containerd consults at every
// pull, and a configuration fragment with the credentials, which it reads when it starts.
package registries

import (
	"net/url"
	"strings"
)

// Config is a validated registries.yaml. The zero value is what a missing file means: no mirrors, no credentials.
type Config struct {
	mirrors map[string][]endpoint // by registry host, as image names spell it; "*" is any other registry
	hosts   map[string]host       // by the host that is connected to; "*" is any other host, and has TLS settings only
}

// endpoint is one place that serves the images of a registry.
type endpoint struct {
	url *url.URL
	// override says that the path of url is the root of the registry's API, to which /v2 is not added.
	override bool
}

// host says how to talk to one server.
type host struct {
	auth *auth
	tls  *tlsSettings
}

// auth holds the credentials in one of three forms.
type auth struct {
	Username      string `toml:"username,omitempty"`
	Password      string `toml:"password,omitempty"`
	Auth          string `toml:"auth,omitempty"`          // base64 of username:password
	IdentityToken string `toml:"identitytoken,omitempty"` // OAuth2 refresh token
}

type tlsSettings struct {
	caFile, certFile, keyFile string
	skipVerify                bool
}

const (
	wildcard       = "*"
	dockerRegistry = "docker.io"
	dockerHost     = "registry-1.docker.io"
)

// registryName gives the name under which containerd looks a registry up: the Docker Hub has several.
func registryName(name string) string {
	if name == dockerHost || name == "index.docker.io" {
		return dockerRegistry
	}
	return name
}

// hostName gives the host that containerd connects to for a registry.
func hostName(name string) string {
	if registryName(name) == dockerRegistry {
		return dockerHost
	}
	return name
}

// settings gives how to talk to a host: its own settings, or none.
func (c *Config) settings(name string) host { return c.hosts[hostName(name)] }

// endpoints gives where the images of a registry may come from, in order. The wildcard is for registries without an
// entry of their own.
func (c *Config) endpoints(registry string) []endpoint {
	if list, ok := c.mirrors[registry]; ok {
		return list
	}
	return c.mirrors[wildcard]
}

// isOf says whether an endpoint is the registry itself and not a mirror of it.
func (e endpoint) isOf(registry string) bool {
	return strings.EqualFold(e.url.Host, hostName(registry))
}
