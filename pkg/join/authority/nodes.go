// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/join"
)

// NodeController removes a server from the datastore and the registry when its Node object is deleted. One is to run in a cluster
// at a time.
//
// A server without a Node is not always one that was removed: its kubelet registers seconds after it has joined, and a server may have
// no kubelet at all. So the Node has to have been seen, which the registry remembers (Server.Node) for leaders to come.
type NodeController struct {
	client  kubernetes.Interface
	members Members
	log     *slog.Logger
	nodes   cache.Store
	wake    chan struct{}

	mu      sync.Mutex
	servers map[string]Server // nil: not known yet

	refused map[string]string // by server: why it could not be removed, as it was told last
}

// retryRemoval is how often a removal that was refused is tried again.
const retryRemoval = 30 * time.Second

// NewNodeController makes one to be run once. Members is nil in a cluster whose datastore is not Kedge's.
func NewNodeController(client kubernetes.Interface, members Members, log *slog.Logger) *NodeController {
	if members == nil {
		members = noMembers{}
	}
	return &NodeController{
		client: client, members: members, log: log.With("component", component),
		wake: make(chan struct{}, 1), refused: map[string]string{},
	}
}

// Run blocks until ctx ends.
func (c *NodeController) Run(ctx context.Context) error {
	store, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: listWatcher(c.client, c.client.CoreV1().Nodes(), ""),
		ObjectType:    &corev1.Node{},
		Handler:       cache.ResourceEventHandlerFuncs{AddFunc: func(any) { c.kick() }, DeleteFunc: func(any) { c.kick() }},
		Transform:     onlyName,
	})
	c.nodes = store
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { informer.RunWithContext(ctx) })
	wg.Go(func() { WatchServers(ctx, c.client, c.setServers) })
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		return nil
	}
	for {
		var retry <-chan time.Time
		if !c.reconcile(ctx) {
			retry = time.After(retryRemoval)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		case <-retry:
		}
	}
}

// onlyName spares the memory for what is not read here.
func onlyName(obj any) (any, error) {
	if n, ok := obj.(*corev1.Node); ok {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name, UID: n.UID, ResourceVersion: n.ResourceVersion}}, nil
	}
	return obj, nil
}

func (c *NodeController) kick() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *NodeController) setServers(servers map[string]Server, err error) {
	if err != nil {
		c.log.Warn("the registry of servers is damaged", "error", err)
	}
	c.mu.Lock()
	c.servers = servers
	c.mu.Unlock()
	c.kick()
}

// reconcile returns false if something is left to do that no event will tell of.
func (c *NodeController) reconcile(ctx context.Context) (done bool) {
	c.mu.Lock()
	servers := c.servers
	c.mu.Unlock()
	done = true
	for _, name := range slices.Sorted(maps.Keys(servers)) {
		_, exists, _ := c.nodes.GetByKey(name)
		var err error
		switch {
		case exists && !servers[name].Node:
			err = c.note(ctx, name)
		case !exists && servers[name].Node:
			err = c.remove(ctx, name)
		default:
			delete(c.refused, name)
		}
		if err != nil && ctx.Err() == nil {
			done = false
			c.tell(ctx, name, err)
		}
	}
	return done
}

// note writes into the registry that a server's Node has been seen.
func (c *NodeController) note(ctx context.Context, name string) error {
	maps := c.client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	cm, err := maps.Get(ctx, join.ConfigMapServers, metav1.GetOptions{})
	if err != nil {
		return err
	}
	text, ok := cm.Data[name]
	if !ok {
		return nil
	}
	entry := map[string]any{} // fields that this version does not know stay
	if err := json.Unmarshal([]byte(text), &entry); err != nil {
		return nil // its server writes it anew
	}
	entry["node"] = true
	b, err := json.Marshal(entry)
	if err != nil {
		return err
	}
	cm.Data[name] = string(b)
	_, err = maps.Update(ctx, cm, metav1.UpdateOptions{FieldManager: "kedge-join"})
	return err
}

// remove takes a server whose Node was deleted out of the cluster. What the informers said may be old: it looks again.
func (c *NodeController) remove(ctx context.Context, name string) error {
	servers, err := ListServers(ctx, c.client)
	if err != nil {
		return err
	}
	if !servers[name].Node {
		return nil // it has joined afresh, and its Node is still to come
	}
	if _, err := c.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		return err
	}
	err = c.members.Remove(ctx, name, false)
	if err != nil && !errors.Is(err, datastore.ErrNotMember) {
		return fmt.Errorf("the node of server %s was deleted, but its datastore member stays: %w", name, err)
	}
	if err := RemoveServer(ctx, c.client, name); err != nil {
		return err
	}
	delete(c.refused, name)
	c.log.Info("server removed, because its node was deleted", "name", name)
	recordEvent(ctx, c.client, c.log, aboutRegistry(), corev1.EventTypeNormal, "ServerRemoved", "server "+name+" was removed, because its node was deleted")
	return nil
}

// tell says why a removal was refused, once for each reason.
func (c *NodeController) tell(ctx context.Context, name string, err error) {
	if apierrors.IsConflict(err) || c.refused[name] == err.Error() {
		return
	}
	c.refused[name] = err.Error()
	c.log.Warn("server not removed, trying again", "name", name, "in", retryRemoval, "error", err)
	recordEvent(ctx, c.client, c.log, aboutRegistry(), corev1.EventTypeWarning, "ServerNotRemoved", err.Error())
}

func aboutRegistry() corev1.ObjectReference {
	return corev1.ObjectReference{APIVersion: "v1", Kind: "ConfigMap", Namespace: metav1.NamespaceSystem, Name: join.ConfigMapServers}
}
