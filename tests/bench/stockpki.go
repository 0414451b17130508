// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	certutil "k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
)

// stockPKI has the certificates and kubeconfigs that kubeadm makes, with ECDSA keys as Kedge has them.
type stockPKI struct {
	ca    *authority
	files map[string][]byte // of the server, by name below /etc/kubernetes
	admin *rest.Config
}

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
	pem  []byte
}

func newStockPKI(name, ip string) (*stockPKI, error) {
	p := &stockPKI{files: map[string][]byte{}}
	ca, err := p.authority("ca", "kubernetes")
	if err != nil {
		return nil, err
	}
	p.ca = ca
	front, err := p.authority("front-ca", "front-proxy-ca")
	if err != nil {
		return nil, err
	}
	if err := p.serviceAccountKey(); err != nil {
		return nil, err
	}
	alt := &certutil.AltNames{
		DNSNames: []string{name, "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		IPs:      []net.IP{net.ParseIP(ip), net.IPv4(127, 0, 0, 1), net.IPv4(10, 43, 0, 1)},
	}
	for _, l := range []struct {
		file string
		by   *authority
		cn   string
		org  string
		alt  *certutil.AltNames
	}{
		{"apiserver", ca, "kube-apiserver", "", alt},
		{"kubelet-client", ca, "kube-apiserver-kubelet-client", "system:masters", nil},
		{"front-proxy-client", front, "front-proxy-client", "", nil},
	} {
		cert, key, err := l.by.issue(l.cn, l.org, l.alt)
		if err != nil {
			return nil, err
		}
		p.files[l.file+".crt"], p.files[l.file+".key"] = cert, key
	}
	const local = "https://127.0.0.1:" + apiPort
	clients := map[string]client{"controller-manager.conf": {"system:kube-controller-manager", ""}, "scheduler.conf": {"system:kube-scheduler", ""}}
	if err := errors.Join(ca.kubeconfigs(p.files, local, clients), ca.kubeconfigs(p.files, local, nodeClients(name))); err != nil {
		return nil, err
	}
	cert, key, err := ca.issue("admin", "system:masters", nil)
	p.admin = &rest.Config{Host: "https://" + net.JoinHostPort(ip, apiPort), TLSClientConfig: rest.TLSClientConfig{CAData: ca.pem, CertData: cert, KeyData: key}}
	return p, err
}

// node returns the files of a machine that has the node parts only and uses the API server at a URL.
func (p *stockPKI) node(name, api string) (map[string][]byte, error) {
	files := map[string][]byte{"ca.crt": p.ca.pem}
	return files, p.ca.kubeconfigs(files, api, nodeClients(name))
}

// client is whom a kubeconfig stands for.
type client struct{ cn, org string }

func nodeClients(name string) map[string]client {
	return map[string]client{
		"kubelet.conf":    {"system:node:" + name, "system:nodes"},
		"kube-proxy.conf": {"system:kube-proxy", ""},
		"flannel.conf":    {"flannel", "system:masters"},
	}
}

// kubeconfigs adds a kubeconfig for each client to files.
func (a *authority) kubeconfigs(files map[string][]byte, api string, clients map[string]client) error {
	for file, c := range clients {
		cert, key, err := a.issue(c.cn, c.org, nil)
		if err != nil {
			return err
		}
		if files[file], err = kubeconfig(api, a, cert, key); err != nil {
			return err
		}
	}
	return nil
}

func (p *stockPKI) authority(file, cn string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	cert, err := certutil.NewSelfSignedCACert(certutil.Config{CommonName: cn}, key)
	if err != nil {
		return nil, err
	}
	a := &authority{cert: cert, key: key}
	if a.pem, err = certutil.EncodeCertificates(cert); err != nil {
		return nil, err
	}
	p.files[file+".crt"] = a.pem
	p.files[file+".key"], err = keyutil.MarshalPrivateKeyToPEM(key)
	return a, err
}

func (p *stockPKI) serviceAccountKey() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if p.files["sa.key"], err = keyutil.MarshalPrivateKeyToPEM(key); err != nil {
		return err
	}
	// The API server takes the public part from a private key as well.
	p.files["sa.pub"] = p.files["sa.key"]
	return nil
}

// issue makes a certificate for clients, and for servers if there are names.
func (a *authority) issue(cn, org string, alt *certutil.AltNames) (cert, key []byte, err error) {
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, nil, err
	}
	t := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: cn},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(1, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if org != "" {
		t.Subject.Organization = []string{org}
	}
	if alt != nil {
		t.DNSNames, t.IPAddresses = alt.DNSNames, alt.IPs
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, signer.Public(), a.key)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate of %s: %w", cn, err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	if cert, err = certutil.EncodeCertificates(parsed); err != nil {
		return nil, nil, err
	}
	key, err = keyutil.MarshalPrivateKeyToPEM(signer)
	return cert, key, err
}

func kubeconfig(api string, ca *authority, cert, key []byte) ([]byte, error) {
	c := clientcmdapi.NewConfig()
	c.Clusters["stock"] = &clientcmdapi.Cluster{Server: api, CertificateAuthorityData: ca.pem}
	c.AuthInfos["user"] = &clientcmdapi.AuthInfo{ClientCertificateData: cert, ClientKeyData: key}
	c.Contexts["default"] = &clientcmdapi.Context{Cluster: "stock", AuthInfo: "user"}
	c.CurrentContext = "default"
	return clientcmd.Write(*c)
}
