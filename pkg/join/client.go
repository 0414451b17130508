// SPDX-License-Identifier: Apache-2.0

package join

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	certutil "k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/certificate"
	"k8s.io/client-go/util/keyutil"
)

const (
	// approvalTime is how long a request is looked at before the caller hears why nothing comes.
	approvalTime = 15 * time.Second
	// serverCertificateLife covers the joining; afterwards a server has the CA's key.
	serverCertificateLife = time.Hour
)

// DialFunc opens connections for a client, for example through a load balancer.
type DialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

// Client does what a token allows in a cluster that Discover has verified. It is for one goroutine.
type Client struct {
	api      kubernetes.Interface
	address  string        // for messages
	patience time.Duration // with an approver
	// pending requests by their signer: a call that is repeated after an error goes on with the same request.
	pending map[string]*request
}

// Client returns one with the token's rights. dial may be nil.
func (c *Cluster) Client(token Token, dial DialFunc) (*Client, error) {
	config := c.config(dial)
	config.BearerToken = token.Bearer()
	api, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("client of %s: %w", c.URL, err)
	}
	return newClient(api, strings.TrimPrefix(c.URL, "https://")), nil
}

// NewClient returns one with the rights in config, such as those of a node, which may renew its own certificates.
func NewClient(config *rest.Config) (*Client, error) {
	api, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	return newClient(api, strings.TrimPrefix(config.Host, "https://")), nil
}

func newClient(api kubernetes.Interface, address string) *Client {
	return &Client{api: api, address: address, patience: approvalTime, pending: map[string]*request{}}
}

// config without credentials.
func (c *Cluster) config(dial DialFunc) *rest.Config {
	return &rest.Config{
		Host:            c.URL,
		TLSClientConfig: rest.TLSClientConfig{CAData: c.CA},
		Timeout:         requestTimeout,
		UserAgent:       "kedge-join",
		Dial:            dial,
		// As in discovery.client.
		Proxy: func(*http.Request) (*url.URL, error) { return nil, nil },
	}
}

// Settings reads what all machines of the cluster have to agree on: config.Cluster as JSON, and the CA of client certificates.
func (c *Client) Settings(ctx context.Context) (clusterJSON, clientCA []byte, err error) {
	ctx, connected := traced(ctx)
	m, err := c.api.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, ConfigMapCluster, metav1.GetOptions{})
	if err != nil {
		return nil, nil, statusError(c.address, "the cluster's settings", connected, err)
	}
	settings, ca := m.Data[KeyCluster], m.Data[KeyClientCA]
	if settings == "" {
		return nil, nil, problem(KindNotReady, nil, "the ConfigMap %s/%s of the cluster has no %s yet: its first server is still starting", m.Namespace, m.Name, KeyCluster)
	}
	if _, err := certutil.ParseCertsPEM([]byte(ca)); err != nil {
		return nil, nil, problem(KindNotReady, err, "the ConfigMap %s/%s of the cluster has no usable %s (%v): servers write it when they start", m.Namespace, m.Name, KeyClientCA, err)
	}
	return []byte(settings), []byte(ca), nil
}

// request is a certificate signing request of this machine.
type request struct {
	object  *certificatesv1.CertificateSigningRequest
	key     []byte // PEM
	created bool
}

// NodeCertificate gets the node's client certificate, which makes this machine the node of that name.
func (c *Client) NodeCertificate(ctx context.Context, nodeName string) (certPEM, keyPEM []byte, err error) {
	return c.certificate(ctx, certificatesv1.KubeAPIServerClientKubeletSignerName, nodeName, pkix.Name{CommonName: UserNodePrefix + nodeName, Organization: []string{GroupNodes}}, 0, nil, nil)
}

// ServingCertificate gets a certificate for a kubelet's own port. A node gets it for its own names and addresses.
func (c *Client) ServingCertificate(ctx context.Context, nodeName string, dns []string, ips []net.IP) (certPEM, keyPEM []byte, err error) {
	subject := pkix.Name{CommonName: UserNodePrefix + nodeName, Organization: []string{GroupNodes}}
	return c.certificate(ctx, certificatesv1.KubeletServingSignerName, nodeName, subject, 0, dns, ips)
}

// ServerCertificate gets a certificate for the join API, for an hour. It takes a server token.
func (c *Client) ServerCertificate(ctx context.Context, nodeName string) (certPEM, keyPEM []byte, err error) {
	return c.certificate(ctx, certificatesv1.KubeAPIServerClientSignerName, nodeName, pkix.Name{CommonName: UserServerPrefix + nodeName, Organization: []string{GroupServers}}, serverCertificateLife, nil, nil)
}

func (c *Client) certificate(ctx context.Context, signer, nodeName string, subject pkix.Name, life time.Duration, dns []string, ips []net.IP) (certPEM, keyPEM []byte, err error) {
	r := c.pending[signer]
	if r == nil {
		if r, err = newRequest(signer, nodeName, subject, life, dns, ips); err != nil {
			return nil, nil, fmt.Errorf("make a certificate request for %s: %w", subject.CommonName, err)
		}
		c.pending[signer] = r
	}
	certPEM, done, err := c.pursue(ctx, r)
	if done {
		delete(c.pending, signer)
	}
	if err != nil {
		return nil, nil, err
	}
	if _, err := tls.X509KeyPair(certPEM, r.key); err != nil {
		return nil, nil, problem(KindNotReady, err, "the cluster issued a certificate for %s that cannot be used: %v", subject.CommonName, err)
	}
	return certPEM, r.key, nil
}

func newRequest(signer, nodeName string, subject pkix.Name, life time.Duration, dns []string, ips []net.IP) (*request, error) {
	keyPEM, err := keyutil.MakeEllipticPrivateKeyPEM()
	if err != nil {
		return nil, err
	}
	key, err := keyutil.ParsePrivateKeyPEM(keyPEM)
	if err != nil {
		return nil, err
	}
	csr, err := certutil.MakeCSR(key, &subject, dns, ips)
	if err != nil {
		return nil, err
	}
	usage := certificatesv1.UsageClientAuth
	if signer == certificatesv1.KubeletServingSignerName {
		usage = certificatesv1.UsageServerAuth
	}
	r := &request{key: keyPEM, object: &certificatesv1.CertificateSigningRequest{
		Spec: certificatesv1.CertificateSigningRequestSpec{
			Request:    csr,
			SignerName: signer,
			Usages:     []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, usage},
		},
	}}
	// The name tells people whose it is. It is this request's alone, so that creating it twice does no harm.
	sum := sha256.Sum256(csr)
	r.object.Name = "kedge-" + strings.TrimRight(nodeName[:min(len(nodeName), 200)], ".-") + "-" + hex.EncodeToString(sum[:8])
	if life != 0 {
		r.object.Spec.ExpirationSeconds = new(int32(life / time.Second))
	}
	return r, nil
}

// pursue creates the request unless that has happened, and waits for its end. When that has come, for good or bad, done is true.
func (c *Client) pursue(ctx context.Context, r *request) (certPEM []byte, done bool, err error) {
	ctx, connected := traced(ctx)
	csrs := c.api.CertificatesV1().CertificateSigningRequests()
	what := "the certificate request " + r.object.Name
	if !r.created {
		if _, err := csrs.Create(ctx, r.object, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
			err = statusError(c.address, what, connected, err)
			return nil, !Retryable(err), err
		}
		r.created = true
	}
	start := time.Now()
	for delay := 50 * time.Millisecond; ; delay = min(2*delay, time.Second) {
		csr, err := csrs.Get(ctx, r.object.Name, metav1.GetOptions{})
		if err != nil {
			return nil, apierrors.IsNotFound(err), statusError(c.address, what, connected, err)
		}
		for _, cond := range csr.Status.Conditions {
			switch cond.Type {
			case certificatesv1.CertificateDenied:
				// A token does not allow this, and the cluster removes denied requests after an hour; other identities may.
				_ = csrs.Delete(ctx, csr.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &csr.UID}})
				return nil, true, denied(csr.Name, cond)
			case certificatesv1.CertificateFailed:
				return nil, true, problem(KindNotReady, nil, "the cluster could not sign %s: %s: %s; its servers' log says more", what, cond.Reason, cond.Message)
			}
		}
		if len(csr.Status.Certificate) > 0 {
			return csr.Status.Certificate, true, nil
		}
		if time.Since(start) > c.patience {
			return nil, false, problem(KindNotReady, nil, "nobody has approved or signed %s for %s: are the controllers of the control plane running (`kedge status` on a server)?",
				what, c.patience)
		}
		select {
		case <-ctx.Done():
			return nil, false, ctx.Err()
		case <-time.After(delay):
		}
	}
}

// denied puts the approver's decision into words, which are the approver's own.
func denied(name string, cond certificatesv1.CertificateSigningRequestCondition) error {
	kind := KindRefused
	switch cond.Reason {
	case ReasonNameInUse, ReasonNameSeenRecently:
		kind = KindName
	case ReasonWrongRole:
		kind = KindRole
	case ReasonBadRequest:
	default: // a person's decision
		return problem(kind, nil, "the certificate request %s of this machine was denied: %s: %s", name, cond.Reason, cond.Message)
	}
	e := problem(kind, nil, "%s", cond.Message)
	e.Retry = cond.Reason == ReasonNameSeenRecently
	return e
}

// StoreKubeletClient puts a node's client certificate where the kubelet looks for it and rotates it: dir/kubelet-client-current.pem.
func StoreKubeletClient(dir string, certPEM, keyPEM []byte) error {
	return storeKubelet("kubelet-client", dir, certPEM, keyPEM)
}

// StoreKubeletServing does the same for its serving certificate: dir/kubelet-server-current.pem.
func StoreKubeletServing(dir string, certPEM, keyPEM []byte) error {
	return storeKubelet("kubelet-server", dir, certPEM, keyPEM)
}

func storeKubelet(name, dir string, certPEM, keyPEM []byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("store the node's certificate: %w", err)
	}
	store, err := certificate.NewFileStore(name, dir, dir, "", "")
	if err != nil {
		return fmt.Errorf("store the node's certificate in %s: %w", dir, err)
	}
	if _, err := store.Update(certPEM, keyPEM); err != nil {
		return fmt.Errorf("store the node's certificate in %s: %w", dir, err)
	}
	return nil
}
