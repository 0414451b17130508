// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

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
