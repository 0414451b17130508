// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

const (
	// virtualStart is how long an agent and its kube-proxy may take for something in a virtual machine.
	virtualStart = 30 * time.Minute
)

// virtualModes are measured in a virtual machine when the kernel of this host has no IPVS: the mode that it lacks, and the one that it is
// to be compared with.
func virtualModes() []string { return []string{"ipvs", "nftables"} }

func virtualFigures() []figure {
	var list []figure
	for _, mode := range virtualModes() {
		name := "services (" + mode + ", in a virtual machine): 1,000 present: "
		list = append(list,
			figure{"virtual " + mode + " sync", name + "sync after a change", "ms"},
			figure{"virtual " + mode + " first sync", name + "first sync of a new kube-proxy", "ms"})
	}
	return list
}

// hasIPVS tells whether machines of the test bed can have kube-proxy's mode ipvs. Whoever runs the benchmark loads the module.
func hasIPVS() bool {
	_, err := os.Stat("/proc/net/ip_vs")
	return err == nil
}

// virtual is an agent of Kedge in a virtual machine, whose server is in a machine, and the cluster's many Services.
type virtual struct {
	*netbed
	vm    *testbed.VM
	agent string // the command
}

// virtualServices measures how long kube-proxy takes with many Services, in each of the virtualModes.
func virtualServices(ctx context.Context, o options, bed *testbed.Bed, rec *recorder) error {
	v, err := newVirtual(ctx, o, bed)
	if errors.Is(err, testbed.ErrNoVM) {
		fmt.Println("ipvs is left out: this host's kernel has no IPVS, and", err)
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := v.service(ctx, "flip", nil); err != nil {
		return err
	}
	var creating errgroup.Group
	creating.SetLimit(creators)
	for i := range manyServices {
		creating.Go(func() error {
			_, err := v.routed(ctx, fmt.Sprintf("many-%d", i))
			return err
		})
	}
	if err := creating.Wait(); err != nil {
		return err
	}
	for _, mode := range virtualModes() {
		if err := v.measure(ctx, mode, rec); err != nil {
			return fmt.Errorf("%s in a virtual machine: %w", mode, err)
		}
	}
	return nil
}

func newVirtual(ctx context.Context, o options, bed *testbed.Bed) (*virtual, error) {
	files, err := os.MkdirTemp("", "virtual-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(files)
	if err := copyTree(o.kedge, filepath.Join(files, "kedge")); err != nil {
		return nil, err
	}
	vm, err := bed.VM(ctx, "virtual", testbed.Share(files, "/opt/kedge"))
	if err != nil {
		return nil, err
	}
	if err := os.Setenv("KEDGE_BIN", o.kedge); err != nil {
		return nil, err
	}
	s, err := cluster.Prepare(ctx, bed, "kedge", cluster.Options{Flags: []string{"--disable-agent", "--token", operatorToken}})
	if err != nil {
		return nil, err
	}
	h, err := newHost(bed, s.Machine)
	if err != nil {
		return nil, err
	}
	if err := s.Run(ctx); err != nil {
		return nil, err
	}
	waiting, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	// Nobody connects to the Services, so that their endpoint need not be there.
	n := &netbed{server: h, serverPod: &corev1.Pod{Status: corev1.PodStatus{PodIP: "10.42.200.2"}}}
	err = testbed.Wait(waiting, "the API", func(ctx context.Context) (err error) {
		if n.config, err = (kedge{s}).config(h); err != nil {
			return err
		}
		n.config.QPS = -1
		if n.api, err = kubernetes.NewForConfig(n.config); err != nil {
			return err
		}
		_, err = n.api.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	return &virtual{netbed: n, vm: vm, agent: "/opt/kedge/kedge agent --server " + s.URL() + " --token " + operatorToken}, err
}

// measure starts an agent in a mode of kube-proxy, which finds all Services there, and then changes one of them.
func (v *virtual) measure(ctx context.Context, mode string, rec *recorder) error {
	if _, err := v.vm.Shell(ctx, "setsid "+v.agent+" --proxy-mode "+mode+" >>/var/log/kedge.log 2>&1 </dev/null & echo $! >/run/agent.pid"); err != nil {
		return err
	}
	first, err := v.proxied(ctx, "1", func(h histogram) bool { return h.count > 0 })
	if err != nil {
		return err
	}
	if first.count == 1 { // not too late for it
		rec.add("virtual "+mode+" first sync", 1000*first.sum)
	}
	last := first
	rest := func(than float64) error {
		before := last
		_, err := v.proxied(ctx, "3", func(h histogram) bool {
			calm := h == last && h.count > than
			last = h
			return calm
		})
		if err != nil {
			return fmt.Errorf("%w; syncs so far: %v, before %v", err, last, before)
		}
		return nil
	}
	if err := rest(0); err != nil {
		return err
	}
	before := last
	for range rounds {
		if err := errors.Join(v.slice(ctx, "flip"), rest(last.count)); err != nil {
			return err
		}
		if err := v.api.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).Delete(ctx, "flip", metav1.DeleteOptions{}); err != nil {
			return err
		}
		if err := rest(last.count); err != nil {
			return err
		}
	}
	rec.add("virtual "+mode+" sync", 1000*(last.sum-before.sum)/(last.count-before.count))
	_, err = v.vm.Shell(ctx, "kill $(cat /run/agent.pid); while kill -0 $(cat /run/agent.pid) 2>/dev/null; do sleep 0.2; done")
	return err
}

// proxied reads kube-proxy's syncs, with pauses of some seconds, until they are as wanted.
func (v *virtual) proxied(ctx context.Context, pause string, wanted func(histogram) bool) (histogram, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, virtualStart, fmt.Errorf("not done after %s", virtualStart))
	defer cancel()
	for {
		// The metric appears with the first sync.
		text, err := v.vm.Shell(ctx, `until busybox wget -qO- http://127.0.0.1:10249/metrics | grep -a '^kubeproxy_sync_proxy_rules_duration_seconds_[sc][ou].*IPv4' >/run/syncs; do sleep 2; done; sleep `+pause+`; echo; cat /run/syncs`)
		if err != nil {
			return histogram{}, err
		}
		if h, err := parseSyncs(text+"\n", "sync_proxy_rules"); err != nil || wanted(h) {
			return h, err
		}
	}
}
