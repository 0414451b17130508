// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/knftables"
)

// lookInterval is how often the rules are looked at; other programs flush them.
const lookInterval = 30 * time.Second

// hostPortInterval is how often pods with host ports are looked for while nothing changes that is watched.
const hostPortInterval = 10 * time.Minute

const (
	reasonEclipsed  = "HostPortTaken"
	reasonAnnounced = "Announced"
)

// NodeConfig is the configuration of a [Node].
type NodeConfig struct {
	NodeName string
	Client   kubernetes.Interface
	// ClusterCIDRs are the pods' networks.
	ClusterCIDRs []netip.Prefix
}

// Node makes LoadBalancer services answer on one machine.
type Node struct {
	cfg   NodeConfig
	log   *slog.Logger
	table *table
	float *floater

	mu      sync.Mutex
	problem error

	// Of one Run.
	services corelisters.ServiceLister
	nodes    corelisters.NodeLister
	slices   cache.Indexer
	events   record.EventRecorder
	told     map[string]bool // events that were written, by Service and port
	// askedPods is when the node's pods were looked at.
	askedPods time.Time
	// watchNodes makes nodes all of the cluster's, which matter for floating addresses only; nil: they are.
	watchNodes func() error
}

// NewNode checks that the machine has nftables. Nothing is started.
func NewNode(cfg NodeConfig, log *slog.Logger) (*Node, error) {
	nft, err := knftables.New(knftables.InetFamily, nftTable)
	if err != nil {
		return nil, fmt.Errorf("LoadBalancer services need nftables: %w", err)
	}
	return newNode(cfg, nft, log), nil
}

func newNode(cfg NodeConfig, nft knftables.Interface, log *slog.Logger) *Node {
	n := &Node{cfg: cfg, log: log.With("component", Component), table: &table{nft: nft, pods: cfg.ClusterCIDRs}, problem: errors.New("not started")}
	n.float = newFloater(cfg.Client, cfg.NodeName, netip.Addr{}, n.log, n.announced)
	n.float.keep = true
	return n
}

// Ready returns nil when what the API says about Services is in the kernel, otherwise the reason why not.
func (n *Node) Ready() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return errors.Join(n.problem, n.float.problem())
}

func (n *Node) setProblem(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err != nil && (n.problem == nil || err.Error() != n.problem.Error()) {
		n.log.Warn("LoadBalancer services, will try again", "error", err)
	}
	n.problem = err
}

// Run works until ctx ends and returns nil then; it may be called again afterwards. The rules stay when it ends, so that traffic goes on
// while the process restarts; floating addresses go to another node at once.
func (n *Node) Run(ctx context.Context) error {
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: n.cfg.Client.CoreV1().Events(metav1.NamespaceAll)})
	n.events = broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "kedge-servicelb", Host: n.cfg.NodeName})
	n.told = map[string]bool{}
	n.table.known = false

	ctx, cancel := context.WithCancel(ctx)
	changed := make(chan struct{}, 1)
	stop, err := n.watch(ctx, changed)
	if err != nil {
		cancel()
		return err
	}
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { n.float.run(ctx) })
	defer wg.Wait()
	defer cancel()
	return n.loop(ctx, changed)
}

// watch fills the listers. stop is to be called after ctx has ended.
func (n *Node) watch(ctx context.Context, changed chan struct{}) (stop func(), err error) {
	factory := informers.NewSharedInformerFactoryWithOptions(n.cfg.Client, 0, informers.WithTransform(trim))
	var nodes []informers.SharedInformerFactory
	watchNodes := func(options func(*metav1.ListOptions)) error {
		f := informers.NewSharedInformerFactoryWithOptions(n.cfg.Client, 0, informers.WithTransform(trim), informers.WithTweakListOptions(options))
		n.nodes, nodes = f.Core().V1().Nodes().Lister(), append(nodes, f)
		if err := notify(changed, f.Core().V1().Nodes().Informer()); err != nil {
			return err
		}
		f.Start(ctx.Done())
		f.WaitForCacheSync(ctx.Done())
		return nil
	}
	n.watchNodes = func() error {
		n.watchNodes = nil
		return watchNodes(func(*metav1.ListOptions) {})
	}
	n.services = factory.Core().V1().Services().Lister()
	slices := factory.Discovery().V1().EndpointSlices().Informer()
	n.slices = slices.GetIndexer()
	if err := slices.AddIndexers(cache.Indexers{byService: indexByService}); err != nil {
		return nil, err
	}
	if err := notify(changed, factory.Core().V1().Services().Informer(), slices); err != nil {
		return nil, err
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	err = watchNodes(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, n.cfg.NodeName).String()
	})
	return func() {
		factory.Shutdown()
		for _, f := range nodes {
			f.Shutdown()
		}
	}, err
}

const byService = "service"

func indexByService(obj any) ([]string, error) {
	slice, ok := obj.(*discoveryv1.EndpointSlice)
	if !ok || slice.Labels[discoveryv1.LabelServiceName] == "" {
		return nil, nil
	}
	return []string{slice.Namespace + "/" + slice.Labels[discoveryv1.LabelServiceName]}, nil
}

// slicesFrom looks a Service's EndpointSlices up in an index by [byService].
func slicesFrom(index cache.Indexer, svc *corev1.Service) []*discoveryv1.EndpointSlice {
	objs, _ := index.ByIndex(byService, nameOf(svc).String()) // fails for unknown indexes only
	var list []*discoveryv1.EndpointSlice
	for _, obj := range objs {
		if slice, ok := obj.(*discoveryv1.EndpointSlice); ok {
			list = append(list, slice)
		}
	}
	return list
}

func (n *Node) slicesOf(svc *corev1.Service) []*discoveryv1.EndpointSlice {
	return slicesFrom(n.slices, svc)
}

func (n *Node) loop(ctx context.Context, changed <-chan struct{}) error {
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	for {
		err := n.sync(ctx)
		if ctx.Err() != nil {
			return nil
		}
		n.setProblem(err)
		var again <-chan time.Time
		if err != nil {
			again = time.After(retryAfter)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-again:
		case <-look.C:
			if !n.table.look(ctx) && ctx.Err() == nil && err == nil {
				n.log.Info("the rules were gone: writes them again")
			}
		case <-changed:
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(settle):
			}
		}
	}
}

// sync brings everything on this machine in line with the API.
func (n *Node) sync(ctx context.Context) error {
	services, err := n.services.List(labels.Everything())
	if err != nil {
		return err
	}
	if anyFloating(services) && n.watchNodes != nil {
		if err := n.watchNodes(); err != nil {
			return err
		}
	}
	nodes, err := n.nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	var own *corev1.Node
	for _, node := range nodes {
		if node.Name == n.cfg.NodeName {
			own = node
		}
	}
	if own == nil {
		return errors.New("waiting for the Node object of this machine")
	}
	s := frontendsOn(own, services, n.slicesOf)
	changed, err := n.table.write(ctx, s)
	if changed {
		n.log.Debug("serves ports of LoadBalancer services", "ports", len(s.frontends))
		n.tellEclipsed(s, services)
	}
	if changed || time.Since(n.askedPods) > hostPortInterval {
		n.askedPods = time.Now()
		n.tellHostPorts(ctx, s, services)
	}
	n.float.want(groupsOn(own, nodes, services, n.slicesOf))
	return err
}

// tellEclipsed writes an event, once for each port, where a process of this machine loses its clients to a Service.
func (n *Node) tellEclipsed(s served, services []*corev1.Service) {
	all, err := listeners()
	if err != nil {
		n.log.Debug("sockets of this machine", "error", err)
		return
	}
	for _, f := range s.frontends {
		socket, ok := f.eclipsed(all, s.addresses)
		if !ok || n.told[f.name()] {
			continue
		}
		for _, svc := range services {
			if nameOf(svc) == f.service {
				n.told[f.name()] = true
				n.events.Eventf(svc, corev1.EventTypeWarning, reasonEclipsed,
					"a process of node %s listens on %s and gets no clients from outside any more: this Service has the port", n.cfg.NodeName, socket)
			}
		}
	}
}

// tellHostPorts does the same for the host ports of pods, which are rules and no sockets: those of Services come before them.
func (n *Node) tellHostPorts(ctx context.Context, s served, services []*corev1.Service) {
	if len(s.frontends) == 0 {
		return
	}
	own := fields.OneTermEqualSelector("spec.nodeName", n.cfg.NodeName).String()
	pods, err := n.cfg.Client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{FieldSelector: own, ResourceVersion: "0"})
	if err != nil {
		n.log.Debug("host ports of pods", "error", err)
		return
	}
	for i := range pods.Items {
		p := &pods.Items[i]
		for _, f := range s.frontends {
			key := f.name() + " " + string(p.UID)
			if n.told[key] || !f.hides(p) {
				continue
			}
			for _, svc := range services {
				if nameOf(svc) == f.service {
					n.told[key] = true
					n.events.Eventf(svc, corev1.EventTypeWarning, reasonEclipsed,
						"the hostPort %d/%s of pod %s/%s on node %s gets no clients from outside any more: this Service has the port", f.port, f.protocol, p.Namespace, p.Name, n.cfg.NodeName)
				}
			}
		}
	}
}

// announced writes an event that says where an address is now.
func (n *Node) announced(addr netip.Addr, link string) {
	services, err := n.services.List(labels.Everything())
	if err != nil {
		return
	}
	for _, svc := range services {
		for _, a := range ingress(svc, corev1.LoadBalancerIPModeVIP) {
			if a == addr && ours(svc) {
				n.events.Eventf(svc, corev1.EventTypeNormal, reasonAnnounced, "node %s answers for %s on %s", n.cfg.NodeName, addr, link)
			}
		}
	}
}

// Cleanup removes the rules: for uninstalling and for switching the component off. Floating addresses go by themselves a few seconds after
// the last process that bound them has ended. What is not there is no error.
func Cleanup(ctx context.Context) error {
	nft, err := knftables.New(knftables.InetFamily, nftTable)
	if err != nil {
		return nil // without nft there are no rules
	}
	return removeTable(ctx, nft)
}
