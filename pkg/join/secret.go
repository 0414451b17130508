// SPDX-License-Identifier: Apache-2.0

package join

import (
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	bootstrapapi "k8s.io/cluster-bootstrap/token/api"
	bootstrapsecrets "k8s.io/cluster-bootstrap/util/secrets"
	bootstraptokens "k8s.io/cluster-bootstrap/util/tokens"
)

// annotationOwn marks tokens that come from an option of the servers: they would come back at the next start.
const annotationOwn = "kedge.io/token-from-option"

// Info is what a cluster knows of a token.
type Info struct {
	Token       Token // without a CA hash
	Role        Role  // empty: a bootstrap token that Kedge did not make
	Created     time.Time
	Expires     time.Time // zero: never
	Description string
}

// SecretName is the name of a token's Secret in namespace kube-system.
func SecretName(id string) string { return bootstrapapi.BootstrapTokenSecretPrefix + id }

// Object is the Secret that makes the API server accept the token, for ttl from now on or for ever if that is 0.
func (t Token) Object(role Role, ttl time.Duration, description string) *corev1.Secret {
	s := &corev1.Secret{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{Name: SecretName(t.ID), Namespace: metav1.NamespaceSystem},
		Type:       bootstrapapi.SecretTypeBootstrapToken,
		Data: map[string][]byte{
			bootstrapapi.BootstrapTokenIDKey:               []byte(t.ID),
			bootstrapapi.BootstrapTokenSecretKey:           []byte(t.Secret),
			bootstrapapi.BootstrapTokenExtraGroupsKey:      []byte(strings.Join(role.groups(), ",")),
			bootstrapapi.BootstrapTokenUsageAuthentication: []byte("true"),
			bootstrapapi.BootstrapTokenUsageSigningKey:     []byte("true"),
		},
	}
	if t.Derived {
		s.Annotations = map[string]string{annotationOwn: "true"}
	}
	if ttl != 0 {
		s.Data[bootstrapapi.BootstrapTokenExpirationKey] = []byte(time.Now().Add(ttl).UTC().Format(time.RFC3339))
	}
	if description != "" {
		s.Data[bootstrapapi.BootstrapTokenDescriptionKey] = []byte(description)
	}
	return s
}

// FromSecret reads what Object wrote, and other bootstrap tokens.
func FromSecret(s *corev1.Secret) (Info, error) {
	fail := func(format string, args ...any) (Info, error) {
		return Info{}, fmt.Errorf("the Secret %s/%s is no bootstrap token: "+format, append([]any{s.Namespace, s.Name}, args...)...)
	}
	if s.Type != bootstrapapi.SecretTypeBootstrapToken {
		return fail("its type is %q", s.Type)
	}
	id, ok := bootstrapsecrets.ParseName(s.Name)
	if !ok || id != bootstrapsecrets.GetData(s, bootstrapapi.BootstrapTokenIDKey) {
		return fail("its name and its %s are not the same", bootstrapapi.BootstrapTokenIDKey)
	}
	secret := bootstrapsecrets.GetData(s, bootstrapapi.BootstrapTokenSecretKey)
	if _, _, err := bootstraptokens.ParseToken(id + "." + secret); err != nil {
		return fail("its %s is not 16 characters of 0-9 and a-z", bootstrapapi.BootstrapTokenSecretKey)
	}
	i := Info{
		Token:       Token{ID: id, Secret: secret, Derived: s.Annotations[annotationOwn] == "true"},
		Created:     s.CreationTimestamp.Time,
		Description: bootstrapsecrets.GetData(s, bootstrapapi.BootstrapTokenDescriptionKey),
	}
	if text := bootstrapsecrets.GetData(s, bootstrapapi.BootstrapTokenExpirationKey); text != "" {
		var err error
		if i.Expires, err = time.Parse(time.RFC3339, text); err != nil {
			return fail("its %s %q is no time", bootstrapapi.BootstrapTokenExpirationKey, text)
		}
	}
	groups, err := bootstrapsecrets.GetGroups(s)
	if err != nil {
		return fail("%w", err)
	}
	i.Role = roleOf(groups)
	return i, nil
}

// roleOf is the most that a member of the groups may join as.
func roleOf(groups []string) Role {
	for _, r := range []Role{Server, Agent} {
		if slices.Contains(groups, r.group()) {
			return r
		}
	}
	return ""
}
