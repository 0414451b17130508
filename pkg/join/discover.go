// SPDX-License-Identifier: Apache-2.0

package join

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/apimachinery/pkg/util/version"
	apiversion "k8s.io/apimachinery/pkg/version"
	"k8s.io/client-go/tools/clientcmd"
	certutil "k8s.io/client-go/util/cert"
	bootstrapapi "k8s.io/cluster-bootstrap/token/api"
	"k8s.io/cluster-bootstrap/token/jws"
	componentversion "k8s.io/component-base/version"

	"github.com/kedge-io/kedge/pkg/pki"
)

const (
	requestTimeout = 10 * time.Second
	maxAnswer      = 1 << 20
	// maxClockDifference is what a new client certificate forgives: the signer dates it back by this much.
	maxClockDifference = 5 * time.Minute
	// newToken is how long a token may take from its creation until every server knows it and cluster-info is signed with it.
	newToken = 3 * time.Second

	pathClusterInfo = "/api/v1/namespaces/" + metav1.NamespacePublic + "/configmaps/" + bootstrapapi.ConfigMapClusterInfo
	pathSelf        = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
)

// Target is the cluster that a machine wants to join.
type Target struct {
	Server  string // as ParseServer takes it
	Token   Token
	Role    Role   // what the machine is to become
	Version string // of the machine's Kubernetes; default: the one that is linked in

	Dial DialFunc     // optional
	Log  *slog.Logger // default slog.Default()
}

// Cluster is what Discover found, verified.
type Cluster struct {
	URL     string // https://HOST:PORT
	CA      []byte // PEM
	Pool    *x509.CertPool
	Version string // of the API server that answered
	// Clock is how far the server's clock is ahead of this machine's, to the second.
	Clock time.Duration
}

// discovery is one run of Discover.
type discovery struct {
	Target
	url      string
	address  string        // host:port, for messages
	patience time.Duration // with a token that is not known
	// claimed is what a server said before it was verified: good enough to explain a failure.
	claimed struct {
		clock  time.Duration
		signed bool // with a token of this ID
	}
}

// Discover finds out which cluster answers at the target's address, and that it is the token's. Until the CA is verified nothing
// secret is sent; all later connections have to use the returned CA. It changes nothing in the cluster. Its errors are for the
// console; Retryable says which ones may pass.
func Discover(ctx context.Context, target Target) (*Cluster, error) {
	d, err := newDiscovery(target)
	if err != nil {
		return nil, err
	}
	return d.run(ctx)
}

func newDiscovery(target Target) (*discovery, error) {
	server, err := ParseServer(target.Server)
	if err != nil {
		return nil, err
	}
	d := &discovery{Target: target, url: server, address: strings.TrimPrefix(server, "https://"), patience: newToken}
	if d.Log == nil {
		d.Log = slog.Default()
	}
	if d.Version == "" {
		d.Version = componentversion.Get().GitVersion
	}
	return d, nil
}

func (d *discovery) run(ctx context.Context) (*Cluster, error) {
	certs, err := d.findCA(ctx)
	if err != nil {
		return nil, err
	}
	c := &Cluster{URL: d.url, Pool: x509.NewCertPool()}
	for _, cert := range certs {
		c.Pool.AddCert(cert)
	}
	if c.CA, err = certutil.EncodeCertificates(certs...); err != nil {
		return nil, fmt.Errorf("encode the cluster's CA: %w", err)
	}
	verified := d.client(&tls.Config{RootCAs: c.Pool, MinVersion: tls.VersionTLS12})
	defer verified.CloseIdleConnections()
	if err := d.checkServer(ctx, verified, c); err != nil {
		return nil, err
	}
	if err := d.checkToken(ctx, verified); err != nil {
		return nil, err
	}
	if d.Token.CAHash == "" {
		d.Log.Warn("the token has no CA hash: the cluster was recognised by its knowledge of the token alone, so whoever knows or guesses the token could "+
			"pose as it; tokens of `kedge token create` have one", "server", d.address, "caHash", pki.HashOfCertificate(certs[0]))
	}
	return c, nil
}

// client makes requests without a proxy: clusters are local, and HTTPS_PROXY is set for pulling images.
func (d *discovery) client(config *tls.Config) *http.Client {
	return &http.Client{
		Timeout:       requestTimeout,
		Transport:     &http.Transport{TLSClientConfig: config, DialContext: d.Dial, ForceAttemptHTTP2: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// answer of a server, not more of it than maxAnswer.
type answer struct {
	code  int
	body  []byte
	clock time.Duration // how far the server's clock is ahead, if it said the time
}

// request returns an answer, or an error in words.
func (d *discovery) request(ctx context.Context, client *http.Client, method, path, bearer string, body []byte) (*answer, error) {
	ctx, connected := traced(ctx)
	req, err := http.NewRequestWithContext(ctx, method, d.url+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "kedge-join")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	sent := time.Now()
	resp, err := client.Do(req)
	if err != nil {
		return nil, connectionError(d.address, connected, err)
	}
	defer resp.Body.Close()
	a := &answer{code: resp.StatusCode}
	received := time.Now()
	if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		// The header has whole seconds: half of one is the best guess for the rest.
		a.clock = date.Add(500 * time.Millisecond).Sub(sent.Add(received.Sub(sent) / 2).Round(0)).Round(time.Second)
	}
	if a.body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer)); err != nil {
		return nil, connectionError(d.address, connected, err)
	}
	return a, nil
}

// check turns any answer but success into words.
func (d *discovery) check(a *answer) error {
	var s metav1.Status
	isStatus := json.Unmarshal(a.body, &s) == nil && s.Kind == "Status"
	switch {
	case a.code == http.StatusOK || a.code == http.StatusCreated:
		return nil
	case a.code == http.StatusTooManyRequests || a.code >= http.StatusInternalServerError:
		return problem(KindNotReady, nil, "the API on %s is not ready: HTTP %d: %s", d.address, a.code, firstLine(s.Message, a.body))
	case !isStatus:
		return problem(KindNotKedge, nil, "what answers on %s is no Kubernetes API (HTTP %d: %s): correct the address or port of --server", d.address, a.code, firstLine("", a.body))
	case a.code == http.StatusForbidden || a.code == http.StatusNotFound:
		return problem(KindNotReady, nil, "the cluster at %s has not got what a joining machine looks for: %s; this ends when a new cluster is up, "+
			"or else it is a Kubernetes, but not Kedge's", d.address, s.Message)
	case a.code == http.StatusUnauthorized:
		return problem(KindNotKedge, nil, "%s answers only to those it knows (HTTP 401): it is not Kedge's API, or anonymous requests were switched off on the server", d.address)
	}
	return problem(KindRefused, nil, "%s refused a joining machine's request: HTTP %d: %s", d.address, a.code, s.Message)
}

// firstLine of an answer, short enough for a console.
func firstLine(message string, body []byte) string {
	if message == "" {
		message = string(body)
	}
	message, _, _ = strings.Cut(strings.TrimSpace(message), "\n")
	message = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '.'
		}
		return r
	}, message)
	if len(message) > 100 {
		message = message[:100] + "..."
	}
	if message == "" {
		return "no text"
	}
	return message
}

// findCA gets the cluster's CA from whoever answers, and believes it only with the token's proof.
func (d *discovery) findCA(ctx context.Context) ([]*x509.Certificate, error) {
	// Not verified: there is nothing yet to verify with. The answer is public, the request says nothing, and what comes
	// back is checked against the token.
	client := d.client(&tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12})
	defer client.CloseIdleConnections()
	for start := time.Now(); ; {
		a, err := d.request(ctx, client, http.MethodGet, pathClusterInfo, "", nil)
		if err != nil {
			return nil, err
		}
		if err := d.check(a); err != nil {
			return nil, err
		}
		d.claimed.clock = a.clock
		certs, err := d.proven(a.body)
		if KindOf(err) != KindToken || time.Since(start) > d.patience {
			return certs, err
		}
		if err := pause(ctx); err != nil {
			return nil, err
		}
	}
}

func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(500 * time.Millisecond):
		return nil
	}
}

// proven returns those CA certificates of a cluster-info ConfigMap that the token vouches for.
func (d *discovery) proven(body []byte) ([]*x509.Certificate, error) {
	var info corev1.ConfigMap
	if err := json.Unmarshal(body, &info); err != nil || info.Name != bootstrapapi.ConfigMapClusterInfo {
		return nil, problem(KindNotKedge, err, "what answers on %s is no Kubernetes API (%s): correct the address or port of --server", d.address, firstLine("", body))
	}
	certs, err := clusterCAs(info.Data[bootstrapapi.KubeConfigKey])
	if err != nil {
		return nil, problem(KindNotKedge, err, "the ConfigMap cluster-info of %s cannot be used: %v; it is a Kubernetes, but not Kedge's, or the ConfigMap was changed", d.address, err)
	}
	_, d.claimed.signed = info.Data[bootstrapapi.JWSSignatureKeyPrefix+d.Token.ID]
	if d.Token.CAHash != "" {
		// Whoever sits in between can add a CA of his own to an answer that also holds the right one.
		right := slices.DeleteFunc(slices.Clone(certs), func(c *x509.Certificate) bool { return pki.HashOfCertificate(c) != d.Token.CAHash })
		if len(right) == 0 {
			return nil, problem(KindCA, nil, "the token belongs to another cluster, or to this one before its CAs were changed: it is for the CA %s, and %s has %s; take a token "+
				"that was made in this cluster now (kedge token create), or correct --server", short(d.Token.CAHash), d.address, short(pki.HashOfCertificate(certs[0])))
		}
		return right, nil
	}
	return certs, d.checkSignature(&info)
}

// checkSignature is the proof for tokens without a CA hash: the server knows the token's secret.
func (d *discovery) checkSignature(info *corev1.ConfigMap) error {
	signature, ok := info.Data[bootstrapapi.JWSSignatureKeyPrefix+d.Token.ID]
	if ok {
		if !jws.DetachedTokenIsValid(signature, info.Data[bootstrapapi.KubeConfigKey], d.Token.ID, d.Token.Secret) {
			return problem(KindToken, nil, "%s cannot prove that it knows the secret of token %s: the token was mistyped or is an old one, or another "+
				"machine answers in the server's place; a token with a CA hash (kedge token create) tells these apart", d.address, d.Token.ID)
		}
		return nil
	}
	if d.Token.Derived {
		return problem(KindNotReady, nil, "the cluster at %s does not know this machine's --token: its servers were started without it or with another text, or "+
			"are about to take it up; the text must be the same on all machines", d.address)
	}
	for key := range info.Data {
		if strings.HasPrefix(key, bootstrapapi.JWSSignatureKeyPrefix) {
			return d.unknownToken()
		}
	}
	return problem(KindNotReady, nil, "the cluster at %s knows no token yet: a new cluster does so in a moment; an older one has none that is still valid (kedge token list)", d.address)
}

func (d *discovery) unknownToken() error {
	return problem(KindToken, nil, "the cluster at %s does not know token %s: it has expired or was revoked, or is another cluster's; make another with `kedge token create`", d.address, d.Token.ID)
}

func clusterCAs(kubeconfig string) ([]*x509.Certificate, error) {
	config, err := clientcmd.Load([]byte(kubeconfig))
	if err != nil {
		return nil, fmt.Errorf("its kubeconfig: %w", err)
	}
	if len(config.Clusters) != 1 {
		return nil, fmt.Errorf("its kubeconfig has %d clusters instead of one", len(config.Clusters))
	}
	for _, c := range config.Clusters {
		if len(c.CertificateAuthorityData) == 0 {
			break
		}
		certs, err := certutil.ParseCertsPEM(c.CertificateAuthorityData)
		if err != nil {
			return nil, fmt.Errorf("its CA: %w", err)
		}
		return certs, nil
	}
	return nil, fmt.Errorf("its kubeconfig has no CA")
}

// short form of a hash, enough to tell two clusters apart.
func short(hash string) string { return hash[:12] }

// checkServer makes the first verified connection, and compares clocks and versions.
func (d *discovery) checkServer(ctx context.Context, client *http.Client, c *Cluster) error {
	a, err := d.request(ctx, client, http.MethodGet, "/version", "", nil)
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		if err := d.checkClock(d.claimed.clock); err != nil {
			return err
		}
	}
	if err != nil {
		return err
	}
	c.Clock = a.clock
	if err := d.checkClock(a.clock); err != nil {
		return err
	}
	if err := d.check(a); err != nil {
		return err
	}
	var info apiversion.Info
	if err := json.Unmarshal(a.body, &info); err != nil {
		return problem(KindNotKedge, err, "what answers on %s is no Kubernetes API (%s): correct the address or port of --server", d.address, firstLine("", a.body))
	}
	c.Version = info.GitVersion
	return checkVersions(d.Role, d.Version, c.Version)
}

func (d *discovery) checkClock(ahead time.Duration) error {
	if ahead.Abs() <= maxClockDifference {
		return nil
	}
	now := time.Now()
	return problem(KindClock, nil, "the clocks are %s apart: here it is %s, at %s it is %s; set the clock of the machine that is wrong (timedatectl), joining then "+
		"goes on by itself", duration.HumanDuration(ahead.Abs()), clockTime(now), d.address, clockTime(now.Add(ahead)))
}

// checkVersions applies https://kubernetes.io/releases/version-skew-policy. Development builds do not know their version.
func checkVersions(role Role, own, cluster string) error {
	o, err := version.ParseSemantic(own)
	if err != nil || o.Major() == 0 {
		return nil
	}
	c, err := version.ParseSemantic(cluster)
	if err != nil || c.Major() == 0 {
		return nil
	}
	older := int(c.Minor()) - int(o.Minor())
	rule := ""
	switch {
	case o.Major() != c.Major():
		rule = "these cannot work together"
	case role == Agent && (older < 0 || older > 3):
		rule = "an agent must not be newer than the servers, nor older than them by more than three minor versions"
	case role == Server && (older < -1 || older > 1):
		rule = "servers of one cluster must not be more than one minor version apart"
	}
	if rule == "" {
		return nil
	}
	return problem(KindVersion, nil, "this Kedge brings Kubernetes %s, and the cluster runs %s: %s; install the cluster's version here, or upgrade the cluster first", own, cluster, rule)
}

// checkToken shows the token to the verified server and looks at the role that it gives.
func (d *discovery) checkToken(ctx context.Context, client *http.Client) error {
	review := authenticationv1.SelfSubjectReview{TypeMeta: metav1.TypeMeta{APIVersion: authenticationv1.SchemeGroupVersion.String(), Kind: "SelfSubjectReview"}}
	body, err := json.Marshal(review)
	if err != nil {
		return err
	}
	var a *answer
	for start := time.Now(); ; {
		if a, err = d.request(ctx, client, http.MethodPost, pathSelf, d.Token.Bearer(), body); err != nil {
			return err
		}
		if a.code != http.StatusUnauthorized || time.Since(start) > d.patience {
			break
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
	if a.code == http.StatusUnauthorized && d.claimed.signed {
		return problem(KindToken, nil, "the secret of token %s is not the one that the cluster at %s knows: it was mistyped; copy the token again", d.Token.ID, d.address)
	}
	if a.code == http.StatusUnauthorized {
		return d.unknownToken()
	}
	if err := d.check(a); err != nil {
		return err
	}
	if err := json.Unmarshal(a.body, &review); err != nil {
		return problem(KindNotKedge, err, "what answers on %s is no Kubernetes API (%s): correct the address or port of --server", d.address, firstLine("", a.body))
	}
	groups := review.Status.UserInfo.Groups
	if slices.Contains(groups, d.Role.group()) {
		return nil
	}
	if role := roleOf(groups); role != "" {
		return problem(KindRole, nil, "token %s is for joining %s, and this machine is to become %s: make one with `kedge token create --role %s`", d.Token.ID, role.article(), d.Role.article(), d.Role)
	}
	return problem(KindRole, nil, "token %s is a bootstrap token of the cluster, but not for joining machines to Kedge: make one with `kedge token create --role %s`", d.Token.ID, d.Role)
}
