// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/kedge-io/kedge/pkg/join"
)

// Server is a server's entry in the registry, the ConfigMap kube-system/kedge-servers: one key a server, its node's name.
type Server struct {
	// Address is the host:port at which other machines reach its API; empty while it has none to offer: an etcd-only server,
	// and one that is still joining.
	Address      string `json:"address"`
	PeerURL      string `json:"peerURL,omitempty"` // of its datastore member
	Etcd         bool   `json:"etcd"`
	ControlPlane bool   `json:"controlPlane"`
	Version      string `json:"version,omitempty"`
	// Node says that its Node object has been seen, so that a missing one was deleted and is not still to come. [NodeController]
	// sets it.
	Node bool `json:"node,omitempty"`
	// CAs says which CAs the server uses, and how far it is in a change of them: pki.PKI.RotationState.
	CAs string `json:"cas,omitempty"`
}

// maxServerEntry is far above what an entry needs.
const maxServerEntry = 4096

// ParseServer reads one entry. Fields that it does not know are a newer server's, and left out.
func ParseServer(text string) (Server, error) {
	var s Server
	if len(text) > maxServerEntry {
		return Server{}, fmt.Errorf("%d bytes are no entry of a server", len(text))
	}
	dec := json.NewDecoder(bytes.NewReader([]byte(text)))
	if err := dec.Decode(&s); err != nil {
		return Server{}, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Server{}, errors.New("more than one JSON value")
	}
	return s, s.validate()
}

func (s Server) validate() error {
	if s.Address != "" {
		host, port, err := net.SplitHostPort(s.Address)
		if err != nil {
			return fmt.Errorf("address: %w", err)
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || !isHost(host) {
			return fmt.Errorf("address %q is not of the form host:port", s.Address)
		}
	}
	if s.PeerURL != "" {
		return checkPeerURL(s.PeerURL)
	}
	return nil
}

// checkPeerURL accepts https://HOST:PORT and nothing else.
func checkPeerURL(text string) error {
	u, err := url.Parse(text)
	if err != nil {
		return fmt.Errorf("peer URL: %w", err)
	}
	port, err := strconv.ParseUint(u.Port(), 10, 16)
	if err != nil || port == 0 || !isHost(u.Hostname()) || text != "https://"+u.Host {
		return fmt.Errorf("peer URL %q is not of the form https://HOST:PORT", text)
	}
	return nil
}

func isHost(host string) bool {
	addr, err := netip.ParseAddr(host)
	return err == nil && !addr.IsUnspecified() && addr.Zone() == "" || err != nil && len(validation.IsDNS1123Subdomain(host)) == 0
}

// hosts are the addresses and names at which the server listens.
func (s Server) hosts() []string {
	var list []string
	if host, _, err := net.SplitHostPort(s.Address); err == nil {
		list = append(list, host)
	}
	if u, err := url.Parse(s.PeerURL); err == nil && u.Host != "" {
		list = append(list, u.Hostname())
	}
	return list
}

// ParseServers reads the registry. A damaged entry is left out and told by the error; the others are good all the same.
func ParseServers(cm *corev1.ConfigMap) (map[string]Server, error) {
	servers := map[string]Server{}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(cm.Data)) {
		s, err := ParseServer(cm.Data[name])
		if err == nil && len(validation.IsDNS1123Subdomain(name)) > 0 {
			err = errors.New("this is no node name")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("entry %q of ConfigMap %s: %w; the server writes it anew when it starts", name, join.ConfigMapServers, err))
			continue
		}
		servers[name] = s
	}
	return servers, errors.Join(errs...)
}

// ListServers reads the registry from the API. Without one it is empty.
func ListServers(ctx context.Context, client kubernetes.Interface) (map[string]Server, error) {
	cm, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, join.ConfigMapServers, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return map[string]Server{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the registry of servers: %w", err)
	}
	servers, _ := ParseServers(cm) // damage is told where the registry is watched
	return servers, nil
}

// PutServer writes a server's entry, by server-side apply: each server owns its key. An entry that says the same costs no write.
// What [NodeController] noted is kept.
func PutServer(ctx context.Context, client kubernetes.Interface, name string, s Server) error {
	servers, err := ListServers(ctx, client)
	if err != nil {
		return err
	}
	s.Node = servers[name].Node
	return applyServer(ctx, client, name, s)
}

func applyServer(ctx context.Context, client kubernetes.Interface, name string, s Server) error {
	if err := s.validate(); err != nil {
		return fmt.Errorf("register server %s: %w", name, err)
	}
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	cm := applycorev1.ConfigMap(join.ConfigMapServers, metav1.NamespaceSystem).WithData(map[string]string{name: string(text)})
	_, err = client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Apply(ctx, cm, metav1.ApplyOptions{FieldManager: "kedge-server-" + name, Force: true})
	if err != nil {
		return fmt.Errorf("register server %s: %w", name, err)
	}
	return nil
}

// RemoveServer removes a server's entry, whoever wrote it last. No entry is no error.
func RemoveServer(ctx context.Context, client kubernetes.Interface, name string) error {
	patch, err := json.Marshal(map[string]any{"data": map[string]any{name: nil}})
	if err != nil {
		return err
	}
	_, err = client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Patch(ctx, join.ConfigMapServers, types.MergePatchType, patch, metav1.PatchOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("remove server %s from the registry: %w", name, err)
	}
	return nil
}

// WatchSettings calls changed with the cluster's settings, JSON, at once and then whenever they change, until ctx ends. It is one watch
// of one object. Calls come one after the other.
func WatchSettings(ctx context.Context, client kubernetes.Interface, changed func(settings []byte)) {
	last := ""
	each := func(obj any) {
		if cm, ok := obj.(*corev1.ConfigMap); ok && cm.Data[join.KeyCluster] != last {
			last = cm.Data[join.KeyCluster]
			changed([]byte(last))
		}
	}
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: listWatcher(client, client.CoreV1().ConfigMaps(metav1.NamespaceSystem), join.ConfigMapCluster),
		ObjectType:    &corev1.ConfigMap{},
		Handler:       cache.ResourceEventHandlerFuncs{AddFunc: each, UpdateFunc: func(_, obj any) { each(obj) }},
	})
	informer.RunWithContext(ctx)
}

// WatchServers calls changed with the registry's content, at once and then whenever it changes, until ctx ends; the error tells
// of damaged entries. It is one watch of one object. Calls come one after the other.
func WatchServers(ctx context.Context, client kubernetes.Interface, changed func(map[string]Server, error)) {
	WatchRegistry(ctx, client, changed, func(*Rotation, error) {})
}

// WatchRegistry is WatchServers, and calls rotated for the change of the CAs that stands there, too: nil, and not at all until there is one.
func WatchRegistry(ctx context.Context, client kubernetes.Interface, changed func(map[string]Server, error), rotated func(*Rotation, error)) {
	var mu sync.Mutex
	var last map[string]Server // nil: nothing has been given yet
	var lastErr, lastRotation string
	give := func(servers map[string]Server, err error) {
		if last != nil && maps.Equal(servers, last) && text(err) == lastErr {
			return // only its metadata changed
		}
		last, lastErr = servers, text(err)
		changed(maps.Clone(servers), err)
	}
	each := func(obj any) {
		mu.Lock()
		defer mu.Unlock()
		cm, ok := obj.(*corev1.ConfigMap)
		if !ok {
			give(map[string]Server{}, nil)
			return
		}
		give(ParseServers(cm))
		if now := cm.Annotations[AnnotationRotation]; now != lastRotation {
			lastRotation = now
			rotated(ParseRotation(cm))
		}
	}
	store, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: listWatcher(client, client.CoreV1().ConfigMaps(metav1.NamespaceSystem), join.ConfigMapServers),
		ObjectType:    &corev1.ConfigMap{},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    each,
			UpdateFunc: func(_, obj any) { each(obj) },
			DeleteFunc: func(any) { each(nil) },
		},
	})
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { informer.RunWithContext(ctx) })
	// No event tells that there is no such ConfigMap.
	if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		mu.Lock()
		defer mu.Unlock()
		if last == nil && len(store.ListKeys()) == 0 {
			give(map[string]Server{}, nil)
		}
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
