// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/flannel-io/flannel/pkg/ip"
	"github.com/flannel-io/flannel/pkg/lease"
	"github.com/flannel-io/flannel/pkg/subnet"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// Annotations of a Node by which flannel of any make knows the node's lease.
const (
	flannelPrefix     = "flannel.alpha.coreos.com/"
	flannelManaged    = flannelPrefix + "kube-subnet-manager"
	flannelType       = flannelPrefix + "backend-type"
	flannelData       = flannelPrefix + "backend-data"
	flannelDataV6     = flannelPrefix + "backend-v6-data"
	flannelAddress    = flannelPrefix + "public-ip"
	flannelAddressV6  = flannelPrefix + "public-ipv6"
	flannelOverride   = flannelPrefix + "public-ip-overwrite"
	flannelOverrideV6 = flannelPrefix + "public-ipv6-overwrite"
)

// leases are the nodes' pod networks, kept on the Node objects. Flannel's own manager of them loses the change of one address of a
// node that has two, and cannot tell what went away while it was not running; this one compares what it has told with what there is.
type leases struct {
	subnet.Manager // what no backend of ours calls

	client  kubernetes.Interface
	node    *corev1.Node // this machine's, as it was at the start
	conf    *subnet.Config
	public  []netip.Addr // other nodes send here instead of to the interface's addresses; may be empty
	nodes   cache.Store
	changed chan struct{}
}

// newLeases watches the Nodes until ctx ends. It returns when all that are there now are known.
func newLeases(ctx context.Context, client kubernetes.Interface, node *corev1.Node, conf *subnet.Config, public []netip.Addr) (*leases, error) {
	l := &leases{client: client, node: node, conf: conf, public: public, changed: make(chan struct{}, 1)}
	notify := func(any) {
		select {
		case l.changed <- struct{}{}:
		default:
		}
	}
	store, controller := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.NewListWatchFromClient(client.CoreV1().RESTClient(), "nodes", metav1.NamespaceAll, fields.Everything()),
		ObjectType:    &corev1.Node{},
		Handler:       cache.ResourceEventHandlerFuncs{AddFunc: notify, UpdateFunc: func(_, o any) { notify(o) }, DeleteFunc: notify},
		Transform:     leaseOnly,
	})
	l.nodes = store
	go controller.RunWithContext(ctx)
	if !cache.WaitForCacheSync(ctx.Done(), controller.HasSynced) {
		return nil, context.Cause(ctx)
	}
	return l, nil
}

// leaseOnly keeps of a Node what a lease is made of: a cluster may have many and they are large.
func leaseOnly(obj any) (any, error) {
	n, ok := obj.(*corev1.Node)
	if !ok {
		return obj, nil
	}
	annotations := maps.Clone(n.Annotations)
	maps.DeleteFunc(annotations, func(key, _ string) bool { return !strings.HasPrefix(key, flannelPrefix) })
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: n.Name, UID: n.UID, ResourceVersion: n.ResourceVersion, Annotations: annotations},
		Spec:       corev1.NodeSpec{PodCIDRs: n.Spec.PodCIDRs},
	}, nil
}

// GetNetworkConfig is part of flannel's interface.
func (l *leases) GetNetworkConfig(context.Context) (*subnet.Config, error) { return l.conf, nil }

// AcquireLease tells the other nodes how to reach this one's pods.
func (l *leases) AcquireLease(_ context.Context, attrs *lease.LeaseAttrs) (*lease.Lease, error) {
	own, err := l.own(attrs)
	if err != nil {
		return nil, err
	}
	annotations := map[string]any{flannelManaged: "true", flannelType: attrs.BackendType,
		flannelData: nil, flannelAddress: nil, flannelDataV6: nil, flannelAddressV6: nil} // nil takes it away
	if own.EnableIPv4 {
		annotations[flannelData], annotations[flannelAddress] = string(attrs.BackendData), own.Attrs.PublicIP.String()
	}
	if own.EnableIPv6 {
		annotations[flannelDataV6], annotations[flannelAddressV6] = string(attrs.BackendV6Data), own.Attrs.PublicIPv6.String()
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": annotations}})
	if err != nil {
		return nil, err
	}
	// A backend's context may have no end (see overlay).
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err = l.client.CoreV1().Nodes().Patch(ctx, l.node.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "kedge"}, "status")
	return own, err
}

// own is this node's lease, with the addresses that others are to send to.
func (l *leases) own(attrs *lease.LeaseAttrs) (*lease.Lease, error) {
	own := &lease.Lease{Attrs: *attrs}
	if err := l.setSubnets(own, l.node.Spec.PodCIDRs); err != nil {
		return nil, err
	}
	public := slices.Clone(l.public)
	for _, key := range []string{flannelOverride, flannelOverrideV6} {
		if a, err := netip.ParseAddr(l.node.Annotations[key]); err == nil {
			public = append(public, a)
		}
	}
	for _, a := range slices.Backward(public) { // the first of a family wins
		if a.Is6() {
			own.Attrs.PublicIPv6 = ip.FromIP6(a.AsSlice())
		} else {
			own.Attrs.PublicIP = ip.FromIP(a.AsSlice())
		}
	}
	return own, nil
}

// setSubnets reads a Node's pod networks: one of each family of the cluster.
func (l *leases) setSubnets(to *lease.Lease, podCIDRs []string) error {
	for _, text := range podCIDRs {
		_, n, err := net.ParseCIDR(text)
		if err != nil {
			return err
		}
		if n.IP.To4() != nil {
			to.Subnet, to.EnableIPv4 = ip.FromIPNet(n), l.conf.EnableIPv4
		} else {
			to.IPv6Subnet, to.EnableIPv6 = ip.FromIP6Net(n), l.conf.EnableIPv6
		}
	}
	if to.EnableIPv4 != l.conf.EnableIPv4 || to.EnableIPv6 != l.conf.EnableIPv6 {
		return fmt.Errorf("pod networks %v are not of the families of the cluster", podCIDRs)
	}
	return nil
}

// WatchLeases tells of the other nodes until ctx ends.
func (l *leases) WatchLeases(ctx context.Context, receiver chan []lease.LeaseWatchResult) error {
	defer close(receiver)
	told := map[string]lease.Lease{}
	for {
		now := l.others()
		if events := changes(told, now); len(events) > 0 {
			select {
			case receiver <- []lease.LeaseWatchResult{{Events: events}}:
				told = now
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		select {
		case <-l.changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// changes leads from what was told to what there is. What is gone comes first: a new node may have the network of a removed one.
func changes(told, now map[string]lease.Lease) []lease.Event {
	var gone, come []lease.Event
	for _, name := range slices.Sorted(maps.Keys(told)) {
		if is, ok := now[name]; !ok || !reflect.DeepEqual(is, told[name]) {
			gone = append(gone, lease.Event{Type: lease.EventRemoved, Lease: told[name]})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(now)) {
		if was, ok := told[name]; !ok || !reflect.DeepEqual(was, now[name]) {
			come = append(come, lease.Event{Type: lease.EventAdded, Lease: now[name]})
		}
	}
	return append(gone, come...)
}

// others are the leases of the other nodes, by name.
func (l *leases) others() map[string]lease.Lease {
	list := map[string]lease.Lease{}
	for _, obj := range l.nodes.List() {
		n, ok := obj.(*corev1.Node)
		if !ok || n.Name == l.node.Name || n.Annotations[flannelManaged] != "true" {
			continue
		}
		// A node whose flannel has not started, or is of another make, is not in reach yet.
		if one, err := l.of(n); err == nil {
			list[n.Name] = one
		}
	}
	return list
}

func (l *leases) of(n *corev1.Node) (one lease.Lease, err error) {
	if one.Attrs.BackendType = n.Annotations[flannelType]; one.Attrs.BackendType != l.conf.BackendType {
		return one, fmt.Errorf("the node's backend is %q", one.Attrs.BackendType)
	}
	if err := l.setSubnets(&one, n.Spec.PodCIDRs); err != nil {
		return one, err
	}
	var errV4, errV6 error
	if one.EnableIPv4 {
		one.Attrs.BackendData = json.RawMessage(n.Annotations[flannelData])
		one.Attrs.PublicIP, errV4 = ip.ParseIP4(n.Annotations[flannelAddress])
	}
	if one.EnableIPv6 {
		one.Attrs.BackendV6Data = json.RawMessage(n.Annotations[flannelDataV6])
		one.Attrs.PublicIPv6, errV6 = ip.ParseIP6(n.Annotations[flannelAddressV6])
	}
	return one, errors.Join(errV4, errV6)
}

// GetStoredMacAddresses gives the addresses of the VXLAN devices that the other nodes know: a device that is made anew gets them again.
func (l *leases) GetStoredMacAddresses(context.Context) (string, string) {
	return vtepMAC([]byte(l.node.Annotations[flannelData])), vtepMAC([]byte(l.node.Annotations[flannelDataV6]))
}

// vtepMAC reads the hardware address out of a VXLAN lease, empty if it is none.
func vtepMAC(data []byte) string {
	var vxlan struct{ VtepMAC string }
	if json.Unmarshal(data, &vxlan) != nil {
		return ""
	}
	return vxlan.VtepMAC
}
