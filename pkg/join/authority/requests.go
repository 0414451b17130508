// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"slices"
	"strings"

	capi "k8s.io/api/certificates/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/kubernetes/pkg/apis/certificates"

	"github.com/kedge-io/kedge/pkg/join"
)

// kind says what a signing request is for.
type kind string

const (
	nodeClient   kind = "node"              // the first client certificate of a kubelet, asked for with a token
	nodeRotation kind = "node rotation"     // the next one, asked for by the kubelet
	nodeServing  kind = "kubelet's serving" // a kubelet's serving certificate, asked for by the kubelet
	serverClient kind = "server"            // the client certificate with which a new server calls the join API
)

// maxServerLife is how long the certificate of a new server may live: until it has the CA and makes its own.
const maxServerLife = 3600 // seconds

// request is a signing request that concerns this package, after the checks that need nothing but itself.
type request struct {
	kind   kind
	name   string // of the node
	server bool   // a token for servers was shown
	key    [sha256.Size]byte
	cert   *x509.CertificateRequest
	sign   string // of life that the name's Node has shown, once that was looked at
}

// denial is why a request is denied; Reason is one of pkg/join's.
type denial struct{ reason, message string }

func (d *denial) Error() string { return d.reason + ": " + d.message }

func deny(reason, format string, args ...any) *denial {
	return &denial{reason, fmt.Sprintf(format, args...)}
}

// parseRequest recognises the requests of machines that join or have joined. Other people's requests are no business of this
// package: it returns nil for them.
func parseRequest(csr *capi.CertificateSigningRequest) (*request, *denial) {
	who := csr.Spec
	agent, server := slices.Contains(who.Groups, join.GroupBootstrapAgents), slices.Contains(who.Groups, join.GroupBootstrapServers)
	node := strings.HasPrefix(who.Username, join.UserNodePrefix) && slices.Contains(who.Groups, join.GroupNodes)
	r := &request{server: server}
	switch {
	case who.SignerName == capi.KubeAPIServerClientKubeletSignerName && node:
		r.kind = nodeRotation
	case who.SignerName == capi.KubeAPIServerClientKubeletSignerName && agent:
		r.kind = nodeClient
	case who.SignerName == capi.KubeletServingSignerName && node:
		r.kind = nodeServing
	case who.SignerName == capi.KubeAPIServerClientSignerName && (agent || server):
		r.kind = serverClient
	default:
		return nil, nil
	}
	var err error
	if r.cert, err = certificates.ParseCSR(who.Request); err != nil {
		return nil, deny(join.ReasonBadRequest, "not a certificate request: %v", err)
	}
	if r.kind == serverClient && !claimsServer(r.cert) {
		return nil, nil // an ordinary user's certificate, for people to decide
	}
	r.key = sha256.Sum256(r.cert.RawSubjectPublicKeyInfo)
	if d := r.check(csr); d != nil {
		return nil, d
	}
	return r, nil
}

// claimsServer says whether a certificate would make its holder a server, or something that could be mistaken for one.
func claimsServer(c *x509.CertificateRequest) bool {
	return strings.HasPrefix(c.Subject.CommonName, join.UserServerPrefix) || slices.Contains(c.Subject.Organization, join.GroupServers)
}

// check is about the request alone: subject, usages, alternative names, lifetime.
func (r *request) check(csr *capi.CertificateSigningRequest) *denial {
	prefix, err := join.UserNodePrefix, error(nil)
	usages := sets.NewString()
	for _, u := range csr.Spec.Usages {
		usages.Insert(string(u))
	}
	switch r.kind {
	case nodeClient, nodeRotation:
		err = certificates.ValidateKubeletClientCSR(r.cert, usages)
	case nodeServing:
		err = certificates.ValidateKubeletServingCSR(r.cert, usages)
	case serverClient:
		if !r.server {
			return deny(join.ReasonWrongRole, "this token is for agents; make one for servers with: kedge token create --role server")
		}
		prefix, err = join.UserServerPrefix, checkServerClient(r.cert, csr.Spec.Usages, csr.Spec.ExpirationSeconds)
	}
	if err != nil {
		return deny(join.ReasonBadRequest, "%v", err)
	}
	if len(r.cert.Subject.Names) != 2 {
		return deny(join.ReasonBadRequest, "the subject %q has more than a common name and one organization", r.cert.Subject)
	}
	r.name = strings.TrimPrefix(r.cert.Subject.CommonName, prefix)
	if problems := validation.IsDNS1123Subdomain(r.name); len(problems) > 0 {
		return deny(join.ReasonBadRequest, "%q cannot be a node name: %s", r.name, strings.Join(problems, "; "))
	}
	if r.kind == nodeRotation || r.kind == nodeServing {
		if r.cert.Subject.CommonName != csr.Spec.Username {
			return deny(join.ReasonBadRequest, "%s asks for a certificate of %s; a node gets its own only", csr.Spec.Username, r.cert.Subject.CommonName)
		}
	}
	return nil
}

// checkServerClient is to certificates of servers what upstream's ValidateKubeletClientCSR is to those of kubelets.
func checkServerClient(c *x509.CertificateRequest, usages []capi.KeyUsage, seconds *int32) error {
	switch {
	case !slices.Equal(c.Subject.Organization, []string{join.GroupServers}):
		return fmt.Errorf("the organization is %q, not %s alone", c.Subject.Organization, join.GroupServers)
	case !strings.HasPrefix(c.Subject.CommonName, join.UserServerPrefix):
		return fmt.Errorf("the common name %q does not begin with %s", c.Subject.CommonName, join.UserServerPrefix)
	case len(c.DNSNames)+len(c.IPAddresses)+len(c.EmailAddresses)+len(c.URIs) > 0 || hasAlternativeNames(c):
		return fmt.Errorf("a client certificate has no alternative names")
	case !forClient(usages):
		return fmt.Errorf("the usages are %q, not %q and %q", usages, capi.UsageDigitalSignature, capi.UsageClientAuth)
	case seconds == nil || *seconds > maxServerLife:
		return fmt.Errorf("the certificate may live for %d seconds at most, the request has to say so", maxServerLife)
	}
	return nil
}

// forClient takes what a client with a key of any kind needs, and nothing more.
func forClient(usages []capi.KeyUsage) bool {
	for _, u := range usages {
		if u != capi.UsageDigitalSignature && u != capi.UsageKeyEncipherment && u != capi.UsageClientAuth {
			return false
		}
	}
	return slices.Contains(usages, capi.UsageDigitalSignature) && slices.Contains(usages, capi.UsageClientAuth)
}

// hasAlternativeNames finds kinds of names, too, that Go does not parse.
func hasAlternativeNames(c *x509.CertificateRequest) bool {
	for _, e := range c.Extensions {
		if e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) {
			return true
		}
	}
	return false
}
