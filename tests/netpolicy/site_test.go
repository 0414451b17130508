// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/netpolicy/oracle"
	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/image"
	"github.com/kedge-io/kedge/tests/testbed"
)

const (
	minute = time.Minute

	probeDir   = "/run/probe" // on machines: a directory with a socket for every pod
	probeFlags = "curl -sS --max-time 20"

	hostNamespace = "hosts"
)

// site is a cluster with the pods of [oracle.Layout], a pod on the network of every node, and a machine that does not belong to the
// cluster. All of them answer, and try what they are told to.
type site struct {
	c       *cluster.Cluster
	net     network
	client  kubernetes.Interface
	outside *testbed.Machine

	// base has no policies and the labels of the layout, now is what the cluster was made to have.
	base, now *oracle.World
	probers   []prober
	targets   []target
	// seen are the addresses as which a prober appears to a pod. Those of nodes depend on the way.
	seen map[[2]string]netip.Addr
}

func newSite(t *testing.T, c *cluster.Cluster, n network) (*site, error) {
	ctx := cluster.Within(t, 3*minute)
	s := &site{c: c, net: n}
	server := c.Servers[0]
	kubeconfig, err := server.ReadFile(cluster.Kubeconfig)
	if err != nil {
		return nil, err
	}
	config, err := clientcmd.RESTConfigFromKubeConfig(kubeconfig)
	if err != nil {
		return nil, err
	}
	config.Host, config.QPS = server.URL(), -1
	if s.client, err = kubernetes.NewForConfig(config); err != nil {
		return nil, err
	}
	s.base = oracle.Layout(server.Name(), c.Agents[0].Name())
	s.base.Namespaces = append(s.base.Namespaces, corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: hostNamespace}})
	for _, node := range c.Nodes() {
		s.base.Pods = append(s.base.Pods, corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: hostNamespace, Name: node.Name(), Labels: map[string]string{"pod": "a", "role": "front", "extra": "yes"}},
			Spec:       corev1.PodSpec{HostNetwork: true, NodeName: node.Name(), Containers: []corev1.Container{{Name: "server"}}},
		})
	}
	s.now = &oracle.World{}
	if err := s.become(ctx, s.base); err != nil {
		return nil, err
	}
	if err := s.services(ctx); err != nil {
		return nil, err
	}
	if err := s.startOutside(ctx); err != nil {
		return nil, err
	}
	return s, s.refresh(ctx)
}

// serverPod completes a pod that runs the test server on its node.
func serverPod(p *corev1.Pod, env ...corev1.EnvVar) {
	port := "8080"
	if p.Spec.HostNetwork {
		port = "7079"
	}
	ports := fmt.Sprintf("%d,%d", oracle.Ports[0], oracle.Ports[1])
	p.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	p.Spec.TerminationGracePeriodSeconds = new(int64(0))
	p.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists}}
	p.Spec.Volumes = []corev1.Volume{{Name: "probe", VolumeSource: corev1.VolumeSource{
		HostPath: &corev1.HostPathVolumeSource{Path: socketDir(p), Type: new(corev1.HostPathDirectoryOrCreate)},
	}}}
	c := &p.Spec.Containers[0]
	c.Image = image.ServerName
	c.Env = append(env, corev1.EnvVar{Name: "NAME", Value: p.Namespace + "/" + p.Name}, corev1.EnvVar{Name: "PORT", Value: port},
		corev1.EnvVar{Name: "LISTEN", Value: ports}, corev1.EnvVar{Name: "SOCKET", Value: "/probe/sock"})
	c.VolumeMounts = []corev1.VolumeMount{{Name: "probe", MountPath: "/probe"}}
	c.ReadinessProbe = &corev1.Probe{PeriodSeconds: 1, FailureThreshold: 3, TimeoutSeconds: 2, ProbeHandler: corev1.ProbeHandler{
		HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.Parse(port)},
	}}
}

func socketDir(p *corev1.Pod) string { return path.Join(probeDir, p.Namespace+"-"+p.Name) }

// become gives the cluster the namespaces, labels and policies of a world, as a user does with apply, what differs only.
func (s *site) become(ctx context.Context, w *oracle.World) error {
	var namespaces, others errgroup.Group
	for _, ns := range w.Namespaces {
		if slices.ContainsFunc(s.now.Namespaces, func(o corev1.Namespace) bool { return o.Name == ns.Name && maps.Equal(o.Labels, ns.Labels) }) {
			continue
		}
		namespaces.Go(func() error {
			ns = corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: metav1.ObjectMeta{Name: ns.Name, Labels: ns.Labels}}
			_, err := s.client.CoreV1().Namespaces().Patch(ctx, ns.Name, types.ApplyPatchType, encode(ns), applying())
			return err
		})
	}
	if err := namespaces.Wait(); err != nil {
		return err
	}
	for _, p := range w.Pods {
		if slices.ContainsFunc(s.now.Pods, func(o corev1.Pod) bool {
			return o.Namespace == p.Namespace && o.Name == p.Name && maps.Equal(o.Labels, p.Labels)
		}) {
			continue
		}
		others.Go(func() error { return s.applyPod(ctx, p) })
	}
	for _, p := range w.Policies {
		others.Go(func() error {
			_, err := s.client.NetworkingV1().NetworkPolicies(p.Namespace).Patch(ctx, p.Name, types.ApplyPatchType, encode(p), applying())
			return err
		})
	}
	for _, p := range s.now.Policies {
		if !hasPolicy(w, p.Namespace, p.Name) {
			others.Go(func() error {
				return s.client.NetworkingV1().NetworkPolicies(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{})
			})
		}
	}
	if err := others.Wait(); err != nil {
		return err
	}
	s.now = w.Clone()
	return nil
}

func hasPolicy(w *oracle.World, namespace, name string) bool {
	for _, p := range w.Policies {
		if p.Namespace == namespace && p.Name == name {
			return true
		}
	}
	return false
}

// applyPod tries again while the namespace has no service account.
func (s *site) applyPod(ctx context.Context, p corev1.Pod, env ...corev1.EnvVar) error {
	p = *p.DeepCopy()
	p.Status = corev1.PodStatus{}
	serverPod(&p, env...)
	return testbed.Wait(ctx, "the pod "+p.Namespace+"/"+p.Name+" to be taken", func(ctx context.Context) error {
		_, err := s.client.CoreV1().Pods(p.Namespace).Patch(ctx, p.Name, types.ApplyPatchType, encode(p), applying())
		return err
	})
}

func applying() metav1.PatchOptions {
	return metav1.PatchOptions{FieldManager: "netpolicy-test", Force: new(true)}
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // objects of the API
	}
	return b
}

// services makes Services of one pod each.
func (s *site) services(ctx context.Context) error {
	for _, pod := range servicePods() {
		ns, name, _ := strings.Cut(pod, "/")
		svc := corev1.Service{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
			ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "to-" + name},
			Spec:       corev1.ServiceSpec{Selector: map[string]string{"pod": name}},
		}
		if s.net.v4 && s.net.v6 {
			svc.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack)
		}
		for _, protocol := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
			svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{
				Name: strings.ToLower(string(protocol)), Protocol: protocol, Port: 80, TargetPort: intstr.FromInt32(oracle.Ports[0]),
			})
		}
		if _, err := s.client.CoreV1().Services(ns).Patch(ctx, svc.Name, types.ApplyPatchType, encode(svc), applying()); err != nil {
			return err
		}
	}
	return nil
}

// servicePods have a Service.
func servicePods() []string { return []string{"x/a", "y/b", "z/c"} }

// startOutside boots a machine beside the cluster. It knows the way to pods, as machines in a network with such routes do.
func (s *site) startOutside(ctx context.Context) error {
	var err error
	if s.outside, err = s.c.Bed.Machine(ctx, "outside"); err != nil {
		return err
	}
	const program = "/usr/local/bin/testserver"
	b, err := cluster.Build(ctx, "github.com/kedge-io/kedge/tests/image/testserver")
	if err != nil {
		return err
	}
	if err := s.outside.WriteFile(program, b, 0o755); err != nil {
		return err
	}
	if _, err := s.outside.Shell(ctx, "mkdir -p "+probeDir+"/outside"); err != nil {
		return err
	}
	_, err = s.outside.Spawn(ctx, "/var/log/testserver.log", "env", "NAME=outside", "PORT=7079", "SOCKET="+probeDir+"/outside/sock",
		fmt.Sprintf("LISTEN=%d,%d", oracle.Ports[0], oracle.Ports[1]), program)
	return err
}

// refresh waits until all pods are ready and reads their addresses, from which everything follows that depends on them.
func (s *site) refresh(ctx context.Context) error {
	for i := range s.base.Pods {
		p := &s.base.Pods[i]
		err := testbed.Wait(ctx, fmt.Sprintf("the pod %s/%s to be ready", p.Namespace, p.Name), func(ctx context.Context) error {
			got, err := s.client.CoreV1().Pods(p.Namespace).Get(ctx, p.Name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			p.Status = got.Status
			if !ready(got) || len(p.Status.PodIPs) == 0 {
				return fmt.Errorf("it is %s: %+v", p.Status.Phase, p.Status.Conditions)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if err := s.addRoutes(ctx); err != nil {
		return err
	}
	svc, err := s.client.CoreV1().Services("default").Get(ctx, "kubernetes", metav1.GetOptions{})
	if err != nil {
		return err
	}
	s.base.ClusterDNS = []netip.Addr{dnsAddress(netip.MustParseAddr(svc.Spec.ClusterIP))}
	s.base.Others = append(slices.Clone(s.base.ClusterDNS), s.outsideAddrs()...)
	s.probers = s.allProbers()
	if s.targets, err = s.allTargets(ctx); err != nil {
		return err
	}
	for i := range s.now.Pods { // they have their labels, maybe not their addresses
		s.now.Pods[i].Status = s.base.Pods[i].Status
	}
	s.now.ClusterDNS, s.now.Others = s.base.ClusterDNS, s.base.Others
	return nil
}

func ready(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue })
}

// dnsAddress is the tenth address of the network of services, whose first one is the API's.
func dnsAddress(first netip.Addr) netip.Addr {
	for range 9 {
		first = first.Next()
	}
	return first
}

func (s *site) outsideAddrs() []netip.Addr {
	var list []netip.Addr
	if s.net.v4 {
		list = append(list, netip.MustParseAddr(s.outside.IP()))
	}
	if s.net.v6 {
		list = append(list, netip.MustParseAddr(s.outside.IP6()))
	}
	return list
}

func (s *site) addRoutes(ctx context.Context) error {
	var errs []error
	for _, n := range s.c.Nodes() {
		node, err := s.client.CoreV1().Nodes().Get(ctx, n.Name(), metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, cidr := range node.Spec.PodCIDRs {
			for _, a := range node.Status.Addresses {
				via, err := netip.ParseAddr(a.Address)
				if err != nil || via.Is4() != netip.MustParsePrefix(cidr).Addr().Is4() {
					continue
				}
				_, err = s.outside.Exec(ctx, "ip", "route", "replace", cidr, "via", a.Address)
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
