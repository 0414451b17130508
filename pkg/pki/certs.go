// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"time"

	certutil "k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
)

const (
	day      = 24 * time.Hour
	caLife   = 10 * 365 * day
	leafLife = 365 * day
	// renewBefore is how long before its end a leaf is renewed: two thirds of its life are over then.
	renewBefore = leafLife / 3
	// caWarnBefore is how long before a CA's end the log and the status warn.
	caWarnBefore = 365 * day
)

// authority is a loaded CA.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// leafSpec says what a leaf certificate has to contain.
type leafSpec struct {
	name   Name
	ca     Name
	cn     string
	org    []string
	usages []x509.ExtKeyUsage
	dns    []string
	ips    []netip.Addr
}

// leaf is a certificate with its file.
type leaf struct {
	name   Name
	cert   *x509.Certificate
	pem    []byte // certificate and key
	reason string // why it was issued anew
	file   *file  // what to write; nil if the one on disk is kept
}

// leafSpecs is the complete list of leaf certificates.
func leafSpecs(cfg Config) []leafSpec {
	server := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	client := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	both := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}

	loopback := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
	local := slices.Concat(loopback, cfg.NodeIPs)
	apiIPs := slices.Concat(local, []netip.Addr{cfg.AdvertiseAddress}, cfg.ServiceIPs)
	apiNames := []string{
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + cfg.ClusterDomain,
		"localhost", cfg.NodeName,
	}
	for _, san := range append([]string{cfg.APIHost}, cfg.ExtraSANs...) {
		if addr, err := netip.ParseAddr(san); err == nil {
			apiIPs = append(apiIPs, addr)
		} else {
			apiNames = append(apiNames, san)
		}
	}
	node := "system:node:" + cfg.NodeName
	etcdNames := []string{"localhost", cfg.NodeName}

	specs := []leafSpec{
		{name: APIServer, ca: ServerCA, cn: "kube-apiserver", usages: server, dns: apiNames, ips: apiIPs},
		{name: APIServerKubeletClient, ca: ClientCA, cn: UserAPIServer, usages: client},
		{name: FrontProxyClient, ca: RequestHeaderCA, cn: UserFrontProxy, usages: client},
		{name: Admin, ca: ClientCA, cn: UserAdmin, org: []string{GroupMasters}, usages: client},
		{name: KedgeController, ca: ClientCA, cn: UserController, org: []string{GroupMasters}, usages: client},
		{name: KubeletClient, ca: ClientCA, cn: node, org: []string{GroupNodes}, usages: client},
		{name: KubeletServing, ca: ServerCA, cn: node, org: []string{GroupNodes}, usages: server,
			dns: []string{cfg.NodeName}, ips: cfg.NodeIPs},
		{name: ServerClient, ca: ClientCA, cn: UserServerPrefix + cfg.NodeName, org: []string{GroupServers}, usages: client},
		// etcd's peers present one certificate in both directions, and it checks a peer's address against it.
		{name: EtcdPeer, ca: EtcdCA, cn: "etcd-peer", usages: both, dns: etcdNames, ips: local},
	}
	for i := range specs {
		specs[i].dns = sortedNames(specs[i].dns)
		specs[i].ips = sortedAddrs(specs[i].ips)
	}
	return specs
}

// loadAuthorities loads or makes every CA. It returns the files to write: keys, and certificates, which have to follow
// the keys. All problems are reported at once.
func (p *PKI) loadAuthorities(now time.Time) (keys, certs []file, err error) {
	authorities := map[Name]*authority{}
	var errs []error
	for _, name := range authorityNames() {
		ca, key, cert, err := p.loadAuthority(name, now)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		authorities[name] = ca
		keys, certs = append(keys, key...), append(certs, cert...)
	}
	if len(errs) == 0 {
		p.mu.Lock()
		p.authorities = authorities
		p.mu.Unlock()
	}
	return keys, certs, errors.Join(errs...)
}

func (p *PKI) loadAuthority(name Name, now time.Time) (ca *authority, keyFile, certFile []file, err error) {
	keyPath, certPath := p.KeyFile(name), p.CertFile(name)
	keyPEM, keyErr := readSecret(keyPath)
	certPEM, certErr := readSecret(certPath)
	keyMissing, certMissing := errors.Is(keyErr, fs.ErrNotExist), errors.Is(certErr, fs.ErrNotExist)
	ca = &authority{}
	switch {
	case keyErr != nil && !keyMissing, certErr != nil && !certMissing:
		return nil, nil, nil, fmt.Errorf("load %s: %w", name, errors.Join(keyErr, certErr))
	case keyMissing && !certMissing:
		return nil, nil, nil, fmt.Errorf("%s is missing, but the certificate %s exists: without the key no certificate can be "+
			"issued or renewed; restore the key from a backup or from another server of the cluster; only if it is lost for good, "+
			"remove the certificate too: the next start makes a new CA, and nodes and users have to get new credentials", keyPath, certPath)
	case keyMissing:
		if ca.key, keyPEM, err = newKey(); err != nil {
			return nil, nil, nil, fmt.Errorf("make the key of %s: %w", name, err)
		}
		keyFile = []file{{path: keyPath, data: keyPEM, mode: 0o600}}
		if p.hasRun {
			p.log.Warn("certificate authority was missing, made a new one: nodes and users need new credentials", "name", name)
		}
	default:
		if ca.key, err = parseKey(keyPEM); err != nil {
			return nil, nil, nil, fmt.Errorf("%s is damaged: %w; restore it from a backup or from another server of the cluster", keyPath, err)
		}
	}
	if certMissing {
		if ca.cert, err = selfSign(name, ca.key, now); err != nil {
			return nil, nil, nil, fmt.Errorf("make the certificate of %s: %w", name, err)
		}
		if certPEM, err = certutil.EncodeCertificates(ca.cert); err != nil {
			return nil, nil, nil, fmt.Errorf("encode the certificate of %s: %w", name, err)
		}
		if !keyMissing {
			p.log.Info("made a new certificate for an existing CA key", "name", name, "notAfter", ca.cert.NotAfter)
		}
		return ca, keyFile, []file{{path: certPath, data: certPEM, mode: 0o600}}, nil
	}
	if ca.cert, err = parseCA(certPEM, ca.key); err != nil {
		return nil, nil, nil, fmt.Errorf("%s cannot be used: %w; restore it from a backup, or remove it to have it made anew for "+
			"the key beside it", certPath, err)
	}
	if now.After(ca.cert.NotAfter) {
		return nil, nil, nil, fmt.Errorf("%s has expired on %s (the clock says %s): if the clock is right, remove the file (not the "+
			"key) to have it made anew, and hand out kubeconfigs again", certPath, ca.cert.NotAfter.Format(time.DateOnly), now.Format(time.DateOnly))
	}
	return ca, nil, nil, nil
}

// newKey returns an ECDSA P-256 key, also in PEM.
func newKey() (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	data, err := keyutil.MarshalPrivateKeyToPEM(key)
	return key, data, err
}

func parseKey(data []byte) (crypto.Signer, error) {
	key, err := keyutil.ParsePrivateKeyPEM(data)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a %T cannot sign", key)
	}
	return signer, nil
}

// parseCA checks that a CA file can do its work. One certificate only, because the controller-manager's signers refuse more
// (k8s.io/kubernetes/pkg/controller/certificates/signer, caProvider.setCA).
func parseCA(data []byte, key crypto.Signer) (*x509.Certificate, error) {
	if bytes.Contains(data, []byte("PRIVATE KEY")) {
		return nil, errors.New("it holds a private key, and the cluster publishes this file")
	}
	certs, err := certutil.ParseCertsPEM(data)
	if err != nil {
		return nil, err
	}
	if len(certs) != 1 {
		return nil, fmt.Errorf("it holds %d certificates instead of one", len(certs))
	}
	cert := certs[0]
	if !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, errors.New("its certificate is not that of a CA")
	}
	if pub, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(key.Public()) {
		return nil, errors.New("certificate and key do not belong together")
	}
	return cert, nil
}

// selfSign makes a CA certificate. Its subject depends on nothing but the key, so that leaves stay valid when a CA's
// certificate is made anew. It is valid from 1970 on: a NotBefore protects nothing in a root, and whole clusters have failed to
// start on boards whose clock was not set yet.
func selfSign(name Name, key crypto.Signer, now time.Time) (*x509.Certificate, error) {
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: fmt.Sprintf("kedge-%s-%x", name, sha256.Sum256(spki))[:len("kedge-")+len(name)+9]},
		NotBefore:             time.Unix(0, 0).UTC(),
		NotAfter:              now.Add(caLife),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// refreshLeaves loads every leaf and issues those anew that are missing, damaged, due, different from their spec, or among force.
func (p *PKI) refreshLeaves(now time.Time, force []Name) ([]leaf, error) {
	leaves := make([]leaf, 0, len(p.specs))
	for _, spec := range p.specs {
		ca := p.authority(spec.ca)
		cross := p.cross(spec.ca)
		path := p.CertFile(spec.name)
		data, err := readSecret(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("load certificate %s: %w", spec.name, err)
		}
		cert, reason := spec.check(data, ca, cross, now)
		if reason == "" && slices.Contains(force, spec.name) {
			reason = "somebody asked for it"
		}
		l := leaf{name: spec.name, cert: cert, pem: data, reason: reason}
		if reason != "" {
			if l.cert, l.pem, err = spec.issue(ca, cross, now); err != nil {
				return nil, fmt.Errorf("issue certificate %s: %w", spec.name, err)
			}
			l.file = &file{path: path, data: l.pem, mode: 0o600}
		}
		leaves = append(leaves, l)
	}
	return leaves, nil
}

// commit writes new leaves together with other files and makes the leaves the current ones.
func (p *PKI) commit(leaves []leaf, other ...file) error {
	files := slices.Clone(other)
	for _, l := range leaves {
		if l.file != nil {
			files = append(files, *l.file)
		}
	}
	if err := writeFiles(files); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range leaves {
		if l.file != nil && p.hasRun { // a first start is summed up in one line
			p.log.Info("certificate issued", "name", l.name, "reason", l.reason, "notAfter", l.cert.NotAfter)
		}
		p.leaves[l.name] = l.cert
	}
	return nil
}

// check parses the PEM data of a leaf and says why it has to be issued anew, or nothing.
func (s leafSpec) check(data []byte, ca *authority, cross []byte, now time.Time) (cert *x509.Certificate, reason string) {
	if data == nil {
		return nil, "missing"
	}
	pair, err := tls.X509KeyPair(data, data)
	if err != nil {
		return nil, "damaged: " + err.Error()
	}
	cert = pair.Leaf
	dns := sortedNames(cert.DNSNames)
	ips := make([]netip.Addr, 0, len(cert.IPAddresses))
	for _, ip := range cert.IPAddresses {
		addr, _ := netip.AddrFromSlice(ip)
		ips = append(ips, addr)
	}
	ips = sortedAddrs(ips)
	switch {
	case string(cert.RawIssuer) != string(ca.cert.RawSubject) || cert.CheckSignatureFrom(ca.cert) != nil:
		reason = "signed by another CA"
	case cross != nil && !bytes.Equal(slices.Concat(pair.Certificate[1:]...), cross):
		reason = "the CAs are changing"
	case cert.Subject.CommonName != s.cn || !slices.Equal(cert.Subject.Organization, s.org):
		reason = fmt.Sprintf("subject was %s", cert.Subject)
	case !slices.Equal(cert.ExtKeyUsage, s.usages):
		reason = "usages changed"
	case !slices.Equal(dns, s.dns) || !slices.Equal(ips, s.ips):
		reason = fmt.Sprintf("names changed from %v %v to %v %v", dns, ips, s.dns, s.ips)
	case now.After(cert.NotAfter):
		reason = "expired on " + cert.NotAfter.Format(time.RFC3339)
	case !now.Before(renewAt(cert)):
		reason = "two thirds of its life are over"
	}
	return cert, reason
}

// issue makes a new key and a certificate for it, with cross (DER, may be nil) behind it. The certificate is valid from its CA's first moment, never earlier, see selfSign.
func (s leafSpec) issue(ca *authority, cross []byte, now time.Time) (*x509.Certificate, []byte, error) {
	key, keyPEM, err := newKey()
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: s.cn, Organization: s.org},
		NotBefore:             ca.cert.NotBefore,
		NotAfter:              now.Add(leafLife),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           s.usages,
		BasicConstraintsValid: true,
		DNSNames:              s.dns,
	}
	for _, addr := range s.ips {
		template.IPAddresses = append(template.IPAddresses, net.IP(addr.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	certPEM, err := certutil.EncodeCertificates(cert)
	if cross != nil {
		certPEM = append(certPEM, pem.EncodeToMemory(&pem.Block{Type: certutil.CertificateBlockType, Bytes: cross})...)
	}
	return cert, append(certPEM, keyPEM...), err
}

// renewAt counts from the end of a leaf, because its NotBefore is not the moment of issue.
func renewAt(cert *x509.Certificate) time.Time { return cert.NotAfter.Add(-renewBefore) }

// sortedNames returns the non-empty names once each, in order.
func sortedNames(names []string) []string {
	names = slices.DeleteFunc(slices.Clone(names), func(s string) bool { return s == "" })
	slices.Sort(names)
	return slices.Compact(names)
}

// sortedAddrs returns the valid addresses once each, in order, without zones and IPv4 in its short form.
func sortedAddrs(addrs []netip.Addr) []netip.Addr {
	addrs = slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return !a.IsValid() })
	for i, a := range addrs {
		addrs[i] = a.Unmap().WithZone("")
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}
