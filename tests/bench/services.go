// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/kedge-io/kedge/tests/testbed"
)

const (
	manyServices = 1000
	creators     = 16
	// betweenChanges is more than the second that kube-proxy waits at least between two updates, so that each is met at rest.
	betweenChanges = 2500 * time.Millisecond
)

func serviceFigures() []figure {
	var list []figure
	for _, mode := range proxyModes() {
		m, name := mode+" ", "services ("+mode+"): "
		list = append(list,
			figure{m + "slice appears", name + "EndpointSlice appears, until reached", "ms"},
			figure{m + "slice goes", name + "EndpointSlice goes, until refused", "ms"},
			figure{m + "pod chosen", name + "pod gets the label, until reached", "ms"},
			figure{m + "pod dropped", name + "pod loses the label, until refused", "ms"},
			figure{m + "many created", name + "1,000 created, until the last is reached", "ms"},
			figure{m + "many cpu", name + "1,000 created: CPU of a node", "s"},
			figure{m + "many pss", name + "1,000 present: PSS of a node, more", "MiB"},
			figure{m + "many anon", name + "1,000 present: anonymous memory of a node, more", "MiB"},
			figure{m + "many slice appears", name + "1,000 present, EndpointSlice appears, until reached", "ms"},
			figure{m + "many slice goes", name + "1,000 present, EndpointSlice goes, until refused", "ms"},
			figure{m + "many sync", name + "1,000 present: sync after a change", "ms"},
			figure{m + "many full sync", name + "1,000 present: first sync of a new kube-proxy", "ms"})
	}
	return list
}

// services measures how long changes take to get to the node, with few Services and with many.
func (n *netbed) services(ctx context.Context, _ options, rec *recorder) error {
	chosen, err := n.service(ctx, "chosen", map[string]string{"chosen": "yes"})
	if err != nil {
		return err
	}
	flip, err := n.service(ctx, "flip", nil)
	if err != nil {
		return err
	}
	if err := pause(ctx, betweenChanges); err != nil {
		return err
	}
	if err := n.flips(ctx, rec, flip, n.mode); err != nil {
		return err
	}
	for range rounds {
		if err := n.change(ctx, rec, chosen, n.mode+" pod chosen", true, n.label(ctx, `"yes"`)); err != nil {
			return err
		}
		if err := n.change(ctx, rec, chosen, n.mode+" pod dropped", false, n.label(ctx, "null")); err != nil {
			return err
		}
	}
	if err := n.many(ctx, rec); err != nil {
		return fmt.Errorf("%d services: %w", manyServices, err)
	}
	before, err := n.syncs(ctx, "sync_proxy_rules")
	if err != nil {
		return err
	}
	if err := n.flips(ctx, rec, flip, n.mode+" many"); err != nil {
		return err
	}
	after, err := n.syncs(ctx, "sync_proxy_rules")
	if err != nil {
		return err
	}
	rec.add(n.mode+" many sync", 1000*(after.sum-before.sum)/(after.count-before.count))
	return n.fullSync(ctx, rec)
}

// flips makes an EndpointSlice come and go.
func (n *netbed) flips(ctx context.Context, rec *recorder, to, figure string) error {
	for range rounds {
		if err := n.change(ctx, rec, to, figure+" slice appears", true, func() error { return n.slice(ctx, "flip") }); err != nil {
			return err
		}
		if err := n.change(ctx, rec, to, figure+" slice goes", false, func() error {
			return n.api.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).Delete(ctx, "flip", metav1.DeleteOptions{})
		}); err != nil {
			return err
		}
	}
	return nil
}

// label sets a label of the server's pod, by which a Service chooses it; null takes it away.
func (n *netbed) label(ctx context.Context, value string) func() error {
	return func() error {
		patch := fmt.Appendf(nil, `{"metadata":{"labels":{"chosen":%s}}}`, value)
		_, err := n.api.CoreV1().Pods(metav1.NamespaceDefault).Patch(ctx, n.serverPod.Name, types.MergePatchType, patch, metav1.PatchOptions{})
		return err
	}
}

// slice makes the server's pod the endpoint of a Service.
func (n *netbed) slice(ctx context.Context, service string) error {
	_, err := n.api.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).Create(ctx, &discovery.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: service, Labels: map[string]string{discovery.LabelServiceName: service}},
		AddressType: discovery.AddressTypeIPv4,
		Endpoints:   []discovery.Endpoint{{Addresses: []string{n.serverPod.Status.PodIP}, NodeName: new(n.server.name)}},
		Ports:       []discovery.EndpointPort{{Name: new(""), Port: new(int32(loadPort)), Protocol: new(corev1.ProtocolTCP)}},
	}, metav1.CreateOptions{})
	return err
}

// change records the milliseconds from the request that changes something until the client sees it.
func (n *netbed) change(ctx context.Context, rec *recorder, to, figure string, reached bool, do func() error) error {
	if _, err := await(ctx, n.client, to, !reached); err != nil {
		return err
	}
	if err := pause(ctx, betweenChanges); err != nil {
		return err
	}
	var seen answer
	var watching errgroup.Group
	watching.Go(func() (err error) {
		seen, err = await(ctx, n.client, to, reached)
		return err
	})
	if err := pause(ctx, 100*time.Millisecond); err != nil { // it watches by now
		return errors.Join(err, watching.Wait())
	}
	begin := time.Now()
	if err := errors.Join(do(), watching.Wait()); err != nil {
		return fmt.Errorf("%s: %w", figure, err)
	}
	rec.add(figure, milliseconds(seen.At.Sub(begin)))
	return nil
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// await waits until a program reaches something, or does not any more.
func await(ctx context.Context, from *prober, to string, reached bool) (answer, error) {
	return from.ask(ctx, "watch", to, url.Values{"reached": {strconv.FormatBool(reached)}, "timeout": {"1m"}})
}

// many creates the many Services, and measures what that costs the node.
func (n *netbed) many(ctx context.Context, rec *recorder) error {
	before, err := n.agent.memory()
	if err != nil {
		return err
	}
	used, err := n.agent.cpuSeconds()
	if err != nil {
		return err
	}
	var creating errgroup.Group
	creating.SetLimit(creators)
	for i := range manyServices - 1 {
		creating.Go(func() error {
			_, err := n.routed(ctx, fmt.Sprintf("many-%d", i))
			return err
		})
	}
	if err := creating.Wait(); err != nil {
		return err
	}
	last, err := n.routed(ctx, "many-last")
	if err != nil {
		return err
	}
	begin := time.Now()
	seen, err := await(ctx, n.client, last, true)
	if err != nil {
		return err
	}
	rec.add(n.mode+" many created", milliseconds(seen.At.Sub(begin)))
	if err := pause(ctx, betweenChanges); err != nil {
		return err
	}
	now, err := n.agent.cpuSeconds()
	if err != nil {
		return err
	}
	rec.add(n.mode+" many cpu", now-used)
	after, err := n.agent.memory()
	if err != nil {
		return err
	}
	rec.add(n.mode+" many pss", after[0].PSS-before[0].PSS)
	rec.add(n.mode+" many anon", after[0].Anonymous-before[0].Anonymous)
	return nil
}

// routed creates a Service whose endpoint is the server's pod.
func (n *netbed) routed(ctx context.Context, name string) (string, error) {
	addr, err := n.service(ctx, name, nil)
	if err != nil {
		return "", err
	}
	return addr, n.slice(ctx, name)
}

// fullSync starts kube-proxy anew on the node, and records how long its first sync takes.
func (n *netbed) fullSync(ctx context.Context, rec *recorder) error {
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	if n.kedge != nil { // it is part of a process: all of Kedge's
		if err := n.kedge.Agents[0].Stop(ctx); err != nil {
			return err
		}
		if err := n.kedge.Agents[0].Run(ctx); err != nil {
			return err
		}
	} else if err := n.endProxy(); err != nil {
		return err
	}
	return testbed.Wait(ctx, "the first sync of kube-proxy", func(ctx context.Context) error {
		s, err := n.syncs(ctx, "sync_full_proxy_rules")
		if err == nil && s.count != 1 {
			err = fmt.Errorf("%.0f so far", s.count)
		}
		if err == nil {
			rec.add(n.mode+" many full sync", 1000*s.sum)
		}
		return err
	})
}

// endProxy ends the stock side's kube-proxy, which is started again.
func (n *netbed) endProxy() error {
	list, err := n.agent.processes()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(list, func(p process) bool { return p.name == "kube-proxy" })
	if i < 0 {
		return fmt.Errorf("%s has no process kube-proxy", n.agent.name)
	}
	return unix.Kill(list[i].pid, unix.SIGTERM)
}

// histogram is the part of one that matters here.
type histogram struct{ sum, count float64 }

// syncs reads how often kube-proxy has brought the node's IPv4 rules up to date, and how long that took.
func (n *netbed) syncs(ctx context.Context, what string) (histogram, error) {
	text, err := n.node.Exec(ctx, "busybox", "wget", "-qO-", "http://127.0.0.1:10249/metrics")
	if err != nil {
		return histogram{}, err
	}
	return parseSyncs(text, what)
}

func parseSyncs(text, what string) (histogram, error) {
	var h histogram
	for suffix, v := range map[string]*float64{"sum": &h.sum, "count": &h.count} {
		key := fmt.Sprintf(`kubeproxy_%s_duration_seconds_%s{ip_family="IPv4"} `, what, suffix)
		_, rest, found := strings.Cut(text, "\n"+key)
		if !found {
			return h, fmt.Errorf("kube-proxy's metrics have no %s(%d bytes)", key, len(text))
		}
		number, _, _ := strings.Cut(rest, "\n")
		var err error
		if *v, err = strconv.ParseFloat(number, 64); err != nil {
			return h, err
		}
	}
	return h, nil
}
