// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
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
)

// inNode is in the environment of the process that is the node: one in a network namespace of its own.
const inNode = "KEDGE_TEST_NODE"

// TestMain runs the tests once more in a namespace: everything that they do to "the node" happens there.
func TestMain(m *testing.M) {
	if _, err := exec.LookPath("nft"); err != nil {
		for _, dir := range []string{"/usr/sbin", "../../build/" + runtime.GOARCH + "/userland"} {
			if abs, err := filepath.Abs(dir); err == nil {
				os.Setenv("PATH", os.Getenv("PATH")+":"+abs)
			}
		}
	}
	if os.Getuid() != 0 || os.Getenv(inNode) != "" {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inNode+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	} else if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// needKernel skips unless the real nftables can be used.
func needKernel(t testing.TB) {
	t.Helper()
	if os.Getenv(inNode) == "" {
		t.Skip("needs root, for network namespaces")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft")
	}
}

const (
	testTimeout = 20 * time.Second
	// quick is how long a packet gets that should not arrive.
	quick = 300 * time.Millisecond
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func addrsOf(texts []string) (addrs []netip.Addr) {
	for _, text := range texts {
		addrs = append(addrs, addr(text))
	}
	return addrs
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits for f to succeed.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(testTimeout)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

type testWriter struct {
	t    testing.TB
	done atomic.Bool
}

func (w *testWriter) Write(p []byte) (int, error) {
	if !w.done.Load() {
		w.t.Log(strings.TrimSpace(string(p)))
	}
	return len(p), nil
}

func testLogger(t testing.TB) *slog.Logger {
	w := &testWriter{t: t}
	t.Cleanup(func() { w.done.Store(true) })
	return slog.New(slog.NewTextHandler(w, nil))
}

// space is a network namespace: a pod's or another machine's.
type space struct {
	t  testing.TB
	ns *os.File
}

func newSpace(t testing.TB) *space {
	t.Helper()
	s := &space{t: t}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocks: the thread ends with its namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			s.ns, err = os.Open("/proc/thread-self/ns/net")
		}
		made <- err
	}()
	must(t, <-made)
	t.Cleanup(func() { s.ns.Close() })
	return s
}

// do runs f inside. Sockets that it makes stay there.
func (s *space) do(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(int(s.ns.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// attach gives s the addresses and connects it to the node the way that the plugin ptp does; more are ranges that are behind s.
func (s *space) attach(name string, addrs []netip.Addr, more ...string) {
	s.t.Helper()
	host := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0"}
	host.PeerNamespace = netlink.NsFd(int(s.ns.Fd()))
	must(s.t, netlink.LinkAdd(host))
	s.t.Cleanup(func() { _ = netlink.LinkDel(host) })
	must(s.t, s.do(func() error { return setUp(s.ns, addrs) }))
	must(s.t, netlink.LinkSetUp(host))
	for _, a := range addrs {
		gw := gatewayOf(a)
		must(s.t, netlink.AddrReplace(host, &netlink.Addr{IPNet: single(gw), Flags: unix.IFA_F_NODAD}))
		must(s.t, netlink.RouteReplace(&netlink.Route{LinkIndex: host.Index, Dst: single(a), Scope: scopeOf(a)}))
		for _, m := range more {
			if _, dst, _ := net.ParseCIDR(m); (dst.IP.To4() != nil) == a.Is4() {
				must(s.t, netlink.RouteReplace(&netlink.Route{LinkIndex: host.Index, Dst: dst, Gw: a.AsSlice()}))
			}
		}
	}
}

func scopeOf(a netip.Addr) netlink.Scope {
	if a.Is6() {
		return netlink.SCOPE_UNIVERSE
	}
	return netlink.SCOPE_LINK
}

func single(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func gatewayOf(a netip.Addr) netip.Addr {
	if a.Is4() {
		return addr("10.42.0.1")
	}
	return addr("fd00:42::1")
}

func setUp(_ *os.File, addrs []netip.Addr) error {
	for _, name := range []string{"lo", "eth0"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		if name == "lo" {
			continue
		}
		for _, a := range addrs {
			gw := gatewayOf(a)
			def := &net.IPNet{IP: make(net.IP, a.BitLen()/8), Mask: net.CIDRMask(0, a.BitLen())}
			if err := errors.Join(
				netlink.AddrAdd(link, &netlink.Addr{IPNet: single(a), Flags: unix.IFA_F_NODAD}),
				netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: single(gw), Scope: scopeOf(a)}),
				netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: def, Gw: gw.AsSlice()}),
			); err != nil {
				return err
			}
		}
	}
	return nil
}

// listen answers on a port with TCP and UDP: whoever connects gets back what it sends.
func (s *space) listen(port uint16) {
	s.t.Helper()
	must(s.t, s.do(func() error { return serveEcho(s.t, "", port) }))
}

func serveEcho(t testing.TB, host string, port uint16) error {
	l, err := net.Listen("tcp", fmt.Sprintf("%s:%d", host, port))
	if err != nil {
		return err
	}
	pc, err := net.ListenPacket("udp", fmt.Sprintf("%s:%d", host, port))
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); pc.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer conn.Close(); _, _ = io.Copy(conn, conn) }()
		}
	})
	wg.Go(func() {
		b := make([]byte, 1500)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo(b[:n], from)
		}
	})
	return nil
}

// dial opens a connection and sees an answer on it. A nil s is the node.
func (s *space) dial(network string, to netip.Addr, port uint16, timeout time.Duration) (conn net.Conn, err error) {
	open := func() error {
		conn, err = net.DialTimeout(network, netip.AddrPortFrom(to, port).String(), timeout)
		return err
	}
	if s == nil {
		err = open()
	} else {
		err = s.do(open)
	}
	if err != nil {
		return nil, err
	}
	if err := ping(conn, timeout); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func ping(conn net.Conn, timeout time.Duration) error {
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("hello")); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 5))
	return err
}

func (s *space) try(network string, to netip.Addr, port uint16, timeout time.Duration) error {
	conn, err := s.dial(network, to, port, timeout)
	if err == nil {
		conn.Close()
	}
	return err
}

// open fails unless all kinds of connections pass, closed unless none does. A nil s is the node.
func (s *space) open(t testing.TB, to string, port uint16, networks ...string) {
	t.Helper()
	for _, network := range networksOr(networks) {
		if err := s.try(network, addr(to), port, 3*time.Second); err != nil {
			t.Errorf("%s to %s port %d: %v, want it open", network, to, port, err)
		}
	}
}

func (s *space) closed(t testing.TB, to string, port uint16, networks ...string) {
	t.Helper()
	var wg sync.WaitGroup
	for _, network := range networksOr(networks) {
		wg.Go(func() {
			if s.try(network, addr(to), port, quick) == nil {
				t.Errorf("%s to %s port %d: open, want it closed", network, to, port)
			}
		})
	}
	wg.Wait()
}

func networksOr(networks []string) []string {
	if len(networks) == 0 {
		return []string{"tcp", "udp"}
	}
	return networks
}

// bed is a node with a controller, and an API.
type bed struct {
	t      testing.TB
	api    *fake.Clientset
	cfg    Config
	ctl    *Controller
	stop   func()
	uid    int
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
	needKernel(t)
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.LinkSetUp(lo))
	for file, value := range map[string]string{
		"/proc/sys/net/ipv4/ip_forward":                 "1",
		"/proc/sys/net/ipv6/conf/all/forwarding":        "1",
		"/proc/sys/net/ipv6/conf/default/accept_dad":    "0", // the node looks for its neighbours from an address that is usable after it only
		"/proc/sys/net/ipv6/conf/default/dad_transmits": "0",
	} {
		must(t, os.WriteFile(file, []byte(value), 0o644))
	}
	dir := t.TempDir()
	b := &bed{t: t, api: newAPI(), spaces: map[string]*space{}, ids: map[string]string{}}
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
	ctl, err := New(b.cfg, testLogger(b.t))
	must(b.t, err)
	b.ctl = ctl
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
	must(b.t, s.do(func() error {
		lo, err := netlink.LinkByName("lo")
		for _, cidr := range behind {
			err = errors.Join(err, netlink.AddrAdd(lo, &netlink.Addr{IPNet: single(netip.MustParsePrefix(cidr).Addr())}))
		}
		return err
	}))
	return s
}
