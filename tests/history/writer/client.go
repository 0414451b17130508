// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/kedge-io/kedge/tests/history"
)

// kubeconfig is the part of one that says how to prove who one is.
type kubeconfig struct {
	Clusters []struct {
		Cluster struct {
			CA []byte `json:"certificate-authority-data"`
		} `json:"cluster"`
	} `json:"clusters"`
	Users []struct {
		User struct {
			Cert []byte `json:"client-certificate-data"`
			Key  []byte `json:"client-key-data"`
		} `json:"user"`
	} `json:"users"`
}

func readKubeconfig(file string) (*tls.Config, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var k kubeconfig
	if err := yaml.Unmarshal(text, &k); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if len(k.Clusters) != 1 || len(k.Users) != 1 {
		return nil, fmt.Errorf("%s: %d clusters and %d users, want one of each", file, len(k.Clusters), len(k.Users))
	}
	cert, err := tls.X509KeyPair(k.Users[0].User.Cert, k.Users[0].User.Key)
	if err != nil {
		return nil, fmt.Errorf("%s: client certificate: %w", file, err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(k.Clusters[0].Cluster.CA) {
		return nil, fmt.Errorf("%s: no CA certificate", file)
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots, MinVersion: tls.VersionTLS12}, nil
}

// client has connections of its own and records what it does with them.
type client struct {
	name    string
	base    string // URL of the namespace's ConfigMaps
	http    *http.Client
	timeout time.Duration
	rec     *history.Recorder
}

// newClient makes a client that treats connections as client-go does: HTTP/2, with a ping after 30 silent seconds.
func newClient(o options, config *tls.Config, rec *history.Recorder, name string) *client {
	return &client{
		name: name, timeout: o.timeout, rec: rec,
		base: o.server + "/api/v1/namespaces/" + o.namespace + "/configmaps",
		http: &http.Client{Transport: &http.Transport{
			TLSClientConfig:   config.Clone(),
			ForceAttemptHTTP2: true,
			DialContext:       (&net.Dialer{Timeout: o.timeout}).DialContext,
			HTTP2:             &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second},
		}},
	}
}

type configMap struct {
	APIVersion string            `json:"apiVersion,omitempty"`
	Kind       string            `json:"kind,omitempty"`
	Metadata   metadata          `json:"metadata"`
	Data       map[string]string `json:"data"`
}

type metadata struct {
	Name            string            `json:"name"`
	ResourceVersion string            `json:"resourceVersion,omitempty"`
	Labels          map[string]string `json:"labels,omitempty"`
}

// label tells our ConfigMaps from those that every namespace has.
const label = "history"

func (m *configMap) state() (history.State, error) {
	value, err := strconv.ParseInt(m.Data["value"], 10, 64)
	if err != nil {
		return history.State{}, fmt.Errorf("ConfigMap %s: %w", m.Metadata.Name, err)
	}
	version, err := strconv.ParseInt(m.Metadata.ResourceVersion, 10, 64)
	return history.State{Value: value, Version: version}, err
}

// put creates a key, or changes it if it is still as its writer knows it, and returns its new resourceVersion.
func (c *client) put(k *key) (string, error) {
	method, url := http.MethodPost, c.base
	if k.version != "" {
		method, url = http.MethodPut, c.base+"/"+k.name
	}
	body, err := json.Marshal(configMap{
		APIVersion: "v1", Kind: "ConfigMap",
		Metadata: metadata{Name: k.name, ResourceVersion: k.version, Labels: map[string]string{label: "1"}},
		Data:     map[string]string{"value": strconv.FormatInt(k.attempt, 10)},
	})
	if err != nil {
		return "", err
	}
	op := history.Op{Kind: history.Put, Key: k.name, State: history.State{Value: k.attempt}}
	var m configMap
	err = c.do(context.Background(), &op, method, url, body, &m, func() error {
		s, err := m.state()
		if err == nil && s.Value != k.attempt {
			err = fmt.Errorf("the answer to a write of %d is %d", k.attempt, s.Value)
		}
		if err == nil {
			op.State = s
		}
		return err
	})
	return m.Metadata.ResourceVersion, err
}

// get reads a key and returns its resourceVersion, "" if it does not exist.
func (c *client) get(name string) (string, error) {
	op := history.Op{Kind: history.Get, Key: name}
	var m configMap
	err := c.do(context.Background(), &op, http.MethodGet, c.base+"/"+name, nil, &m, func() (err error) {
		op.State, err = m.state()
		return err
	})
	return m.Metadata.ResourceVersion, err
}

// list reads all keys.
func (c *client) list(ctx context.Context) error {
	op := history.Op{Kind: history.List, States: history.States{}}
	var l struct{ Items []configMap }
	return c.do(ctx, &op, http.MethodGet, c.base+"?labelSelector="+label, nil, &l, func() error {
		for _, m := range l.Items {
			s, err := m.state()
			if err != nil {
				return err
			}
			op.States[m.Metadata.Name] = s
		}
		return nil
	})
}

// do sends one request and records the operation. The answer is decoded into answer, then found takes it into op.
func (c *client) do(ctx context.Context, op *history.Op, method, url string, body []byte, answer any, found func() error) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	op.Client, op.Start = c.name, c.rec.Now()
	outcome, err := c.send(ctx, method, url, body, answer)
	if err == nil && outcome == history.OK {
		if err = found(); err != nil {
			outcome = history.Unknown
		}
	}
	if err == nil && outcome == notThere {
		outcome = history.OK // an answer like another, to a read of one key
		if op.Kind != history.Get {
			outcome, err = history.Failed, errors.New("not found")
		}
	}
	op.Outcome, op.End = outcome, c.rec.Now()
	if err != nil {
		op.Error = generalize(err)
	}
	c.rec.Add(*op)
	return err
}

// notThere is what send says of a key that does not exist.
const notThere history.Outcome = "not there"

func (c *client) send(ctx context.Context, method, url string, body []byte, answer any) (history.Outcome, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return history.Failed, err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := c.http.Do(req)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) && op.Op == "dial" { // nothing was sent
			return history.Failed, err
		}
		return history.Unknown, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return history.Unknown, fmt.Errorf("%s, then: %w", res.Status, err)
	}
	switch why := reason(text); {
	case res.StatusCode == http.StatusNotFound && method == http.MethodGet && strings.HasPrefix(why, "NotFound:"):
		return notThere, nil
	case res.StatusCode >= 500:
		return history.Unknown, fmt.Errorf("%s: %s", res.Status, why)
	case res.StatusCode >= 300:
		return history.Failed, fmt.Errorf("%s: %s", res.Status, why)
	}
	if err := json.Unmarshal(text, answer); err != nil {
		return history.Unknown, err
	}
	return history.OK, nil
}

// reason is what a metav1.Status says, or the text itself.
func reason(text []byte) string {
	var s struct{ Reason, Message string }
	if err := json.Unmarshal(text, &s); err == nil && s.Reason+s.Message != "" {
		return s.Reason + ": " + s.Message
	}
	return strings.TrimSpace(string(text[:min(len(text), 200)]))
}

// generalize makes equal errors read equally, so that they can be counted.
func generalize(err error) string {
	text := regexp.MustCompile(`:\d+->`).ReplaceAllString(err.Error(), "->")
	text = regexp.MustCompile(`stream ID \d+`).ReplaceAllString(text, "stream")
	return regexp.MustCompile(`\bw\d+(-\d+)?\b`).ReplaceAllString(text, "KEY")
}
