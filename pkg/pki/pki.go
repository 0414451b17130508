// SPDX-License-Identifier: Apache-2.0

// Package pki makes and keeps the keys and certificates of a server: four certificate authorities, the service-account
// signing key, the key that encrypts Secrets at rest, the leaf certificates of every component and their kubeconfigs.
//
// Ensure creates what is missing and re-issues leaves that no longer fit; Run renews leaves while the server runs. The
// layout and its reasons are in docs/decisions/pki.md, the operator's view is in docs/certificates.md.
package pki

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"
)

// Name identifies a key, a certificate or a kubeconfig; it is also the base name of its file.
type Name string

// Certificate authorities: NAME.crt and NAME.key.
const (
	ServerCA        Name = "server-ca"         // signs the serving certificates of the API server and of kubelets
	ClientCA        Name = "client-ca"         // signs client certificates (--client-ca-file)
	RequestHeaderCA Name = "request-header-ca" // signs the aggregation layer's client (--requestheader-client-ca-file)
	EtcdCA          Name = "etcd-ca"           // signs etcd's peers and clients
)

// Leaf certificates: NAME.pem holds the certificate and its key, so that the two can never be of different ages.
const (
	APIServer              Name = "apiserver"
	APIServerKubeletClient Name = "apiserver-kubelet-client"
	FrontProxyClient       Name = "front-proxy-client"
	Admin                  Name = "admin"
	KedgeController        Name = "kedge-controller"
	KubeletClient          Name = "kubelet-client"
	KubeletServing         Name = "kubelet-serving"
	EtcdPeer               Name = "etcd-peer"
	ServerClient           Name = "kedge-server" // what this server shows to the join API of the others
)

// Other secrets.
const (
	ServiceAccount Name = "service-account" // NAME.key: private key; readers of the public key accept the same file
	Encryption     Name = "encryption"      // NAME.yaml: EncryptionConfiguration of the API server
	Keyring        Name = "keyring"         // NAME.key: what seals the values of package keyring
)

// APIServerLoopback stands for the certificate that the API server makes for itself in memory at its start. It is in no
// file and can only be replaced by a restart of the API server; see Config.OnRenew.
const APIServerLoopback Name = "apiserver-loopback"

// Users and groups that manifests and flags refer to.
const (
	// UserAPIServer is how the API server introduces itself to kubelets: a manifest has to bind it to the ClusterRole
	// system:kubelet-api-admin, otherwise logs, exec and port-forward are forbidden.
	UserAPIServer = "system:kedge:apiserver"
	// UserFrontProxy is the only name that --requestheader-allowed-names has to hold.
	UserFrontProxy = "front-proxy-client"
	// UserController is what Kedge's own controllers run as; it is in GroupMasters.
	UserController = "system:kedge:controller"
	// UserAdmin is the user of the admin kubeconfig; it is in GroupMasters, so that it works before RBAC rules exist.
	UserAdmin    = "system:admin"
	GroupMasters = "system:masters"
	GroupNodes   = "system:nodes"
	// GroupServers may ask the join API for keys and datastore membership, each member as user UserServerPrefix + its node name.
	GroupServers     = "system:kedge:servers"
	UserServerPrefix = "system:kedge:server:"
)

// Config says what to make and where. All addresses and names of it end up in certificates.
type Config struct {
	Dir           string // holds everything but the admin kubeconfig; made with mode 0700
	KubeconfigDir string // for the components' kubeconfigs; default Dir

	NodeName         string
	NodeIPs          []netip.Addr
	AdvertiseAddress netip.Addr   // optional, if it is not one of NodeIPs
	ServiceIPs       []netip.Addr // the kubernetes Service's address in each family
	ClusterDomain    string       // default cluster.local
	ExtraSANs        []string     // further names and addresses of the API server (--tls-san)

	APIHost string // where the API server of this machine is reached from here; default 127.0.0.1
	APIPort int    // default 6443
	// BalancerPort is the loopback port by which the node's components reach whichever API server answers; default APIPort
	// on APIHost.
	BalancerPort int

	AdminKubeconfigPath string      // empty: no admin kubeconfig
	AdminKubeconfigMode fs.FileMode // default 0600

	// OnRenew is called by Run, one call at a time, when something has to be replaced that its user does not reload: today
	// only APIServerLoopback, to which the answer is a restart of the control-plane process. All leaf certificates
	// are reloaded by their users (docs/decisions/pki.md).
	OnRenew func(Name)

	Logger *slog.Logger // with its component attribute; default slog.Default()
}

// PKI is what Ensure found or made. Its methods may be called concurrently.
type PKI struct {
	cfg    Config
	log    *slog.Logger
	specs  []leafSpec
	hasRun bool // whether there was a start before; true once Ensure returns

	mu          sync.Mutex
	authorities map[Name]*authority // that issue
	rotation    *rotation           // nil: no change of the CAs is under way
	leaves      map[Name]*x509.Certificate
}

// Ensure loads what is in cfg.Dir, creates what is missing, re-issues leaf certificates that are damaged, due, or no
// longer fit cfg, and writes the kubeconfigs. When it returns without error, everything is on disk, also after a power
// loss. It never replaces a key that something outside cfg.Dir depends on: a CA certificate without its key, or a
// damaged CA, service-account key or encryption configuration is an error that names the file and the remedy.
//
// Concurrent calls for one directory, also from different processes, wait for each other.
func Ensure(ctx context.Context, cfg Config) (*PKI, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	p := &PKI{
		cfg:    cfg,
		log:    cfg.Logger,
		specs:  leafSpecs(cfg),
		leaves: map[Name]*x509.Certificate{},
	}
	dir, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("PKI directory %s: %w", cfg.Dir, err)
	}
	defer dir.Close()
	err = removeTemporary(cfg.Dir, "")
	if cfg.AdminKubeconfigPath != "" {
		err = errors.Join(err, removeTemporary(filepath.Split(cfg.AdminKubeconfigPath)))
	}
	if err != nil {
		return nil, fmt.Errorf("remove leftovers of an interrupted write: %w", err)
	}
	// Leaves are written last, so their presence tells a server that has run before from an interrupted first start.
	p.hasRun = slices.ContainsFunc(p.specs, func(s leafSpec) bool {
		_, err := os.Stat(p.CertFile(s.name))
		return err == nil
	})

	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := p.refresh(); err != nil {
		return nil, err
	}
	if !p.hasRun {
		p.hasRun = true
		p.log.Info("made certificate authorities, keys and certificates", "dir", cfg.Dir, "caHash", p.CAHash())
	}
	p.warnAuthorities(wallClock())
	return p, nil
}

// refresh loads everything, makes what is missing or does not fit, and writes that. The directory is locked.
func (p *PKI) refresh() error {
	now := wallClock()
	if err := p.loadRotation(); err != nil {
		return err
	}
	keys, certs, err := p.loadAuthorities(now)
	if err != nil {
		return err
	}
	secrets, err := p.loadSecrets()
	if err != nil {
		return err
	}
	// A certificate must never be on disk without its key, so all keys are durable before the first certificate is written.
	if err := writeFiles(append(keys, secrets...)); err != nil {
		return err
	}
	trusted, err := p.trustFiles()
	if err != nil {
		return err
	}
	leaves, err := p.refreshLeaves(now, nil)
	if err != nil {
		return err
	}
	kubeconfigs, err := p.kubeconfigs(leaves)
	if err != nil {
		return err
	}
	return p.commit(leaves, slices.Concat(certs, trusted, kubeconfigs)...)
}

// complete returns c with its defaults, or an error that names the wrong field.
func (c Config) complete() (Config, error) {
	if c.Dir == "" {
		return c, errors.New("PKI: no directory given")
	}
	var err error
	if c.Dir, err = filepath.Abs(c.Dir); err != nil {
		return c, fmt.Errorf("PKI directory %s: %w", c.Dir, err)
	}
	if c.AdminKubeconfigPath != "" {
		if c.AdminKubeconfigPath, err = filepath.Abs(c.AdminKubeconfigPath); err != nil {
			return c, fmt.Errorf("admin kubeconfig %s: %w", c.AdminKubeconfigPath, err)
		}
	}
	if c.KubeconfigDir == "" {
		c.KubeconfigDir = c.Dir
	}
	if errs := validation.IsDNS1123Subdomain(c.NodeName); len(errs) > 0 {
		return c, fmt.Errorf("PKI: node name %q cannot stand in a certificate: %s", c.NodeName, errs[0])
	}
	for _, addr := range slices.Concat(c.NodeIPs, c.ServiceIPs) {
		if !addr.IsValid() {
			return c, errors.New("PKI: empty address among the node or service addresses")
		}
	}
	for _, san := range c.ExtraSANs {
		if _, err := netip.ParseAddr(san); err == nil {
			continue
		}
		if len(validation.IsDNS1123Subdomain(san)) > 0 && len(validation.IsWildcardDNS1123Subdomain(san)) > 0 {
			return c, fmt.Errorf("tls-san %q is neither an IP address nor a DNS name in lower case", san)
		}
	}
	if c.ClusterDomain == "" {
		c.ClusterDomain = "cluster.local"
	}
	if c.APIHost == "" {
		c.APIHost = "127.0.0.1"
	}
	if c.APIPort == 0 {
		c.APIPort = 6443
	}
	if c.AdminKubeconfigMode == 0 {
		c.AdminKubeconfigMode = 0o600
	}
	if c.OnRenew == nil {
		c.OnRenew = func(Name) {}
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return c, nil
}

// CertFile is the path of the certificate of a CA or leaf. A leaf's file also holds its private key, and its readers take
// the same path for both; a CA's file holds the certificate alone, because the API server and the controller-manager publish it.
func (p *PKI) CertFile(n Name) string {
	if n.isCA() {
		return filepath.Join(p.cfg.Dir, string(n)+".crt")
	}
	return filepath.Join(p.cfg.Dir, string(n)+".pem")
}

// KeyFile is the path of the private key of a CA, of a leaf (the same as CertFile), of ServiceAccount or of Keyring.
func (p *PKI) KeyFile(n Name) string {
	if n.isCA() || n == ServiceAccount || n == Keyring {
		return filepath.Join(p.cfg.Dir, string(n)+".key")
	}
	return p.CertFile(n)
}

// EncryptionConfigFile is the path for --encryption-provider-config.
func (p *PKI) EncryptionConfigFile() string {
	return filepath.Join(p.cfg.Dir, string(Encryption)+".yaml")
}

// CAHash identifies the cluster: "sha256:" and the hash of the server CA, see HashOfCertificate. It stays the same when the CA's
// certificate is made anew for the same key.
func (p *PKI) CAHash() string { return "sha256:" + HashOfCertificate(p.authority(ServerCA).cert) }

// authority that issues.
func (p *PKI) authority(n Name) *authority {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.authorities[n]
}

func authorityNames() []Name { return []Name{ServerCA, ClientCA, RequestHeaderCA, EtcdCA} }

func (n Name) isCA() bool { return slices.Contains(authorityNames(), n) }

// wallClock is the time that certificates are judged by and counted from. A clock that stands before Kedge's release
// is certainly wrong (boards without a battery start in 1970): counting from it would give certificates that have
// expired as soon as the clock is set. The monotonic part is dropped, because it stands still while a machine sleeps.
func wallClock() time.Time {
	release := time.Date(2026, time.November, 1, 0, 0, 0, 0, time.UTC)
	if now := time.Now().Round(0).UTC(); now.After(release) {
		return now
	}
	return release
}
