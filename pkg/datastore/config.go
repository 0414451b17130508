// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"net/url"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/kedge-io/kedge/pkg/logging"
)

// Config of the [etcd] process.
type Config struct {
	Logging logging.Config `json:"logging"`
	// Name of the member: the node's name.
	Name string `json:"name"`
	Dir  string `json:"dir"`
	// Socket is the path of the client socket.
	Socket string `json:"socket"`
	// PeerAddress is where other members reach this one. When it is not the one that the cluster knows, the member tells it.
	PeerAddress netip.AddrPort `json:"peerAddress"`
	PeerCert    string         `json:"peerCert"`
	PeerKey     string         `json:"peerKey"`
	PeerCA      string         `json:"peerCA"`
	// Bootstrap allows an empty data directory to become a new cluster. Without it a member with an empty directory joins the
	// cluster of InitialCluster or fails; with data in the directory neither of the two is looked at.
	Bootstrap bool `json:"bootstrap,omitempty"`
	// InitialCluster are the members as Members.Add has returned them, this one among them: whom a joining member asks.
	InitialCluster []Member `json:"initialCluster,omitempty"`
	// ClientListen is an address for clients on other machines, optional. They need a certificate of PeerCA.
	ClientListen netip.AddrPort `json:"clientListen,omitzero"`
	// Args are etcd flags (--etcd-arg), as --key=value.
	Args []string `json:"args,omitempty"`
}

// Endpoint is the client URL of a member that listens on socket.
func Endpoint(socket string) string { return "unix://" + socket }

func (c Config) peerURL() string { return PeerURL(c.PeerAddress) }

func (c Config) peerFiles() TLSFiles { return TLSFiles{Cert: c.PeerCert, Key: c.PeerKey, CA: c.PeerCA} }

// PeerURL is how members know a member that listens on address.
func PeerURL(address netip.AddrPort) string { return "https://" + address.String() }

// CheckArgs refuses etcd flags that do not exist, before anything is started.
func CheckArgs(args []string) error { return parseArgs(embed.NewConfig(), args) }

func parseArgs(ec *embed.Config, args []string) error {
	if len(args) == 0 {
		return nil
	}
	fs := flag.NewFlagSet("etcd", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	ec.AddFlags(fs)
	if err := fs.Parse(args); err != nil {
		return fmt.Errorf("etcd-arg: %w", err)
	}
	return nil
}

func etcdConfig(cfg Config, disk Disk, log *slog.Logger) (*embed.Config, error) {
	ec := embed.NewConfig()
	// What was given by --etcd-arg goes over these.
	heartbeat, election := disk.timeouts()
	ec.TickMs, ec.ElectionMs = uint(heartbeat.Milliseconds()), uint(election.Milliseconds())
	ec.QuotaBackendBytes = disk.quota()
	// etcd's own check of changes: Members makes it, too, asks the peers themselves and knows --force. What etcd's adds is that
	// a server cannot join before the last one has been connected for five seconds.
	ec.StrictReconfigCheck = false
	if err := parseArgs(ec, cfg.Args); err != nil {
		return nil, err
	}
	client := url.URL{Scheme: "unix", Path: cfg.Socket}
	peer := url.URL{Scheme: "https", Host: cfg.PeerAddress.String()}
	ec.Name = cfg.Name
	ec.Dir = cfg.Dir
	ec.ListenClientUrls, ec.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	if cfg.ClientListen.IsValid() {
		tcp := url.URL{Scheme: "https", Host: cfg.ClientListen.String()}
		ec.ListenClientUrls, ec.AdvertiseClientUrls = append(ec.ListenClientUrls, tcp), append(ec.AdvertiseClientUrls, tcp)
		// The peer certificate is one for servers, too.
		ec.ClientTLSInfo.CertFile, ec.ClientTLSInfo.KeyFile, ec.ClientTLSInfo.TrustedCAFile = cfg.PeerCert, cfg.PeerKey, cfg.PeerCA
		ec.ClientTLSInfo.ClientCertAuth = true
	}
	ec.ListenPeerUrls, ec.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	ec.InitialCluster = ec.InitialClusterFromName(cfg.Name)
	ec.PeerTLSInfo.CertFile, ec.PeerTLSInfo.KeyFile, ec.PeerTLSInfo.TrustedCAFile = cfg.PeerCert, cfg.PeerKey, cfg.PeerCA
	ec.PeerTLSInfo.ClientCertAuth = true
	ec.EnableGRPCGateway = false // JSON over HTTP, which nobody here speaks
	ec.ZapLoggerBuilder = embed.NewZapLoggerBuilder(logging.Zap(log).WithOptions(zap.WrapCore(quiet)))
	// A commit of bbolt rewrites pages of its tree; what has been acknowledged is in the write-ahead log already. Collecting
	// for a second instead of a tenth saves most of the idle writes and costs a longer replay after a crash (milliseconds).
	ec.BackendBatchInterval = time.Second
	return ec, nil
}
