// SPDX-License-Identifier: Apache-2.0

// Package doctor finds out what is wrong with a cluster: each node looks at itself and at the ways to the others (Examine), one place
// collects what they say and judges it (Judge). Findings come with a remedy.
package doctor

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/kedge-io/kedge/pkg/check"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// Level is how bad a finding is.
type Level string

// The levels. A Problem keeps something from working now; a Warning will, or makes the loss of one more machine worse.
const (
	Problem Level = "problem"
	Warning Level = "warning"
)

// Finding is something that is wrong.
type Finding struct {
	Level Level `json:"level"`
	// About is a node, "cluster", or "pod NAMESPACE/NAME".
	About string `json:"about"`
	// Check is what was looked at, as "clock".
	Check string `json:"check"`
	Text  string `json:"text"`
	// Remedy says what to do; lines that begin with "$ " are commands to type.
	Remedy string `json:"remedy"`
}

func sortFindings(findings []Finding) {
	slices.SortStableFunc(findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Level, b.Level), cmp.Compare(a.About, b.About), cmp.Compare(a.Check, b.Check))
	})
}

// Question is what a node is asked to look at, beside itself.
type Question struct {
	Paths []Path `json:"paths,omitempty"`
	// DNS is the address of the cluster DNS and Domain its domain; Services are addresses of the kubernetes Service.
	DNS      netip.Addr   `json:"dns,omitzero"`
	Domain   string       `json:"domain,omitempty"`
	Services []netip.Addr `json:"services,omitempty"`
	// Log asks for the last lines of the log of the service.
	Log bool `json:"log,omitempty"`
	// Listen asks for the second step only. A Kedge that does not know it answers as to a question without ways.
	Listen *Listen `json:"listen,omitempty"`
}

// Protocol is how a way to another node is tried.
type Protocol string

// The protocols. Overlay is an echo request to the node's end of the overlay network, that is UDP to port 8472 with VXLAN, once with a
// small packet and once with the largest.
const (
	TCP     Protocol = "tcp"
	Overlay Protocol = "overlay"
)

// Path is a way to another node.
type Path struct {
	Peer     string         `json:"peer"`
	Protocol Protocol       `json:"protocol"`
	Address  netip.AddrPort `json:"address"` // port 0 for Overlay
	// Purpose is what goes that way, as "API server".
	Purpose string `json:"purpose"`
	// Optional ways have a substitute: the tunnel that nodes open.
	Optional bool `json:"optional,omitempty"`
}

// Way is a Path that was tried.
type Way struct {
	Path
	Took  time.Duration `json:"tookNanoseconds"`
	Error string        `json:"error,omitempty"`
}

// NodeReport is what a node says.
type NodeReport struct {
	Node    string    `json:"node"`
	Role    string    `json:"role"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	// Time on the node's clock when it answered.
	Time         time.Time                 `json:"time"`
	Processes    []supervise.ProcessStatus `json:"processes"`
	Certificates []pki.CertStatus          `json:"certificates"`
	// Preflight is what `kedge check` finds on the machine: disk latency and space, clock, conntrack and more.
	Preflight check.Report `json:"preflight"`
	// Datastore is nil on a machine without a member.
	Datastore      *datastore.Health `json:"datastore,omitempty"`
	DatastoreError string            `json:"datastoreError,omitempty"`
	Links          []Link            `json:"links"`
	Ways           []Way             `json:"ways"`
	// Heard is what came through the overlay network in the second step: nil if there was none, or this node could not listen, and not nil
	// if it has listened and heard nothing.
	Heard    []Heard `json:"heard"`
	DNSError string  `json:"dnsError,omitempty"`
	// Services are the addresses of the kubernetes Service that did not answer, with the reason.
	Services map[string]string `json:"services,omitempty"`
	Log      string            `json:"log,omitempty"`
}

// Link is a network interface with an address of the node, or of the overlay network.
type Link struct {
	Name    string `json:"name"`
	MTU     int    `json:"mtu"`
	Overlay bool   `json:"overlay"`
}
