// SPDX-License-Identifier: Apache-2.0

package join

import (
	"cmp"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"strings"
)

// Role is what a token may make of a machine.
type Role string

// The roles. A server token may join agents as well.
const (
	Server Role = "server"
	Agent  Role = "agent"
)

// ParseRole reads the value of a flag.
func ParseRole(text string) (Role, error) {
	switch r := Role(text); r {
	case Server, Agent:
		return r, nil
	}
	return "", fmt.Errorf("%q is no role: %s or %s", text, Server, Agent)
}

// groups that a bearer of a token is in.
func (r Role) groups() []string {
	if r == Server {
		return []string{GroupBootstrapServers, GroupBootstrapAgents}
	}
	return []string{GroupBootstrapAgents}
}

// group that a bearer needs to join in this role.
func (r Role) group() string { return r.groups()[0] }

// article puts the role into a sentence.
func (r Role) article() string {
	if r == Server {
		return "a server"
	}
	return "an agent"
}

// Token lets machines join: a Kubernetes bootstrap token (ID.SECRET), and the hash of the cluster's CA unless the token is an
// operator's own. It does not show its secret when it is printed, logged or marshalled; Text and Bearer do.
type Token struct {
	ID     string // public: it names the Secret in the cluster and the token's user
	Secret string
	CAHash string // of the server CA's public key (SPKI): 64 hexadecimal digits, or empty
	// Derived says that ID and Secret were computed from a text that an operator chose.
	Derived bool
}

const (
	idLength     = 6
	secretLength = 16
	hashLength   = 2 * sha256.Size

	// minOwn keeps people from passwords. ownIterations is what a guess costs somebody who has seen the public signature that is made
	// with a token, and what each use costs its owner: a fifth of a second on a PC. Neither it nor ownSalt can change: every
	// machine has to derive the same.
	minOwn        = 12
	maxOwn        = 512
	ownIterations = 600_000
	ownSalt       = "kedge join token v1"

	alphabet = "0123456789abcdefghijklmnopqrstuvwxyz"
)

// New makes a random token without a CA hash.
func New() (Token, error) {
	// 256 bits for 22 characters of 36: no character is likelier than another by more than 2^-142.
	seed := make([]byte, 32)
	if _, err := rand.Read(seed); err != nil {
		return Token{}, fmt.Errorf("make a token: %w", err)
	}
	return fromSeed(seed), nil
}

func fromSeed(seed []byte) Token {
	var text [idLength + secretLength]byte
	n, base, digit := new(big.Int).SetBytes(seed), big.NewInt(int64(len(alphabet))), new(big.Int)
	for i := range text {
		n.DivMod(n, base, digit)
		text[i] = alphabet[digit.Int64()]
	}
	return Token{ID: string(text[:idLength]), Secret: string(text[idLength:])}
}

// Parse reads a token as people paste it: ID.SECRET.CAHASH, ID.SECRET, or an operator's own text without a dot. White space
// around it does not matter; everything else that is not as it was printed is an error that says what is wrong.
// An operator's own text takes a fifth of a second to a second of computing.
func Parse(text string) (Token, error) {
	text = strings.TrimSpace(text)
	t, own, err := split(text)
	if err != nil || !own {
		return t, err
	}
	seed, err := pbkdf2.Key(sha256.New, text, []byte(ownSalt), ownIterations, 32)
	if err != nil {
		return Token{}, fmt.Errorf("derive a token from the text: %w", err)
	}
	t = fromSeed(seed)
	t.Derived = true
	return t, nil
}

// foreign tokens are those of products that people come from.
func foreign(text string) string {
	switch {
	case strings.HasPrefix(text, "K10") && strings.Contains(text, "::"):
		return "it is a k3s token"
	case strings.HasPrefix(text, "H4sI") && len(text) > 200:
		return "it is a k0s token"
	case strings.HasPrefix(text, "sha256:"):
		return "it is only the hash of a CA"
	}
	return ""
}

// split takes a generated token apart, or says that the text is an operator's own.
func split(text string) (t Token, own bool, err error) {
	const paste = "; paste the token as `kedge token create` printed it"
	wrong := func(format string, args ...any) (Token, bool, error) {
		return Token{}, false, fmt.Errorf("the token cannot be used: "+format, args...)
	}
	what := foreign(text)
	switch {
	case text == "":
		return wrong("it is empty")
	case strings.ContainsAny(text, " \t\r\n"):
		if strings.Contains(text, "--") || strings.Contains(text, "kedge") {
			return wrong("it is a whole command line; give only what stands behind --token in it")
		}
		return wrong("there is white space inside, as from a line that was broken" + paste)
	case strings.HasPrefix(text, "-"):
		return wrong("it starts with a dash, like a flag; give only what stands behind --token")
	case strings.ContainsFunc(text, func(r rune) bool { return r < '!' || r > '~' }):
		return wrong("it has characters other than letters, digits and ASCII punctuation, which not every terminal and file sends alike")
	case what != "":
		return wrong("%s; make one with `kedge token create` on a server of this cluster", what)
	case !strings.Contains(text, "."):
		if len(text) < minOwn || len(text) > maxOwn {
			return wrong("it has %d characters; one of your own has %d to %d and no dot, one from `kedge token create` has dots", len(text), minOwn, maxOwn)
		}
		return Token{}, true, nil
	}
	parts := strings.Split(text, ".")
	if len(parts) > 3 {
		return wrong("it has %d parts between dots instead of 2 or 3%s", len(parts), paste)
	}
	t = Token{ID: parts[0], Secret: parts[1]}
	if len(parts) == 3 {
		t.CAHash = parts[2]
	}
	err = cmp.Or(part("the ID (first part)", t.ID, idLength, alphabet), part("the secret (second part)", t.Secret, secretLength, alphabet))
	if err == nil && len(parts) == 3 {
		err = part("the CA hash (third part)", t.CAHash, hashLength, alphabet[:16])
	}
	if err != nil {
		return wrong("%w%s", err, paste)
	}
	return t, false, nil
}

// part checks one part of a token without showing it.
func part(name, text string, length int, allowed string) error {
	switch {
	case len(text) < length:
		return fmt.Errorf("%s has %d characters instead of %d: the end or the beginning is missing", name, len(text), length)
	case len(text) > length:
		return fmt.Errorf("%s has %d characters instead of %d", name, len(text), length)
	case strings.Trim(text, allowed) != "" && strings.Trim(strings.ToLower(text), allowed) == "":
		return fmt.Errorf("%s has upper-case letters; a token is all lower case", name)
	case strings.Trim(text, allowed) != "":
		return fmt.Errorf("%s has characters other than %s", name, ranges(allowed))
	}
	return nil
}

func ranges(allowed string) string { return "0-9 and a-" + allowed[len(allowed)-1:] }

// Bearer is what authenticates a request: ID.SECRET.
func (t Token) Bearer() string { return t.ID + "." + t.Secret }

// Text is the token as it is handed out. That of an operator's own token is its derived form, which works as well.
func (t Token) Text() string {
	if t.CAHash == "" {
		return t.Bearer()
	}
	return t.Bearer() + "." + t.CAHash
}

// String tells tokens apart without their secrets.
func (t Token) String() string {
	if t == (Token{}) {
		return "no token"
	}
	return "token " + t.ID
}

// Format keeps the secret out of every verb, %#v and %d too.
func (t Token) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, t.String()) }

// MarshalText keeps the secret out of JSON, too. There is no way back from it.
func (t Token) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// LogValue keeps the secret out of logs.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }
