// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// proxyModes are those of kube-proxy, best known first.
func proxyModes() []string { return []string{"nftables", "iptables", "ipvs"} }

// hasNetwork tells whether there is something to measure in a mode of kube-proxy.
func (o options) hasNetwork(mode string) bool {
	return o.has("network") || o.has("services") || o.has("dns") && mode == o.modes[0]
}

const (
	loadImage  = "kedge.test/netload:1"
	loadPort   = 7000 // of the program, and of Services
	socketsDir = "/run/netload"
	rounds     = 3 // values of each figure of a run
)

// netbed is a cluster of a server and a node, between which traffic is measured: client asks from the node, server answers on the
// server. Both are pods. bare asks like client, from the node itself.
type netbed struct {
	*fleet
	mode   string // of kube-proxy
	config *rest.Config
	api    kubernetes.Interface
	server *host // the machine

	client, bare *prober
	serverPod    *corev1.Pod
}

// measureNetworks measures the network of each side in each mode of kube-proxy, and NetworkPolicy.
func measureNetworks(ctx context.Context, o options, n int, res *results) error {
	for _, mode := range o.modes {
		for _, name := range o.sides {
			w := work{o.hasNetwork(mode), networks(mode)}
			if mode == "ipvs" && !hasIPVS() {
				w = work{o.has("services") && name == "kedge", virtualServices}
			}
			if err := measureAll(ctx, o, name, n, res, []work{w}); err != nil {
				return err
			}
		}
	}
	if !o.has("policy") || !slices.Contains(o.sides, "kedge") {
		return nil
	}
	return policies(ctx, o, &recorder{results: res, side: "kedge", run: n})
}

// networks measures what is wanted of two machines.
func networks(mode string) func(context.Context, options, *testbed.Bed, *recorder) error {
	return func(ctx context.Context, o options, bed *testbed.Bed, rec *recorder) error {
		o.proxy = mode
		defer os.RemoveAll(machinesDir(o))
		n, err := newNetbed(ctx, o, bed, rec.side)
		if err != nil {
			return err
		}
		for _, part := range []struct {
			wanted bool
			do     func(context.Context, options, *recorder) error
		}{
			{o.has("network"), n.traffic},
			{o.has("dns") && mode == o.modes[0], n.lookups},
			{o.has("services"), n.services},
		} {
			if !part.wanted {
				continue
			}
			if err := part.do(ctx, o, rec); err != nil {
				return fmt.Errorf("network (%s): %w", mode, err)
			}
		}
		return nil
	}
}

func newNetbed(ctx context.Context, o options, bed *testbed.Bed, side string) (*netbed, error) {
	images, err := networkImages(o, side)
	if err != nil {
		return nil, err
	}
	n := &netbed{mode: o.proxy}
	if n.fleet, err = newFleet(ctx, o, bed, side, fleetSpec{more: []cluster.Role{cluster.AgentRole}, images: images}); err != nil {
		return nil, err
	}
	if n.api, err = n.start(ctx, bed, &recorder{results: &results{}}); err != nil { // starts are not what is measured here
		return nil, err
	}
	if n.server, err = newHost(bed, n.first.machine()); err != nil {
		return nil, err
	}
	if n.config, err = n.first.config(n.server); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("the pods that use the network do not run after %s", startTimeout))
	defer cancel()
	if n.bare, err = n.process(ctx, o, n.node, n.agent); err != nil {
		return nil, err
	}
	if _, err = n.process(ctx, o, n.first.machine(), n.server); err != nil {
		return nil, err
	}
	if n.serverPod, _, err = n.pod(ctx, "server", n.server); err != nil {
		return nil, err
	}
	_, n.client, err = n.pod(ctx, "client", n.agent)
	return n, err
}

// networkImages writes the archives that a side needs.
func networkImages(o options, side string) ([]string, error) {
	programs := map[string]string{loadImage: o.netload}
	if side == "stock" && o.has("dns") {
		programs[corednsImage] = filepath.Join(o.stock, "coredns")
	}
	var files []string
	for image, program := range programs {
		file, err := programImage(o, image, program)
		if err != nil {
			return nil, err
		}
		files = append(files, file)
	}
	return files, nil
}

// programImage writes the archive of an image that has nothing but a program.
func programImage(o options, image, program string) (file string, err error) {
	dir, err := os.MkdirTemp("", "image-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	name := filepath.Base(program)
	if err := errors.Join(os.Chmod(dir, 0o755), copyTree(program, filepath.Join(dir, name))); err != nil {
		return "", err
	}
	file, err = filepath.Abs(filepath.Join(filepath.Dir(o.units), name+".tar"))
	if err != nil {
		return "", err
	}
	return file, writeImage(file, image, dir, "/"+name)
}

// process starts the program in a machine itself.
func (n *netbed) process(ctx context.Context, o options, m *testbed.Machine, h *host) (*prober, error) {
	program, err := os.ReadFile(o.netload)
	if err != nil {
		return nil, err
	}
	const bin = "/usr/local/bin/netload"
	if err := m.WriteFile(bin, program, 0o755); err != nil {
		return nil, err
	}
	if _, err := m.Spawn(ctx, "/var/log/netload.log", bin, at(""), socketOf("machine")); err != nil {
		return nil, err
	}
	return newProber(ctx, h, "machine")
}

// pod starts the program in a pod.
func (n *netbed) pod(ctx context.Context, name string, h *host) (*corev1.Pod, *prober, error) {
	pods := n.api.CoreV1().Pods(metav1.NamespaceDefault)
	_, err := pods.Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			NodeName:                      h.name,
			TerminationGracePeriodSeconds: new(int64),
			Containers: []corev1.Container{{
				Name: "netload", Image: loadImage, ImagePullPolicy: corev1.PullNever, Args: []string{at(""), socketOf(name)},
				VolumeMounts: []corev1.VolumeMount{{Name: "sockets", MountPath: socketsDir}},
			}},
			Volumes: []corev1.Volume{{Name: "sockets", VolumeSource: corev1.VolumeSource{
				HostPath: &corev1.HostPathVolumeSource{Path: socketsDir, Type: new(corev1.HostPathDirectoryOrCreate)}}}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, nil, err
	}
	p, err := newProber(ctx, h, name)
	if err != nil {
		return nil, nil, err
	}
	var pod *corev1.Pod
	err = testbed.Wait(ctx, "the address of the pod "+name, func(ctx context.Context) error {
		var err error
		if pod, err = pods.Get(ctx, name, metav1.GetOptions{}); err == nil && pod.Status.PodIP == "" {
			err = fmt.Errorf("it is %s", pod.Status.Phase)
		}
		return err
	})
	return pod, p, err
}

// at is the program's port of an address.
func at(host string) string { return net.JoinHostPort(host, strconv.Itoa(loadPort)) }

func socketOf(name string) string { return path.Join(socketsDir, name+".sock") }

// prober is a netload that does what it is told.
type prober struct{ http *http.Client }

// newProber waits until the program is there.
func newProber(ctx context.Context, h *host, name string) (*prober, error) {
	socket := filepath.Join(h.root(), socketOf(name))
	if err := testbed.Wait(ctx, "netload "+name+" in "+h.name, func(context.Context) error {
		_, err := os.Stat(socket)
		return err
	}); err != nil {
		return nil, err
	}
	return &prober{&http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}}, nil
}

// answer is what netload answers.
type answer struct {
	PerSecond float64
	P50, P99  time.Duration
	Done      int
	Failed    int
	Failure   string
	At        time.Time
}

// ask tells it to do something to an address, and waits until that is done.
func (p *prober) ask(ctx context.Context, what, to string, how url.Values) (answer, error) {
	how.Set("to", to)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://netload/"+what+"?"+how.Encode(), nil)
	if err != nil {
		return answer{}, err
	}
	resp, err := p.http.Do(req)
	if err != nil {
		return answer{}, err
	}
	body, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return answer{}, err
	}
	if resp.StatusCode != http.StatusOK {
		return answer{}, fmt.Errorf("%s to %s: %s", what, to, body)
	}
	var a answer
	return a, json.Unmarshal(body, &a)
}

// span is how long a load lasts.
func span(d time.Duration) url.Values { return url.Values{"for": {d.String()}} }
