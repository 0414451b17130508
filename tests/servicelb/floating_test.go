// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// TestFloatingAddresses: a pool and addresses of the API, of both families, on three servers and an agent. They move when their nodes
// lose power.
func TestFloatingAddresses(t *testing.T) {
	t.Parallel()
	var vip, vip6 string
	c := start(t, cluster.Spec{Servers: 3, Agents: 1}, func(address func(int) string) []string {
		vip, vip6 = address(200), testbed.IP6(address(200))
		return []string{"--servicelb-pool", address(201) + "-" + address(210) + "," + testbed.IP6(address(201)) + "-" + testbed.IP6(address(210)),
			"--api-vip", vip + "," + vip6, "--cluster-cidr", "10.42.0.0/16,fd42::/56", "--service-cidr", "10.43.0.0/16,fd43::/112"}
	})
	s := c.Servers[0].Session(t)
	s.Apply(web)
	s.Apply(cluster.ServerPod, "one", "", "  nodeName: "+c.Agents[0].Name())
	s.Apply(balancer, "web", "web", "80", "  ipFamilyPolicy: RequireDualStack")
	s.Apply(balancer, "local", "one", "80", "  externalTrafficPolicy: Local")
	s.Ready("one")
	s.Kubectl("rollout", "status", "daemonset/web", "--timeout=55s")
	const ip = "jsonpath={.status.loadBalancer.ingress[0].ip}"
	var floating, floating6, fixed string
	s.Eventually("addresses", func() (err error) {
		floating, err = s.Try("get", "service", "web", "-o", ip)
		floating6, _ = s.Try("get", "service", "web", "-o", "jsonpath={.status.loadBalancer.ingress[1].ip}")
		if fixed, _ = s.Try("get", "service", "local", "-o", ip); err == nil && (floating == "" || floating6 == "" || fixed == "") {
			err = fmt.Errorf("%q, %q", floating, fixed)
		}
		return err
	})
	answers(t, "http://"+floating+"/")
	answers(t, "http://["+floating6+"]/")
	answers(t, "http://"+fixed+"/")
	if n := holder(t, c, fixed); n != c.Agents[0] {
		t.Errorf("%s announces a Service of policy Local whose endpoint is on %s", n.Name(), c.Agents[0].Name())
	}
	if pod, client, err := get(t.Context(), "http://"+fixed+"/"); err != nil || pod != "one" || client != c.Bed.Gateway() {
		t.Errorf("%q sees the client %q (%v), want one and %s", pod, client, err, c.Bed.Gateway())
	}

	t.Run("a Service's address moves", func(t *testing.T) {
		n := holder(t, c, floating)
		cluster.Do(t, n.PowerCut)
		took := silence(t, "an answer of "+floating, func(ctx context.Context) error {
			_, _, err := get(ctx, "http://"+floating+"/")
			return err
		})
		t.Logf("%s lost its power: %s is answered by %s after %s", n.Name(), floating, holder(t, c, floating).Name(), took.Round(10*time.Millisecond))
		took += silence(t, "an answer of "+floating6, func(ctx context.Context) error {
			_, _, err := get(ctx, "http://["+floating6+"]/")
			return err
		})
		t.Logf("%s is answered by %s after %s", floating6, holder(t, c, floating6).Name(), took.Round(10*time.Millisecond))
		cluster.Do(t, n.Restart, c.WaitReady)
		holder(t, c, floating)
	})
	t.Run("the node process is killed", func(t *testing.T) {
		n := holder(t, c, floating)
		cluster.Do(t, func(ctx context.Context) error { _, err := n.Shell(ctx, "pkill -KILL -f '[[]node[]]'"); return err })
		answers(t, "http://"+floating+"/")
		cluster.Do(t, c.WaitReady)
		holder(t, c, floating)
	})
	t.Run("the API's address moves", func(t *testing.T) {
		answersAPI := func(ctx context.Context) error { return ping(ctx, vip) }
		silence(t, "an answer of the API at "+vip, answersAPI)
		silence(t, "an answer of the API at "+vip6, func(ctx context.Context) error { return ping(ctx, "["+vip6+"]") })
		n := holder(t, c, vip)
		if !slices.ContainsFunc(c.Servers, func(s *cluster.Server) bool { return s.Node == n }) {
			t.Fatalf("%s, which is no server, has the API's address", n.Name())
		}
		cluster.Do(t, n.PowerCut)
		took := silence(t, "an answer of the API at "+vip, answersAPI)
		t.Logf("%s lost its power: the API answers at %s again after %s", n.Name(), vip, took.Round(10*time.Millisecond))
		silence(t, "an answer of the API at "+vip6, func(ctx context.Context) error { return ping(ctx, "["+vip6+"]") })
		cluster.Do(t, n.Restart, c.WaitReady)

		n = holder(t, c, vip)
		cluster.Do(t, n.Stop)
		took = silence(t, "an answer of the API at "+vip, answersAPI)
		t.Logf("%s was stopped: the API answers at %s again after %s", n.Name(), vip, took.Round(10*time.Millisecond))
		cluster.Do(t, n.Run, c.WaitReady)
	})

	t.Run("the API gets another address", func(t *testing.T) {
		second := c.Servers[1]
		another := strings.TrimSuffix(c.Bed.Gateway(), "1") + "220"
		cluster.Do(t, second.Stop)
		second.Flags = append(second.Flags, "--api-vip", another)
		cluster.Do(t, second.Run, c.WaitReady)
		silence(t, "an answer of the API at "+another, func(ctx context.Context) error { return ping(ctx, another) })
		for _, n := range c.Servers {
			cluster.Eventually(t, another+" to be in the certificate of "+n.Name(), func(ctx context.Context) error {
				conn, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}).DialContext(ctx, "tcp", n.IP()+":6443")
				if err != nil {
					return err
				}
				defer conn.Close()
				return conn.(*tls.Conn).ConnectionState().PeerCertificates[0].VerifyHostname(another)
			})
			cluster.Eventually(t, vip+" to be gone from "+n.Name(), func(ctx context.Context) error {
				has, err := hasAddress(ctx, n.Node, vip)
				if err == nil && has {
					err = errors.New("it is there")
				}
				return err
			})
		}
		// A server whose own option has not changed does not change it back.
		cluster.Do(t, c.Servers[0].Stop, c.Servers[0].Run, c.WaitReady)
		silence(t, "an answer of the API at "+another, func(ctx context.Context) error { return ping(ctx, another) })
		if err := c.Servers[0].WaitLog(cluster.Within(t, time.Minute), "changed by another server"); err != nil {
			t.Error(err)
		}
	})
}

// ping is an answer of an API server, which may be that one has to say who one is. Its certificate is not this test's business.
func ping(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address+":6443/livez/ping", nil)
	if err != nil {
		return err
	}
	transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	return res.Body.Close()
}
