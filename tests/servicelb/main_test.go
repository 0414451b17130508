// SPDX-License-Identifier: Apache-2.0

// Package servicelb tests Services of type LoadBalancer and floating addresses on several machines.
package servicelb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// moved is how long a floating address may be without an answer when the node that had it loses its power. On a machine with nothing
// else to do 4 to 6 s are seen.
const moved = 20 * time.Second

// web is a server on every node, on port 8080 of pods.
const web = `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      tolerations: [{operator: Exists}]
      containers:
      - name: server
        image: kedge.test/server:1
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
`

// balancer is a Service; its arguments: name, app, port, more YAML for the spec.
const balancer = `
apiVersion: v1
kind: Service
metadata: {name: %[1]s}
spec:
  type: LoadBalancer
  selector: {app: %[2]s}
  ports: [{port: %[3]s, targetPort: 8080}]
%[4]s
`

// get asks from outside of the cluster, on a new connection: which pod answers, and from where it was asked.
func get(ctx context.Context, url string) (pod, client string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", "", err
	}
	transport := &http.Transport{DisableKeepAlives: true}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return "", "", err
	}
	body, err := io.ReadAll(res.Body)
	err = errors.Join(err, res.Body.Close())
	fields := strings.Fields(string(body))
	if err == nil && (res.StatusCode != http.StatusOK || len(fields) < 2) {
		err = fmt.Errorf("%s: %q", res.Status, body)
	}
	if err != nil {
		return "", "", err
	}
	client = fields[1]
	if i := strings.LastIndex(client, ":"); i > 0 {
		client = client[:i]
	}
	return fields[0], client, nil
}

// answers waits until a URL is answered from outside.
func answers(t *testing.T, url string) {
	t.Helper()
	cluster.Eventually(t, "an answer of "+url, func(ctx context.Context) error {
		_, _, err := get(ctx, url)
		return err
	})
}

// silence measures how long a condition is not met from now on, and fails the test if it takes longer than moved.
func silence(t *testing.T, what string, cond func(context.Context) error) time.Duration {
	t.Helper()
	begin := time.Now()
	cluster.EventuallyWithin(t, 4*moved, what, cond)
	took := time.Since(begin)
	if took > moved {
		t.Errorf("%s: took %s, want at most %s", what, took.Round(time.Millisecond), moved)
	}
	return took
}

// start makes and starts a cluster with flags that depend on the network.
func start(t *testing.T, spec cluster.Spec, flags func(address func(n int) string) []string) *cluster.Cluster {
	t.Helper()
	c := cluster.ForTest(t, spec)
	network := c.Bed.Gateway() // ends in .1
	add := flags(func(n int) string { return fmt.Sprintf("%s%d", strings.TrimSuffix(network, "1"), n) })
	for _, s := range c.Servers[:1] {
		s.Flags = append(s.Flags, add...)
	}
	if err := c.Start(cluster.Within(t, 5*time.Minute)); err != nil {
		t.Fatal(err)
	}
	return c
}

// holder is the node that has an address on its network card.
func holder(t *testing.T, c *cluster.Cluster, address string) *cluster.Node {
	t.Helper()
	var found *cluster.Node
	cluster.Eventually(t, "one node to have "+address, func(ctx context.Context) error {
		found = nil
		for _, n := range c.Nodes() {
			if state, err := n.State(ctx); err != nil || state == "dead" {
				continue
			}
			has, err := hasAddress(ctx, n, address)
			if err != nil {
				return err
			}
			if has {
				if found != nil {
					return testbed.GiveUp(fmt.Errorf("%s and %s have it", found.Name(), n.Name()))
				}
				found = n
			}
		}
		if found == nil {
			return errors.New("none has")
		}
		return nil
	})
	return found
}

// hasAddress says whether a node has an address on its network card.
func hasAddress(ctx context.Context, n *cluster.Node, address string) (bool, error) {
	out, err := n.Exec(ctx, "ip", "-o", "addr", "show", "dev", "eth0")
	return strings.Contains(out, " "+address+"/"), err
}
