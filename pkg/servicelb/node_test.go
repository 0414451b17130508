// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
	"sigs.k8s.io/knftables"
)

// TestNode: rules follow the status of Services, the endpoints and the addresses of the Node; they stay when it ends.
func TestNode(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	slice := sliceOn("n", "10.42.1.2")(nil)[0]
	slice.ObjectMeta = metav1.ObjectMeta{Namespace: "ns", Name: "web-1", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}}
	// The process that loses its clients listens on what is the node's address here.
	svc := service("web", 1, ports(80, int32(l.Addr().(*net.TCPAddr).Port)), having(corev1.LoadBalancerIPModeProxy, "192.0.2.1"))
	// As are the clients of a pod's host port.
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "p"}, Spec: corev1.PodSpec{
		NodeName: "n", Containers: []corev1.Container{{Ports: []corev1.ContainerPort{{ContainerPort: 1, HostPort: 80}}}}}}
	client := fake.NewClientset(nodeWith("n", true, nil, "192.0.2.1", "127.0.0.1"), svc, slice, pod)
	nft := knftables.NewFake(knftables.InetFamily, nftTable)
	n := newNode(NodeConfig{NodeName: "n", Client: client}, nft, testLog(t))
	if n.Ready() == nil {
		t.Error("ready before the start")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- n.Run(ctx) }()
	rules := func(want string, there bool) {
		t.Helper()
		eventually(t, fmt.Sprintf("%q in the rules: %v", want, there), func() error {
			nft.RLock()
			defer nft.RUnlock()
			text := ""
			if nft.Table != nil {
				text = nft.Dump()
			}
			if strings.Contains(text, want) != there {
				return errors.New(text)
			}
			return nil
		})
	}
	rules("0 : 10.42.1.2 . 8080", true)
	eventually(t, "readiness", n.Ready)
	eventually(t, "events about the process of the node and the pod", func() error {
		events, err := client.CoreV1().Events("ns").List(t.Context(), metav1.ListOptions{})
		var messages []string
		for _, e := range events.Items {
			if e.Reason == reasonEclipsed {
				messages = append(messages, e.Message)
			}
		}
		all := strings.Join(messages, "\n")
		if err == nil && (len(messages) != 2 || !strings.Contains(all, l.Addr().String()) || !strings.Contains(all, "the hostPort 80/tcp of pod ns/p on node n")) {
			err = fmt.Errorf("%q", messages)
		}
		return err
	})
	slice = slice.DeepCopy()
	slice.Endpoints[0].Addresses[0] = "10.42.1.3"
	_, err = client.DiscoveryV1().EndpointSlices("ns").Update(t.Context(), slice, metav1.UpdateOptions{})
	must(t, err)
	rules("0 : 10.42.1.3 . 8080", true)
	rules("10.42.1.2", false)

	_, err = client.CoreV1().Nodes().Update(t.Context(), nodeWith("n", true, nil, "192.0.2.1", "192.0.2.7"), metav1.UpdateOptions{})
	must(t, err)
	rules("ip daddr { 192.0.2.1, 192.0.2.7 }", true)
	cancel()
	must(t, <-done)
	rules("ip daddr { 192.0.2.1, 192.0.2.7 }", true)

	// Another run finds that the Service is gone.
	must(t, client.CoreV1().Services("ns").Delete(t.Context(), "web", metav1.DeleteOptions{}))
	ctx, cancel = context.WithCancel(t.Context())
	go func() { done <- n.Run(ctx) }()
	rules("table", false)
	cancel()
	must(t, <-done)
}

func TestHides(t *testing.T) {
	f := frontend{family: corev1.IPv4Protocol, protocol: "tcp", port: 80}
	for name, test := range map[string]struct {
		port corev1.ContainerPort
		host bool
		want bool
	}{
		"same":           {port: corev1.ContainerPort{HostPort: 80, Protocol: corev1.ProtocolTCP}, want: true},
		"all addresses":  {port: corev1.ContainerPort{HostPort: 80, HostIP: "0.0.0.0"}, want: true},
		"an address":     {port: corev1.ContainerPort{HostPort: 80, HostIP: "192.0.2.1"}, want: true},
		"loopback":       {port: corev1.ContainerPort{HostPort: 80, HostIP: "127.0.0.1"}},
		"other family":   {port: corev1.ContainerPort{HostPort: 80, HostIP: "fd00::1"}},
		"other protocol": {port: corev1.ContainerPort{HostPort: 80, Protocol: corev1.ProtocolUDP}},
		"other port":     {port: corev1.ContainerPort{HostPort: 81}},
		"no host port":   {port: corev1.ContainerPort{ContainerPort: 80}},
		"node's network": {port: corev1.ContainerPort{HostPort: 80}, host: true},
	} {
		p := &corev1.Pod{Spec: corev1.PodSpec{HostNetwork: test.host, Containers: []corev1.Container{{Ports: []corev1.ContainerPort{test.port}}}}}
		if got := f.hides(p); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
