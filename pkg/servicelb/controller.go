// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
)

const (
	// settle is how long changes are collected before the whole is looked at.
	settle = 50 * time.Millisecond
	// retryAfter is when a failed write is tried again.
	retryAfter = 2 * time.Second
)

// ControllerConfig is the configuration of a [Controller].
type ControllerConfig struct {
	Client kubernetes.Interface
	// Pool of addresses for Services; empty: they get those of nodes. It may change, which PoolChanged tells; that may be nil.
	Pool        func() Pool
	PoolChanged <-chan struct{}
	// APIPort and BalancerPort are where API servers and the nodes' load balancers listen.
	APIPort, BalancerPort int
}

// Controller writes the addresses of Services of type LoadBalancer. One of them runs in a cluster.
type Controller struct {
	cfg      ControllerConfig
	log      *slog.Logger
	reserved map[portKey]string

	// Of one Run.
	services corelisters.ServiceLister
	nodes    corelisters.NodeLister
	slices   cache.Indexer
	events   record.EventRecorder
	said     map[types.UID]string // the last event of a Service
	leases   sets.Set[string]     // as they were written; nil: not known
}

// NewController makes a controller that has not started.
func NewController(cfg ControllerConfig, log *slog.Logger) *Controller {
	return &Controller{cfg: cfg, log: log.With("component", Component), reserved: reservedPorts(cfg.APIPort, cfg.BalancerPort)}
}

// reservedPorts are those that a Service on the nodes' addresses must not take: the cluster would lose a node, or its owner the way in.
func reservedPorts(api, balancer int) map[portKey]string {
	ports := map[portKey]string{{corev1.ProtocolTCP, 22}: "SSH", {corev1.ProtocolUDP, 8472}: "the network of pods (VXLAN)"}
	for port, who := range map[int]string{api: "the API server", balancer: "the load balancer in front of the API", 2379: "the datastore", 2380: "the datastore"} {
		ports[portKey{corev1.ProtocolTCP, int32(port)}] = who
	}
	// k8s.io/kubernetes/pkg/cluster/ports
	for port := int32(10248); port <= 10259; port++ {
		ports[portKey{corev1.ProtocolTCP, port}] = "a component of Kubernetes"
	}
	return ports
}

// Run works until ctx ends and returns nil then. It may be called again afterwards.
func (c *Controller) Run(ctx context.Context) error {
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: c.cfg.Client.CoreV1().Events(metav1.NamespaceAll)})
	c.events = broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "kedge-servicelb"})
	c.said, c.leases = map[types.UID]string{}, nil

	ctx, cancel := context.WithCancel(ctx)
	factory := informers.NewSharedInformerFactoryWithOptions(c.cfg.Client, 0, informers.WithTransform(trim))
	defer factory.Shutdown() // after cancel
	defer cancel()
	changed := make(chan struct{}, 1)
	c.services = factory.Core().V1().Services().Lister()
	c.nodes = factory.Core().V1().Nodes().Lister()
	slices := factory.Discovery().V1().EndpointSlices().Informer()
	c.slices = slices.GetIndexer()
	if err := slices.AddIndexers(cache.Indexers{byService: indexByService}); err != nil {
		return err
	}
	if err := notify(changed, factory.Core().V1().Services().Informer(), factory.Core().V1().Nodes().Informer(), slices); err != nil {
		return err
	}
	factory.Start(ctx.Done())
	for typ, ok := range factory.WaitForCacheSync(ctx.Done()) {
		if !ok {
			return ignoreEnd(ctx, fmt.Errorf("no %v from the API", typ))
		}
	}
	return c.loop(ctx, changed)
}

func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// notify makes changes of what informers watch known in a channel of one slot.
func notify(changed chan struct{}, watched ...cache.SharedIndexInformer) error {
	tell := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	for _, informer := range watched {
		_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(any) { tell() },
			DeleteFunc: func(any) { tell() },
			UpdateFunc: func(before, after any) {
				if relevant(before, after) {
					tell()
				}
			},
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// relevant is false for the heartbeats of nodes.
func relevant(before, after any) bool {
	b, isNode := before.(*corev1.Node)
	a, _ := after.(*corev1.Node)
	return !isNode || !equality.Semantic.DeepEqual(b.Labels, a.Labels) || !equality.Semantic.DeepEqual(b.Status, a.Status)
}

// trim leaves of objects what this package reads.
func trim(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Node:
		ready := corev1.NodeStatus{Addresses: o.Status.Addresses}
		for _, c := range o.Status.Conditions {
			if c.Type == corev1.NodeReady {
				ready.Conditions = append(ready.Conditions, corev1.NodeCondition{Type: c.Type, Status: c.Status})
			}
		}
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: o.Name, Labels: o.Labels, ResourceVersion: o.ResourceVersion}, Status: ready}, nil
	case *corev1.Service:
		o.ManagedFields = nil
	case *discoveryv1.EndpointSlice:
		o.ManagedFields = nil
	}
	return obj, nil
}

func (c *Controller) loop(ctx context.Context, changed <-chan struct{}) error {
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(settle):
			}
		case <-c.cfg.PoolChanged:
		case <-again:
		}
		again = nil
		if err := c.sync(ctx); err != nil && ctx.Err() == nil {
			c.log.Warn("addresses of LoadBalancer services, will try again", "error", err)
			again = time.After(retryAfter)
		}
	}
}

// sync writes what has to change in the status of Services, and says what is new about them.
func (c *Controller) sync(ctx context.Context) error {
	services, err := c.services.List(labels.Everything())
	if err != nil {
		return err
	}
	nodes, err := c.nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	verdicts := world{services: services, nodes: nodes, serves: c.serves, pool: c.cfg.Pool(), reserved: c.reserved}.plan()
	// The leases first: nodes cannot announce an address without.
	errs := []error{c.syncLeases(ctx, services, verdicts)}
	for _, svc := range services {
		v, isOurs := verdicts[nameOf(svc)]
		if !isOurs && !c.left(svc) {
			delete(c.said, svc.UID)
			continue
		}
		if !equality.Semantic.DeepEqual(svc.Status.LoadBalancer.Ingress, v.ingress) {
			errs = append(errs, c.write(ctx, svc, v.ingress))
		}
		if c.said[svc.UID] != v.message {
			c.said[svc.UID] = v.message
			if v.message != "" {
				c.events.Event(svc, corev1.EventTypeWarning, v.reason, v.message)
			}
		}
	}
	return errors.Join(errs...)
}

// left says whether a Service that is not ours has addresses from the time when it was.
func (c *Controller) left(svc *corev1.Service) bool {
	if svc.DeletionTimestamp != nil || len(svc.Status.LoadBalancer.Ingress) == 0 {
		return false
	}
	return svc.Spec.Type != corev1.ServiceTypeLoadBalancer || svc.Annotations[AnnotationIgnore] == "false" && c.wrote(svc)
}

// wrote says whether all addresses of a Service are such as this controller gives.
func (c *Controller) wrote(svc *corev1.Service) bool {
	n := len(ingress(svc, corev1.LoadBalancerIPModeProxy))
	for _, a := range ingress(svc, corev1.LoadBalancerIPModeVIP) {
		if c.cfg.Pool().Contains(a) {
			n++
		}
	}
	return n == len(svc.Status.LoadBalancer.Ingress)
}

func (c *Controller) write(ctx context.Context, svc *corev1.Service, ingress []corev1.LoadBalancerIngress) error {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": svc.UID, "resourceVersion": svc.ResourceVersion},
		"status":   map[string]any{"loadBalancer": map[string]any{"ingress": ingress}}, // null removes
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_, err = c.cfg.Client.CoreV1().Services(svc.Namespace).Patch(ctx, svc.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "kedge-servicelb"}, "status")
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // the watch brings the news
	}
	if err != nil {
		return fmt.Errorf("status of Service %s: %w", nameOf(svc), err)
	}
	c.log.Info("addresses of a LoadBalancer service", "service", nameOf(svc).String(), "addresses", texts(ingress))
	return nil
}

func texts(ingress []corev1.LoadBalancerIngress) []string {
	list := []string{}
	for _, in := range ingress {
		list = append(list, in.IP)
	}
	return list
}

// serves says whether an endpoint on a node is ready, or at least answers while it terminates.
func (c *Controller) serves(svc *corev1.Service, node string) bool {
	return servesOn(slicesFrom(c.slices, svc), node)
}
