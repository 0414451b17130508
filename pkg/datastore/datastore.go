// SPDX-License-Identifier: Apache-2.0

// Package datastore runs the [etcd] process: one embedded etcd member. Its clients reach it over a unix socket that only
// root can open, so neither TLS nor a TCP port is between it and the API server; peers use TLS.
package datastore

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"time"

	"go.etcd.io/etcd/server/v3/embed"

	"github.com/kedge-io/kedge/pkg/logging"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// Component is the name in `kedge status`.
const Component = "etcd"

// Config of the [etcd] process.
type Config struct {
	Logging logging.Config `json:"logging"`
	// Name of the member: the node's name.
	Name string `json:"name"`
	Dir  string `json:"dir"`
	// Socket is the path of the client socket.
	Socket string `json:"socket"`
	// PeerAddress is where other members reach this one.
	PeerAddress netip.AddrPort `json:"peerAddress"`
	PeerCert    string         `json:"peerCert"`
	PeerKey     string         `json:"peerKey"`
	PeerCA      string         `json:"peerCA"`
	// Args are etcd flags (--etcd-arg), as --key=value.
	Args []string `json:"args,omitempty"`
}

// Endpoint is the client URL of a member that listens on socket.
func Endpoint(socket string) string { return "unix://" + socket }

// Run starts the member and blocks until ctx ends or etcd fails.
func Run(ctx context.Context, cfg Config, child *supervise.Child, log *slog.Logger) error {
	ec, err := etcdConfig(cfg, log)
	if err != nil {
		return err
	}
	// A socket that a killed member left behind would be in the way.
	if err := os.Remove(cfg.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	child.Report(Component, supervise.Running, "opening "+cfg.Dir)
	e, err := embed.StartEtcd(ec)
	if err != nil {
		return fmt.Errorf("etcd: %w", err)
	}
	defer e.Close()
	// The socket is made with the process's umask; the directory above it is root's alone, this is the second lock.
	if err := os.Chmod(cfg.Socket, 0o600); err != nil {
		return err
	}
	child.Report(Component, supervise.Running, "waiting for a leader")
	for {
		select {
		case <-e.Server.ReadyNotify():
			child.Report(Component, supervise.Ready, "")
			return serve(ctx, e)
		case err := <-e.Err():
			return fmt.Errorf("etcd: %w", err)
		case <-ctx.Done():
			return nil
		}
	}
}

func serve(ctx context.Context, e *embed.Etcd) error {
	select {
	case err := <-e.Err():
		return fmt.Errorf("etcd: %w", err)
	case <-e.Server.StopNotify():
		return errors.New("etcd stopped by itself")
	case <-ctx.Done():
		return nil
	}
}

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

func etcdConfig(cfg Config, log *slog.Logger) (*embed.Config, error) {
	ec := embed.NewConfig()
	if err := parseArgs(ec, cfg.Args); err != nil {
		return nil, err
	}
	client := url.URL{Scheme: "unix", Path: cfg.Socket}
	peer := url.URL{Scheme: "https", Host: cfg.PeerAddress.String()}
	ec.Name = cfg.Name
	ec.Dir = cfg.Dir
	ec.ListenClientUrls, ec.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	ec.ListenPeerUrls, ec.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	ec.InitialCluster = ec.InitialClusterFromName(cfg.Name)
	ec.PeerTLSInfo.CertFile, ec.PeerTLSInfo.KeyFile, ec.PeerTLSInfo.TrustedCAFile = cfg.PeerCert, cfg.PeerKey, cfg.PeerCA
	ec.PeerTLSInfo.ClientCertAuth = true
	ec.EnableGRPCGateway = false // JSON over HTTP, which nobody here speaks
	ec.ZapLoggerBuilder = embed.NewZapLoggerBuilder(logging.Zap(log))
	// A commit of bbolt rewrites pages of its tree; what has been acknowledged is in the write-ahead log already. Collecting
	// for a second instead of a tenth saves most of the idle writes and costs a longer replay after a crash (milliseconds).
	ec.BackendBatchInterval = time.Second
	return ec, nil
}
