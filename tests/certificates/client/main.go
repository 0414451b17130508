// SPDX-License-Identifier: Apache-2.0

// Client speaks to the API without a break until SIGTERM: one watch that must never end, requests on a connection that must never
// close, and requests on a new connection each. It prints what went wrong as JSON. Nothing is tried again.
//
//	client KUBECONFIG ADDRESS
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"k8s.io/client-go/tools/clientcmd"
)

// Report is what the program prints.
type Report struct {
	Requests    int      // answered
	Connections int      // that the lasting client made
	Events      int      // that the watch saw
	Issuers     []string // of the API's certificates that new connections saw, each once
	Serials     int      // of those certificates
	Errors      []string
}

type client struct {
	base   string
	config *tls.Config

	mu      sync.Mutex
	report  Report
	serials map[string]bool
	issuers map[string]bool
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, kubeconfig, address string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	pair, err := tls.X509KeyPair(config.CertData, config.KeyData)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(config.CAData)
	c := &client{base: "https://" + address, serials: map[string]bool{}, issuers: map[string]bool{},
		config: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}}
	var group sync.WaitGroup
	group.Go(func() { c.watch(ctx) })
	group.Go(func() { c.request(ctx, c.http(false), false) })
	group.Go(func() { c.request(ctx, c.http(true), true) })
	group.Wait()
	c.report.Serials = len(c.serials)
	for i := range c.issuers {
		c.report.Issuers = append(c.report.Issuers, i)
	}
	return json.NewEncoder(os.Stdout).Encode(c.report)
}

func (c *client) http(fresh bool) *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: c.config.Clone(), DisableKeepAlives: fresh, ForceAttemptHTTP2: true}}
}

func (c *client) failed(ctx context.Context, what string, err error) {
	if ctx.Err() != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Errors = append(c.report.Errors, fmt.Sprintf("%s %s: %v", time.Now().UTC().Format("15:04:05.000"), what, err))
}

const path = "/api/v1/namespaces/kube-system/configmaps"

// watch reads one watch to its end, which is an error.
func (c *client) watch(ctx context.Context) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path+"?watch=1&timeoutSeconds=3600", nil)
	if err != nil {
		c.failed(ctx, "watch", err)
		return
	}
	res, err := c.http(false).Do(req)
	if err != nil {
		c.failed(ctx, "watch", err)
		return
	}
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, 4<<20)
	for lines.Scan() {
		c.mu.Lock()
		c.report.Events++
		c.mu.Unlock()
	}
	c.failed(ctx, "watch", fmt.Errorf("it ended: %v", lines.Err()))
}

// request asks for something small again and again.
func (c *client) request(ctx context.Context, client *http.Client, fresh bool) {
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		if !info.Reused && !fresh {
			c.mu.Lock()
			c.report.Connections++
			c.mu.Unlock()
		}
	}}
	for ctx.Err() == nil {
		if err := c.once(httptrace.WithClientTrace(ctx, trace), client); err != nil {
			c.failed(ctx, fmt.Sprintf("request (new connection: %t)", fresh), err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (c *client) once(ctx context.Context, client *http.Client) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path+"/kedge-servers", nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", res.StatusCode)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Requests++
	cert := res.TLS.PeerCertificates[0]
	c.serials[cert.SerialNumber.String()], c.issuers[cert.Issuer.CommonName] = true, true
	return nil
}
