// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// NewClient gives a client of the datastore: of a member's socket (see Endpoint), of members by TLS, or of an operator's etcd. Files are left
// empty where there is no TLS, or no client certificate. No connection is made yet.
func NewClient(endpoints []string, files TLSFiles) (*clientv3.Client, error) {
	cfg := clientv3.Config{Endpoints: endpoints, DialTimeout: probeTimeout, Logger: zap.NewNop()}
	if slices.ContainsFunc(endpoints, func(e string) bool { return strings.HasPrefix(e, "https://") }) {
		var err error
		if cfg.TLS, err = files.ClientConfig(); err != nil {
			return nil, err
		}
	}
	client, err := clientv3.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("datastore at %s: %w", strings.Join(endpoints, ", "), err)
	}
	return client, nil
}

// Healthy asks an etcd that the operator runs. Nil means that one of the endpoints can serve an API server; the error says of each why not,
// which the API server itself does not: its client tries again until its time is over.
func Healthy(ctx context.Context, endpoints []string, files TLSFiles) error {
	config, err := files.ClientConfig()
	if err != nil {
		return err
	}
	var errs []error
	for _, endpoint := range endpoints {
		err := askHealth(ctx, endpoint, config)
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", endpoint, err))
	}
	return errors.Join(errs...)
}

func askHealth(ctx context.Context, endpoint string, config *tls.Config) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, endpoint+"/health", nil)
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("no answer within %s", probeTimeout)
		}
		return errors.Unwrap(err) // without the URL
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(res.Body, 1<<10))
		return fmt.Errorf("%s: %s", res.Status, strings.TrimSpace(string(text)))
	}
	return nil
}
