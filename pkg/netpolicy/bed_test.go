// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	kruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/knftables"
	"sigs.k8s.io/yaml"

	"github.com/kedge-io/kedge/pkg/netpolicy/announce"
	"github.com/kedge-io/kedge/tests/netns"
	"github.com/kedge-io/kedge/tests/testlog"
)

// bed is a node with a controller, and an API.
type bed struct {
	t      testing.TB
	api    *fake.Clientset
	cfg    Config
	ctl    *Controller
	stop   func()
	uid    int
	pause  time.Duration // of the controller, as is every: shorter than in earnest
	every  time.Duration
	spaces map[string]*space
	ids    map[string]string // pod → container
}

const testNode = "node-1"

// newBed starts a node without pods.
func newBed(t testing.TB) *bed {
	b := prepareBed(t)
	b.start()
	return b
}

// prepareBed does the same without the controller.
func prepareBed(t testing.TB) *bed {
	t.Helper()
	netns.NeedNode(t)
	for file, value := range map[string]string{
		"/proc/sys/net/ipv6/conf/default/accept_dad":    "0", // the node looks for its neighbours from an address that is usable after it only
		"/proc/sys/net/ipv6/conf/default/dad_transmits": "0",
	} {
		must(t, os.WriteFile(file, []byte(value), 0o644))
	}
	dir := t.TempDir()
	b := &bed{t: t, api: newAPI(), pause: 10 * time.Millisecond, every: 500 * time.Millisecond, spaces: map[string]*space{}, ids: map[string]string{}}
	b.cfg = Config{
		NodeName: testNode, Client: b.api, ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd00:42::/48")},
		ClusterDNS: []netip.Addr{addr("10.43.0.10")}, Socket: filepath.Join(dir, SocketName), Dir: filepath.Join(dir, DirName),
	}
	b.create(&corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: testNode},
		Spec:       corev1.NodeSpec{PodCIDRs: []string{"10.42.0.0/24", "fd00:42::/64"}},
	})
	for _, ns := range []string{"kube-system", "a", "b"} {
		b.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns, Labels: map[string]string{corev1.LabelMetadataName: ns}}})
	}
	t.Cleanup(func() { must(t, Cleanup(context.Background())) })
	return b
}

// start runs a controller, after the one before has ended.
func (b *bed) start() {
	b.t.Helper()
	ctl, err := New(b.cfg, testlog.New(b.t))
	must(b.t, err)
	b.ctl, ctl.pause, ctl.every = ctl, b.pause, b.every
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ctl.Run(ctx) }()
	b.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				b.t.Errorf("Run: %v", err)
			}
		case <-time.After(testTimeout):
			b.t.Error("Run does not return")
		}
	})
	b.t.Cleanup(b.stop)
	eventually(b.t, "ready", ctl.Ready)
}

// newAPI is an API that knows field selectors of pods.
func newAPI() *fake.Clientset {
	api := fake.NewClientset()
	api.PrependReactor("list", "pods", func(action clienttesting.Action) (bool, kruntime.Object, error) {
		selector := action.(clienttesting.ListAction).GetListRestrictions().Fields
		obj, err := api.Tracker().List(action.GetResource(), corev1.SchemeGroupVersion.WithKind("Pod"), action.GetNamespace())
		if err != nil {
			return true, nil, err
		}
		list := obj.(*corev1.PodList).DeepCopy()
		kept := list.Items[:0]
		for _, p := range list.Items {
			if selector.Matches(fields.Set{"spec.nodeName": p.Spec.NodeName}) {
				kept = append(kept, p)
			}
		}
		list.Items = kept
		return true, list, nil
	})
	api.PrependWatchReactor("pods", func(action clienttesting.Action) (bool, watch.Interface, error) {
		selector := action.(clienttesting.WatchAction).GetWatchRestrictions().Fields
		w, err := api.Tracker().Watch(action.GetResource(), action.GetNamespace())
		if err != nil {
			return true, nil, err
		}
		return true, watch.Filter(w, func(e watch.Event) (watch.Event, bool) {
			p, ok := e.Object.(*corev1.Pod)
			return e, !ok || selector.Matches(fields.Set{"spec.nodeName": p.Spec.NodeName})
		}), nil
	})
	return api
}

func (b *bed) create(o metav1.Object) {
	b.t.Helper()
	b.uid++
	if o.GetUID() == "" {
		o.SetUID(types.UID(fmt.Sprint("uid-", b.uid)))
	}
	must(b.t, b.api.Tracker().Add(o.(kruntime.Object)))
}

// policy puts a policy in YAML into the API.
func (b *bed) policy(namespace, name, spec string) {
	b.t.Helper()
	p := policyOf(b.t, namespace, name, spec)
	client := b.api.NetworkingV1().NetworkPolicies(namespace)
	if _, err := client.Update(context.Background(), p, metav1.UpdateOptions{}); err != nil {
		_, err = client.Create(context.Background(), p, metav1.CreateOptions{})
		must(b.t, err)
	}
	b.settle()
}

func policyOf(t testing.TB, namespace, name, spec string) *networkingv1.NetworkPolicy {
	t.Helper()
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
	must(t, yaml.UnmarshalStrict([]byte(spec), &p.Spec))
	return p
}

func (b *bed) deletePolicy(namespace, name string) {
	b.t.Helper()
	must(b.t, b.api.NetworkingV1().NetworkPolicies(namespace).Delete(context.Background(), name, metav1.DeleteOptions{}))
	b.settle()
}

// settle waits until the kernel has the rules for what is in the API.
func (b *bed) settle() {
	b.t.Helper()
	eventually(b.t, "rules", func() error {
		b.ctl.mu.Lock()
		have := b.ctl.rules
		b.ctl.mu.Unlock()
		if have == nil {
			return errors.New("nothing is loaded")
		}
		if want := compile(b.wanted()); !equal(have, want) {
			return errors.New("not what is wanted")
		}
		return nil
	})
}

// wanted is the world as the API has it, without informers.
func (b *bed) wanted() world {
	b.t.Helper()
	w := world{families: []family{v4, v6}, namespaces: map[string]labels.Set{}}
	ctx := context.Background()
	list := func(err error) { b.t.Helper(); must(b.t, err) }
	policies, err := b.api.NetworkingV1().NetworkPolicies("").List(ctx, metav1.ListOptions{})
	list(err)
	for i := range policies.Items {
		w.policies = append(w.policies, &policies.Items[i])
	}
	namespaces, err := b.api.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	list(err)
	for _, n := range namespaces.Items {
		w.namespaces[n.Name] = n.Labels
	}
	pods, err := b.api.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	list(err)
	b.ctl.mu.Lock()
	defer b.ctl.mu.Unlock()
	w.podCIDRs = b.ctl.podCIDRs
	for i := range pods.Items {
		p := &pods.Items[i]
		if !counts(p) {
			continue
		}
		stripped, _ := stripPod(p)
		local, addrs := p.Spec.NodeName == testNode, addresses(p)
		if r, ok := b.ctl.records[b.ids[p.Namespace+"/"+p.Name]]; ok {
			addrs = r.Addresses
		}
		w.pods = append(w.pods, podOf(identify(stripped.(*corev1.Pod)), addrs, local))
		if local {
			w.known = append(w.known, addrs...)
		}
	}
	w.pods = append(w.pods, b.ctl.dnsPod())
	return w
}

func equal(a, b *ruleset) bool {
	nft := knftables.NewFake(knftables.InetFamily, table)
	return a.identity() == b.identity() && change(nft, a, b).NumOperations()+remove(nft, a, b).NumOperations() == 0
}

// pod starts a pod on the node: its object, its network, its announcement.
func (b *bed) pod(namespace, name string, labels map[string]string, addrs ...string) *space {
	b.t.Helper()
	s := b.createPod(namespace, name, labels, addrs...)
	must(b.t, b.announce(namespace, name, addrs...))
	return s
}

func (b *bed) createPod(namespace, name string, labels map[string]string, addrs ...string) *space {
	b.t.Helper()
	b.create(newPod(namespace, name, testNode, labels))
	s := newSpace(b.t)
	s.attach(fmt.Sprintf("veth%d", b.uid), addrsOf(addrs))
	s.listen(8080)
	s.listen(8081)
	b.spaces[namespace+"/"+name] = s
	return s
}

func newPod(namespace, name, node string, labels map[string]string, addrs ...string) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels},
		Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Ports: []corev1.ContainerPort{
			{Name: "web", ContainerPort: 8080, Protocol: corev1.ProtocolTCP},
		}}}},
	}
	for _, a := range addrs {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: a})
	}
	return p
}

// announce does what the CNI plugin does.
func (b *bed) announce(namespace, name string, addrs ...string) error {
	p, err := b.api.CoreV1().Pods(namespace).Get(context.Background(), name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	b.uid++
	id := fmt.Sprint("container-", b.uid)
	b.ids[namespace+"/"+name] = id
	return announce.Add(b.cfg.Socket, announce.Pod{Container: id, Namespace: namespace, Name: name, UID: string(p.UID), Addresses: addrsOf(addrs)})
}

// other attaches a machine that is no node of the cluster, and pods of another node behind it.
func (b *bed) other(a string, behind ...string) *space {
	b.t.Helper()
	s := newSpace(b.t)
	b.uid++
	s.attach(fmt.Sprintf("up%d", b.uid), []netip.Addr{addr(a)}, behind...)
	s.listen(8080)
	must(b.t, s.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		for _, cidr := range behind {
			err = errors.Join(err, netlink.AddrAdd(lo, &netlink.Addr{IPNet: single(netip.MustParsePrefix(cidr).Addr())}))
		}
		return err
	}))
	return s
}
