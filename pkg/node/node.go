// SPDX-License-Identifier: Apache-2.0

// Package node runs what every node of a cluster needs: the [containerd] process, and the [node] process with kubelet,
// kube-proxy, flannel and the cluster DNS. All of it is upstream's; this package makes configuration of Kedge's and starts
// the parts in the order that keeps pods from being created into a network that is not there yet.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	watchtools "k8s.io/client-go/tools/watch"
	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/klog/v2"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/dns"
	"github.com/kedge-io/kedge/pkg/logging"
	"github.com/kedge-io/kedge/pkg/netpolicy"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/servicelb"
	"github.com/kedge-io/kedge/pkg/supervise"
)

// The components of the [node] process, as `kedge status` names them.
const (
	ComponentKubelet   = "kubelet"
	ComponentProxy     = "kube-proxy"
	ComponentFlannel   = "flannel"
	ComponentDNS       = "dns"
	ComponentPolicy    = "netpolicy"
	ComponentServiceLB = servicelb.Component
)

// Config of the [node] process. Files are absolute paths.
type Config struct {
	Logging logging.Config `json:"logging"`

	Name    string       `json:"name"`
	Address []netip.Addr `json:"address"` // one, or one of each family
	Labels  []string     `json:"labels,omitempty"`
	Taints  []string     `json:"taints,omitempty"`

	Kubeconfig       string `json:"kubeconfig"`
	ServingCert      string `json:"servingCert,omitempty"` // certificate and key in one file; empty: the kubelet gets one from the cluster
	ClientCA         string `json:"clientCA"`
	ContainerdSocket string `json:"containerdSocket"`
	RootDir          string `json:"rootDir"` // the kubelet's
	RunDir           string `json:"runDir"`
	DataDir          string `json:"dataDir"`
	CNIConfDir       string `json:"cniConfDir"`
	ResolvConf       string `json:"resolvConf,omitempty"` // of the host; empty: chosen

	ClusterCIDR   config.Prefixes    `json:"clusterCIDR"`
	ServiceCIDR   config.Prefixes    `json:"serviceCIDR"`
	ClusterDNS    netip.Addr         `json:"clusterDNS"`
	ClusterDomain string             `json:"clusterDomain"`
	ProxyMode     config.ProxyMode   `json:"proxyMode"` // empty: no kube-proxy
	Backend       config.FlannelMode `json:"flannelBackend"`
	Iface         string             `json:"flannelIface,omitempty"`
	TxOffload     bool               `json:"flannelTxOffload,omitempty"`
	DNS           bool               `json:"dns"`
	NetworkPolicy bool               `json:"networkPolicy"` // not without a Backend: other CNI plugins have their own ways
	ServiceLB     bool               `json:"serviceLB"`

	// ExternalAddress is where other networks reach the node. With FlannelExternalIP the other nodes send there, too.
	ExternalAddress   []netip.Addr `json:"externalAddress,omitempty"`
	FlannelExternalIP bool         `json:"flannelExternalIP,omitempty"`

	// Certificates of this machine, for the kubelet's /metrics.
	Certificates pki.Places `json:"certificates"`
	// ProtectKernelDefaults makes the kubelet refuse kernel settings that it would change.
	ProtectKernelDefaults bool `json:"protectKernelDefaults,omitempty"`

	// Registered says that an agent's Node has been in the cluster: if it is not any more, it was removed and is not made again.
	Registered bool `json:"registered,omitempty"`
	// Stopping says that the machine's pods are about to be ended: only what they need until then runs, and nothing that would start them
	// again.
	Stopping bool `json:"stopping,omitempty"`

	KubeletArgs []string `json:"kubeletArgs,omitempty"`
	ProxyArgs   []string `json:"proxyArgs,omitempty"`
}

// Components of the process in the order of their start.
func (c Config) Components() []string {
	if c.Stopping {
		if c.DNS {
			return []string{ComponentDNS}
		}
		return nil
	}
	list := []string{ComponentKubelet}
	if c.ProxyMode != "" {
		list = append(list, ComponentProxy)
	}
	if c.Backend != config.FlannelNone {
		list = append(list, ComponentFlannel)
	}
	if c.DNS {
		list = append(list, ComponentDNS)
	}
	if c.NetworkPolicy {
		list = append(list, ComponentPolicy)
	}
	if c.ServiceLB {
		list = append(list, ComponentServiceLB)
	}
	return list
}

// Run blocks until ctx ends or a part fails that cannot be started again in the same process; the supervisor then starts the
// process anew. Pods are not touched by either.
func Run(ctx context.Context, cfg Config, child *supervise.Child, log *slog.Logger) error {
	if cfg.Stopping {
		return runStopping(ctx, cfg, child, log)
	}
	kubelet, err := newKubelet(cfg)
	if err != nil {
		return err
	}
	var proxy *proxy
	if cfg.ProxyMode != "" {
		if proxy, err = newProxy(cfg, log); err != nil {
			return err
		}
	}
	if err := switchMode(ctx, cfg.RunDir, proxy.usedMode()); err != nil {
		log.Error("rules of two proxy modes may be in force", "component", ComponentProxy, "error", err)
	}
	if err := errors.Join(rememberSysctls(cfg.RunDir), setSysctls(log)); err != nil {
		return err
	}
	if err := writeResolvConf(cfg); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	n := &node{cfg: cfg, child: child, log: log}
	if n.client, err = newClient(cfg.Kubeconfig); err != nil {
		return err
	}
	legacyregistry.RawMustRegister(pki.Collector(cfg.Certificates))
	if err := n.startRules(ctx, group); err != nil {
		return err
	}
	if cfg.DNS {
		if n.dns, err = dns.New(cfg.dnsConfig(), log); err != nil {
			return err
		}
		group.Go(func() error { return n.keep(ctx, ComponentDNS, n.dns.Run) })
		group.Go(func() error { n.watchDNS(ctx); return nil })
	}
	group.Go(func() error { return n.run(ctx, group, kubelet, proxy) })
	return group.Wait()
}

// runStopping is Run while the pods end: names are looked up until the last moment. The kernel has the rules for services and policies.
func runStopping(ctx context.Context, cfg Config, child *supervise.Child, log *slog.Logger) error {
	n := &node{cfg: cfg, child: child, log: log}
	if !cfg.DNS {
		<-ctx.Done()
		return nil
	}
	var err error
	if n.dns, err = dns.New(cfg.dnsConfig(), log); err != nil {
		return err
	}
	go n.watchDNS(ctx)
	return n.keep(ctx, ComponentDNS, n.dns.Run)
}

type node struct {
	cfg    Config
	child  *supervise.Child
	log    *slog.Logger
	client kubernetes.Interface
	dns    *dns.Server
	policy *netpolicy.Controller // nil: policies are not enforced here
}

// startRules starts what writes rules of Kedge's own, or removes those of an earlier start that did.
func (n *node) startRules(ctx context.Context, group *errgroup.Group) (err error) {
	if n.cfg.NetworkPolicy {
		if n.policy, err = netpolicy.New(n.policyConfig(), n.log); err != nil {
			return err
		}
		group.Go(func() error { return n.runPolicy(ctx) })
	} else if err := netpolicy.Cleanup(ctx); err != nil {
		n.log.Warn("rules of network policies are left", "component", ComponentPolicy, "error", err)
	}
	if n.cfg.ServiceLB {
		group.Go(func() error { return n.runServiceLB(ctx) })
	} else if err := servicelb.Cleanup(ctx); err != nil {
		n.log.Warn("rules of LoadBalancer services are left", "component", ComponentServiceLB, "error", err)
	}
	return nil
}

// run starts the clients of the API when it answers, and says that the network is up when it is.
func (n *node) run(ctx context.Context, group *errgroup.Group, kubelet *kubelet, proxy *proxy) error {
	for _, c := range []string{ComponentKubelet, ComponentProxy, ComponentFlannel} {
		if slices.Contains(n.cfg.Components(), c) {
			n.child.Report(c, supervise.Waiting, "for the API and containerd")
		}
	}
	client := n.client
	if err := n.waitForAPI(ctx); err != nil {
		return err
	}
	if err := n.waitForContainerd(ctx); err != nil {
		return err
	}
	// kube-proxy ends the process when its Node goes; the kubelet would make another one.
	if n.cfg.Registered && n.isRemoved(ctx, client) {
		n.child.Report(ComponentKubelet, supervise.Failed, Removed)
		return nil
	}
	group.Go(func() error {
		n.child.Report(ComponentKubelet, supervise.Running, "")
		return unstoppable(withComponent(ctx, ComponentKubelet), ComponentKubelet, kubelet.run)
	})
	group.Go(func() error { n.watchKubelet(ctx, client); return nil })
	group.Go(func() error { n.announceExternal(ctx, client); return nil })

	proxyReady := make(chan struct{})
	if proxy == nil {
		close(proxyReady)
	} else {
		group.Go(func() error { n.keepServiceRoutes(ctx); return nil })
		group.Go(func() error {
			if err := n.waitForRules(ctx, client); err != nil {
				return err
			}
			// It looks its Node up at the start and exits when that appears with an address later.
			if _, err := n.waitForNode(ctx, client, func(*corev1.Node) bool { return true }); err != nil {
				return err
			}
			n.child.Report(ComponentProxy, supervise.Running, "mode "+string(proxy.mode))
			go n.watchProxy(ctx, proxy, proxyReady)
			return unstoppable(withComponent(ctx, ComponentProxy), ComponentProxy, proxy.run)
		})
	}
	if n.cfg.Backend == config.FlannelNone {
		return leaveFlannel(n.cfg)
	}
	if err := n.waitForRules(ctx, client); err != nil {
		return err
	}
	return n.keep(ctx, ComponentFlannel, func(ctx context.Context) error {
		return n.runFlannel(withComponent(ctx, ComponentFlannel), client, proxyReady)
	})
}

// unstoppable runs a part that upstream gave no clean stop: when ctx ends it is left to end with the process.
func unstoppable(ctx context.Context, name string, run func(context.Context) error) error {
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	select {
	case <-ctx.Done():
		return nil
	case err := <-ended:
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			err = errors.New("ended by itself")
		}
		return fmt.Errorf("%s: %w", name, err)
	}
}

func withComponent(ctx context.Context, name string) context.Context {
	return klog.NewContext(ctx, klog.Background().WithValues("component", name))
}

// keep runs a part that can be started again in this process until ctx ends.
func (n *node) keep(ctx context.Context, name string, run func(context.Context) error) error {
	for delay := 500 * time.Millisecond; ; delay = min(2*delay, 30*time.Second) {
		start := time.Now()
		err := run(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			err = errors.New("ended by itself")
		}
		if time.Since(start) > time.Minute {
			delay = 500 * time.Millisecond
		}
		n.child.Report(name, supervise.Failed, err.Error())
		n.log.Error("will start it again", "component", name, "error", err, "in", delay)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay):
		}
	}
}

func newClient(kubeconfig string) (kubernetes.Interface, error) {
	rest, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	rest.ContentType = runtime.ContentTypeProtobuf
	return kubernetes.NewForConfig(rest)
}

// waitForAPI returns when the API server answers.
func (n *node) waitForAPI(ctx context.Context) error {
	return supervise.Poll(ctx, func() error {
		err := n.client.Discovery().RESTClient().Get().AbsPath("/livez/ping").Timeout(5 * time.Second).Do(ctx).Error()
		if apierrors.IsForbidden(err) {
			return nil // an answer: on a first start the rules that let nodes ask this come later than the node may register
		}
		return err
	})
}

// waitForRules blocks until this node may read what kube-proxy and flannel watch. On a cluster's first start the rule appears a
// moment after the API does, and a watch that is refused once is tried again after a second or two only.
func (n *node) waitForRules(ctx context.Context, client kubernetes.Interface) error {
	return supervise.Poll(ctx, func() error {
		_, err := client.DiscoveryV1().EndpointSlices(metav1.NamespaceAll).List(ctx, metav1.ListOptions{Limit: 1, ResourceVersion: "0"})
		return err
	})
}

func (n *node) waitForContainerd(ctx context.Context) error {
	client, err := dialContainerd(ctx, n.cfg.ContainerdSocket)
	if err != nil {
		return err
	}
	return client.Close()
}

// waitForNode blocks until this machine's Node object satisfies cond.
func (n *node) waitForNode(ctx context.Context, client kubernetes.Interface, cond func(*corev1.Node) bool) (*corev1.Node, error) {
	only := fields.OneTermEqualSelector(metav1.ObjectNameField, n.cfg.Name).String()
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = only
			return client.CoreV1().Nodes().List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = only
			return client.CoreV1().Nodes().Watch(ctx, o)
		},
	}
	ev, err := watchtools.UntilWithSync(ctx, lw, &corev1.Node{}, nil, func(ev watch.Event) (bool, error) {
		node, ok := ev.Object.(*corev1.Node)
		return ok && ev.Type != watch.Deleted && cond(node), nil
	})
	if err != nil {
		return nil, err
	}
	return ev.Object.(*corev1.Node), nil
}

// Removed is why the kubelet of a node does not run, or has no Node any more. A removed node joins again with a valid token, when Kedge starts.
const Removed = "this node was removed from the cluster"

// isRemoved says whether the cluster has no Node of this name, by the datastore and not by what an API server remembers.
func (n *node) isRemoved(ctx context.Context, client kubernetes.Interface) bool {
	_, err := client.CoreV1().Nodes().Get(ctx, n.cfg.Name, metav1.GetOptions{})
	return apierrors.IsNotFound(err)
}

// watchKubelet reports the kubelet as ready when it says so itself, with the Node's own words otherwise.
func (n *node) watchKubelet(ctx context.Context, client kubernetes.Interface) {
	seen := n.cfg.Registered
	n.watch(ctx, ComponentKubelet, "", func() error {
		if err := httpOK(ctx, "http://127.0.0.1:10248/healthz"); err != nil {
			return err
		}
		node, err := client.CoreV1().Nodes().Get(ctx, n.cfg.Name, metav1.GetOptions{ResourceVersion: "0"})
		if apierrors.IsNotFound(err) && seen && n.isRemoved(ctx, client) {
			return errors.New(Removed)
		}
		if err != nil {
			return err
		}
		seen = true
		for _, c := range node.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
				return errors.New(c.Message)
			}
		}
		return nil
	})
}

func (n *node) watchDNS(ctx context.Context) { n.watch(ctx, ComponentDNS, "", n.dns.Ready) }

// watch reports a part's state from a probe: often until it is ready for the first time, then every 15 seconds.
func (n *node) watch(ctx context.Context, name, remark string, probe func() error) {
	ready, interval := false, 50*time.Millisecond
	for {
		switch err := probe(); {
		case ctx.Err() != nil:
			return
		case err == nil:
			n.child.Report(name, supervise.Ready, remark)
			ready, interval = true, 15*time.Second
		case ready:
			n.child.Report(name, supervise.Failed, err.Error())
			interval = 5 * time.Second
		default:
			n.child.Report(name, supervise.Running, err.Error())
			interval = min(interval*5/4, 5*time.Second)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(interval):
		}
	}
}

// httpOK asks for a URL, and is an error unless the answer is 200.
func httpOK(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s says %s", url, res.Status)
	}
	return nil
}

func (c Config) dnsConfig() dns.Config {
	return dns.Config{
		NodeName:          c.Name,
		ClusterDomain:     c.ClusterDomain,
		Addr:              c.ClusterDNS,
		ClusterCIDRs:      c.ClusterCIDR,
		Kubeconfig:        c.Kubeconfig,
		ResolvConf:        c.ResolvConf,
		KubeletResolvConf: c.kubeletResolvConf(),
		Dir:               filepath.Join(c.DataDir, "dns"),
	}
}

// writeResolvConf makes the file before the first pod needs it; the DNS server keeps it up to date.
func writeResolvConf(cfg Config) error {
	host, err := dns.HostResolvConf(cfg.ResolvConf, cfg.ClusterDNS)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return host.WriteKubelet(cfg.kubeletResolvConf(), false)
}

// kubeletResolvConf is the resolv.conf for pods that use the node's resolvers: the host's without what does not work in a pod.
func (c Config) kubeletResolvConf() string { return filepath.Join(c.RunDir, "resolv.conf") }
