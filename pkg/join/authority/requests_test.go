// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"encoding/pem"
	"slices"
	"strings"
	"testing"

	capi "k8s.io/api/certificates/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/kubernetes/pkg/apis/certificates"

	"github.com/kedge-io/kedge/pkg/join"
)

func TestParseRequest(t *testing.T) {
	with := func(a ask, change func(*ask)) ask { change(&a); return a }
	agent, server := bootstrap("n1", agentGroups), asServer("n1", serverGroups)
	admin := bootstrap("n1", []string{"system:masters"})
	admin.user = "system:admin"
	tests := []struct {
		name string
		ask  ask
		want string // kind and name, a reason with a part of its message, or nothing
	}{
		{"agent", agent, "node n1"},
		{"agent with a server token", bootstrap("n1", serverGroups), "node n1"},
		{"RSA usages", with(agent, func(a *ask) { a.usages = append(a.usages, capi.UsageKeyEncipherment) }), "node n1"},
		{"name with dots", bootstrap("n1.example.org", agentGroups), "node n1.example.org"},
		{"rotation", rotation("n1"), "node rotation n1"},
		{"serving", serving("n1", "192.0.2.1"), "kubelet's serving n1"},
		{"server", server, "server n1"},

		{"administrator's", admin, ""},
		{"other group", bootstrap("n1", []string{"system:bootstrappers"}), ""},
		{"server group alone", bootstrap("n1", []string{join.GroupBootstrapServers}), ""},
		{"other signer", with(agent, func(a *ask) { a.signer = capi.KubeletServingSignerName }), ""},
		{"somebody's signer", with(agent, func(a *ask) { a.signer = "example.org/x" }), ""},
		{"user's certificate", with(server, func(a *ask) { a.cn, a.orgs = "jane", []string{"developers"} }), ""},
		{"a server's, by an administrator", with(server, func(a *ask) { a.user, a.groups = "system:admin", []string{"system:masters"} }), ""},
		{"node without the group", with(rotation("n1"), func(a *ask) { a.groups = nil }), ""},
		{"user that is named like a node", with(serving("n1", "192.0.2.1"), func(a *ask) { a.groups = []string{"system:authenticated"} }), ""},

		{"no organization", with(agent, func(a *ask) { a.orgs = nil }), "BadRequest organization"},
		{"another organization", with(agent, func(a *ask) { a.orgs = []string{"system:masters"} }), "BadRequest organization"},
		{"two organizations", with(agent, func(a *ask) { a.orgs = []string{join.GroupNodes, "system:masters"} }), "BadRequest organization"},
		{"organizational unit", with(agent, func(a *ask) { a.ou = []string{"x"} }), "BadRequest more than a common name"},
		{"not a node", with(agent, func(a *ask) { a.cn = "system:admin" }), "BadRequest common name"},
		{"no name", bootstrap("", agentGroups), "BadRequest cannot be a node name"},
		{"capitals", bootstrap("N1", agentGroups), "BadRequest cannot be a node name"},
		{"colon", bootstrap("n1:x", agentGroups), "BadRequest cannot be a node name"},
		{"too long", bootstrap(strings.Repeat("a", 254), agentGroups), "BadRequest cannot be a node name"},
		{"DNS name", with(agent, func(a *ask) { a.dns = []string{"n1"} }), "BadRequest DNS"},
		{"address", with(agent, func(a *ask) { a.ips = []string{"192.0.2.1"} }), "BadRequest IP"},
		{"server usage", with(agent, func(a *ask) { a.usages = append(a.usages, capi.UsageServerAuth) }), "BadRequest usages"},
		{"no usage", with(agent, func(a *ask) { a.usages = nil }), "BadRequest usages"},

		{"rotation to another name", with(rotation("n1"), func(a *ask) { a.cn = join.UserNodePrefix + "n2" }), "BadRequest its own only"},
		{"serving of another", with(serving("n1", "192.0.2.1"), func(a *ask) { a.cn = join.UserNodePrefix + "n2" }), "BadRequest its own only"},
		{"serving for nothing", with(serving("n1"), func(a *ask) { a.dns = nil }), "BadRequest subjectAltName"},
		{"serving as a client", with(serving("n1", "192.0.2.1"), func(a *ask) { a.usages = append(a.usages, capi.UsageClientAuth) }), "BadRequest usages"},

		{"server with an agent token", asServer("n1", agentGroups), "WrongRole kedge token create --role server"},
		{"servers' group with an agent token", with(asServer("n1", agentGroups), func(a *ask) { a.cn = "jane" }), "WrongRole"},
		{"servers' name with an agent token", with(asServer("n1", agentGroups), func(a *ask) { a.orgs = nil }), "WrongRole"},
		{"server without its organization", with(server, func(a *ask) { a.orgs = nil }), "BadRequest organization"},
		{"server and master", with(server, func(a *ask) { a.orgs = append([]string{"system:masters"}, a.orgs...) }), "BadRequest organization"},
		{"servers' group, other name", with(server, func(a *ask) { a.cn = "jane" }), "BadRequest common name"},
		{"server with a DNS name", with(server, func(a *ask) { a.dns = []string{"n1"} }), "BadRequest alternative names"},
		{"server for a year", with(server, func(a *ask) { a.seconds = 365 * 24 * 3600 }), "BadRequest 3600"},
		{"server without a limit", with(server, func(a *ask) { a.seconds = 0 }), "BadRequest 3600"},
		{"server with more usages", with(server, func(a *ask) { a.usages = append(a.usages, capi.UsageServerAuth) }), "BadRequest usages"},
		{"server without a usage", with(server, func(a *ask) { a.usages = a.usages[:1] }), "BadRequest usages"},
		{"server with capitals", asServer("N1", serverGroups), "BadRequest cannot be a node name"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, d := parseRequest(tt.ask.object(t, "csr"))
			switch {
			case r != nil && d != nil:
				t.Fatalf("both a request and %v", d)
			case r != nil:
				if got := string(r.kind) + " " + r.name; got != tt.want {
					t.Errorf("got %q, want %q", got, tt.want)
				}
			case d != nil:
				reason, part, _ := strings.Cut(tt.want, " ")
				if d.reason != reason || !strings.Contains(d.message, part) {
					t.Errorf("got %v, want %q", d, tt.want)
				}
			case tt.want != "":
				t.Errorf("left alone, want %q", tt.want)
			}
		})
	}
}

func TestParseRequestGarbage(t *testing.T) {
	csr := bootstrap("n1", agentGroups).object(t, "csr")
	for _, text := range []string{"", "x", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"} {
		csr.Spec.Request = []byte(text)
		if r, d := parseRequest(csr); r != nil || d == nil || d.reason != join.ReasonBadRequest {
			t.Errorf("%q: got %v, %v", text, r, d)
		}
	}
}

// FuzzParseRequest: whatever is in a request, what passes is exactly what upstream's signers take for its purpose, and an agent's
// token never makes a server.
func FuzzParseRequest(f *testing.F) {
	for _, a := range []ask{bootstrap("n1", agentGroups), rotation("n1"), serving("n1", "192.0.2.1"), asServer("n1", serverGroups), asServer("n1", agentGroups)} {
		csr := a.object(f, "csr")
		block, _ := pem.Decode(csr.Spec.Request)
		var usages []string
		for _, u := range csr.Spec.Usages {
			usages = append(usages, string(u))
		}
		f.Add(block.Bytes, csr.Spec.SignerName, csr.Spec.Username, strings.Join(csr.Spec.Groups, ","), strings.Join(usages, ","), a.seconds)
	}
	f.Fuzz(func(t *testing.T, der []byte, signer, user, groups, usages string, seconds int32) {
		csr := &capi.CertificateSigningRequest{Spec: capi.CertificateSigningRequestSpec{
			Request:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			SignerName: signer, Username: user, Groups: strings.Split(groups, ","), ExpirationSeconds: &seconds,
		}}
		for u := range strings.SplitSeq(usages, ",") {
			csr.Spec.Usages = append(csr.Spec.Usages, capi.KeyUsage(u))
		}
		r, d := parseRequest(csr)
		if r == nil {
			return
		}
		if d != nil || r.name == "" || r.name != strings.ToLower(r.name) {
			t.Fatalf("got %+v and %v", r, d)
		}
		cn, set := r.cert.Subject.CommonName, sets.NewString(strings.Split(usages, ",")...)
		switch r.kind {
		case nodeClient:
			if !certificates.IsKubeletClientCSR(r.cert, set) || !slices.Contains(csr.Spec.Groups, join.GroupBootstrapAgents) || cn != join.UserNodePrefix+r.name {
				t.Errorf("%q", cn)
			}
		case nodeRotation:
			if !certificates.IsKubeletClientCSR(r.cert, set) || cn != user || cn != join.UserNodePrefix+r.name {
				t.Errorf("%q for %q", cn, user)
			}
		case nodeServing:
			if !certificates.IsKubeletServingCSR(r.cert, set) || cn != user || cn != join.UserNodePrefix+r.name {
				t.Errorf("%q for %q", cn, user)
			}
		case serverClient:
			if !slices.Contains(csr.Spec.Groups, join.GroupBootstrapServers) || cn != join.UserServerPrefix+r.name || seconds > 3600 ||
				!slices.Equal(r.cert.Subject.Organization, []string{join.GroupServers}) {
				t.Errorf("%q", cn)
			}
		default:
			t.Errorf("kind %q", r.kind)
		}
	})
}
