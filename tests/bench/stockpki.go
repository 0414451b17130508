// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
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
	files map[string][]byte // by name below /etc/kubernetes
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
	for _, u := range []struct{ file, cn, org string }{
		{"controller-manager.conf", "system:kube-controller-manager", ""},
		{"scheduler.conf", "system:kube-scheduler", ""},
		{"kubelet.conf", "system:node:" + name, "system:nodes"},
		{"kube-proxy.conf", "system:kube-proxy", ""},
		{"flannel.conf", "flannel", "system:masters"},
	} {
		cert, key, err := ca.issue(u.cn, u.org, nil)
		if err != nil {
			return nil, err
		}
		if p.files[u.file], err = kubeconfig(ca, cert, key); err != nil {
			return nil, err
		}
	}
	cert, key, err := ca.issue("admin", "system:masters", nil)
	p.admin = &rest.Config{Host: "https://" + net.JoinHostPort(ip, apiPort), TLSClientConfig: rest.TLSClientConfig{CAData: ca.pem, CertData: cert, KeyData: key}}
	return p, err
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

func kubeconfig(ca *authority, cert, key []byte) ([]byte, error) {
	c := clientcmdapi.NewConfig()
	c.Clusters["stock"] = &clientcmdapi.Cluster{Server: "https://127.0.0.1:" + apiPort, CertificateAuthorityData: ca.pem}
	c.AuthInfos["user"] = &clientcmdapi.AuthInfo{ClientCertificateData: cert, ClientKeyData: key}
	c.Contexts["default"] = &clientcmdapi.Context{Cluster: "stock", AuthInfo: "user"}
	c.CurrentContext = "default"
	return clientcmd.Write(*c)
}
