// SPDX-License-Identifier: Apache-2.0

// Package join is how machines become part of a cluster: the tokens that let them in, the discovery of a cluster whose CA is
// checked before anything secret is sent, and what a joining machine asks for afterwards. It speaks upstream's protocols where
// there is one: bootstrap tokens, the cluster-info ConfigMap, certificate signing requests and RBAC. The operator's view is in
// docs/tokens.md.
package join

import "github.com/kedge-io/kedge/pkg/pki"

// Groups and users of joining machines. manifests/join.yaml gives them their rights.
const (
	// GroupBootstrapServers and GroupBootstrapAgents are what holders of a token are in; a server token is in both.
	GroupBootstrapServers = "system:bootstrappers:kedge:server"
	GroupBootstrapAgents  = "system:bootstrappers:kedge:agent"
	// GroupServers are the servers of the cluster towards the join API; UserServerPrefix and the node's name make the user.
	GroupServers     = pki.GroupServers
	UserServerPrefix = pki.UserServerPrefix
	// GroupNodes and UserNodePrefix are the node authorizer's.
	GroupNodes     = pki.GroupNodes
	UserNodePrefix = "system:node:"
)

// Where the cluster keeps what a joiner reads, all in namespace kube-system.
const (
	ConfigMapCluster = "kedge-cluster" // the settings that all machines share
	KeyCluster       = "cluster.json"  // in it: the settings
	KeyClientCA      = "client-ca.crt" // in it: the CA of client certificates, PEM
	ConfigMapServers = "kedge-servers" // by node name: a RegisteredServer in JSON
)

// RegisteredServer is what this package reads of an entry of ConfigMapServers.
type RegisteredServer struct {
	Address string `json:"address"` // host:port of its API
}

// Reasons of the approver in the condition Denied of a certificate signing request.
const (
	ReasonNameInUse        = "NameInUse"        // another machine has this name
	ReasonNameSeenRecently = "NameSeenRecently" // as above, but it may be gone: worth another try
	ReasonWrongRole        = "WrongRole"        // the token does not allow what was asked for
	ReasonBadRequest       = "BadRequest"       // not what an unmodified Kedge asks for
)

// Paths of the join API, on the API server's own port.
const (
	PathKeys    = "/kedge/v1/keys"
	PathMembers = "/kedge/v1/members"
	PathNodes   = "/kedge/v1/nodes"
	PathRenew   = "/kedge/v1/renew"
)

// RenewRequest is the body of POST PathRenew, which anybody may send: a node that was away for long shows its expired client
// certificate, and a request that is signed with the same key. Both are PEM.
type RenewRequest struct {
	Certificate []byte `json:"certificate"`
	Request     []byte `json:"request"`
}

// RenewResponse answers it: a certificate for the same key, PEM.
type RenewResponse struct {
	Certificate []byte `json:"certificate"`
}

// KeysResponse answers GET PathKeys: the cluster's key material by the names of its files.
type KeysResponse struct {
	Files map[string][]byte `json:"files"`
}

// Member of the datastore.
type Member struct {
	Name     string   `json:"name"` // empty until it has started once
	ID       string   `json:"id"`   // hexadecimal
	PeerURLs []string `json:"peerURLs"`
	Learner  bool     `json:"learner"`
}

// MembersResponse answers GET PathMembers.
type MembersResponse struct {
	Members []Member `json:"members"`
}

// AddMemberRequest is the body of POST PathMembers: a server asks to become a learner.
type AddMemberRequest struct {
	Name    string `json:"name"`
	PeerURL string `json:"peerURL"`
}

// AddMemberResponse answers it: the new member's ID, and all members with it.
type AddMemberResponse struct {
	ID      string   `json:"id"`
	Members []Member `json:"members"`
}
