// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/plugin/kubernetes"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	clientset "k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/record"
)

const (
	apiTimeout    = 5 * time.Second
	apiRetryFirst = 200 * time.Millisecond
	apiRetryMax   = time.Second
	syncPoll      = 50 * time.Millisecond
	// maxEventText is the API's limit for an event's note.
	maxEventText = 1024
)

// runCluster connects to the API, feeds the cluster's names to the server and follows coredns-custom until ctx ends.
func (s *Server) runCluster(ctx context.Context) {
	config, client := s.waitForAPI(ctx)
	if client == nil {
		return
	}
	k, err := newKubernetes(ctx, s.cfg.ClusterDomain, config)
	if err != nil {
		s.problem(problemCluster, "names of the cluster cannot be served", err)
		return
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(k.APIConn.Run) // until Stop
	defer k.APIConn.Stop()
	s.cluster.Store(k)
	wg.Go(func() { s.watchCustom(ctx, client) })
	wg.Go(func() { s.reportRefused(ctx, client) })

	s.setProblem(problemCluster, "the Kubernetes API answers, fetching services and endpoints")
	start := time.Now()
	for !k.Ready() {
		select {
		case <-ctx.Done():
			return
		case <-time.After(syncPoll):
		}
	}
	s.setProblem(problemCluster, "")
	s.log.Info("names of the cluster are served", "fetched_in", time.Since(start).Round(time.Millisecond).String())
	<-ctx.Done()
}

// waitForAPI returns a client once the kubeconfig is there and the API lets this node list what the kubernetes plugin lists. Informers
// that start earlier run into client-go's back-off (up to 30 s). Returns nil if ctx ends first.
func (s *Server) waitForAPI(ctx context.Context) (*rest.Config, clientset.Interface) {
	for delay := apiRetryFirst; ; delay = min(2*delay, apiRetryMax) {
		config, client, err := s.connect(ctx)
		if err == nil {
			return config, client
		}
		if ctx.Err() != nil {
			return nil, nil
		}
		if s.setProblem(problemCluster, "waiting for the Kubernetes API: "+err.Error()) {
			s.log.Debug("waiting for the Kubernetes API", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(delay):
		}
	}
}

func (s *Server) connect(ctx context.Context) (*rest.Config, clientset.Interface, error) {
	config, err := clientcmd.BuildConfigFromFlags("", s.cfg.Kubeconfig)
	if err != nil {
		return nil, nil, err
	}
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	config.UserAgent = "kedge-dns"
	client, err := clientset.NewForConfig(config)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	one := metav1.ListOptions{Limit: 1}
	if _, err := client.CoreV1().Namespaces().List(ctx, one); err != nil {
		return nil, nil, err
	}
	if _, err := client.DiscoveryV1().EndpointSlices(metav1.NamespaceAll).List(ctx, one); err != nil {
		return nil, nil, err
	}
	return config, client, nil
}

// newKubernetes makes an instance of CoreDNS's kubernetes plugin, set up the way its own setup does it, without the replacement of klog's
// logger and without waiting.
func newKubernetes(ctx context.Context, domain string, config *rest.Config) (*kubernetes.Kubernetes, error) {
	// ParseStanza wants a Corefile's controller; this constructor is the exported one.
	c := caddy.NewTestController("dns", fmt.Sprintf(`kubernetes %s in-addr.arpa ip6.arpa {
		pods insecure
		fallthrough in-addr.arpa ip6.arpa
		ttl 30
	}`, domain))
	c.Next()
	k, err := kubernetes.ParseStanza(c)
	if err != nil {
		return nil, err
	}
	k.ClientConfig = fixedConfig{config: config}
	if _, _, err := k.InitKubeCache(ctx); err != nil {
		return nil, err
	}
	return k, nil
}

// fixedConfig gives the kubernetes plugin a finished client configuration; it would use JSON otherwise.
type fixedConfig struct {
	unused
	config *rest.Config
}

type unused interface{ clientcmd.ClientConfig }

func (f fixedConfig) ClientConfig() (*rest.Config, error) { return rest.CopyConfig(f.config), nil }

// watchCustom hands each state of the ConfigMap coredns-custom to serve until ctx ends.
func (s *Server) watchCustom(ctx context.Context, client clientset.Interface) {
	give := func(obj any) {
		if cm, ok := obj.(*corev1.ConfigMap); ok {
			c := newCustomConfig(cm.Data, cm.BinaryData)
			c.uid = cm.UID
			s.giveCustom(ctx, c)
		}
	}
	only := fields.OneTermEqualSelector(metav1.ObjectNameField, CustomName)
	// At a cluster's first start nodes may read it a moment later than what waitForAPI asks for. An informer would log that and back off.
	if wait.PollUntilContextCancel(ctx, apiRetryMax, true, func(ctx context.Context) (bool, error) {
		_, err := client.CoreV1().ConfigMaps(CustomNamespace).List(ctx, metav1.ListOptions{FieldSelector: only.String()})
		return err == nil, nil
	}) != nil {
		return
	}
	store, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.NewListWatchFromClient(client.CoreV1().RESTClient(), "configmaps", CustomNamespace, only),
		ObjectType:    &corev1.ConfigMap{},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    give,
			UpdateFunc: func(_, obj any) { give(obj) },
			DeleteFunc: func(any) { s.giveCustom(ctx, customConfig{}) },
		},
	})
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { informer.RunWithContext(ctx) })
	// No event tells that there is no such ConfigMap.
	if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) && len(store.ListKeys()) == 0 {
		s.giveCustom(ctx, customConfig{})
	}
}

// giveCustom waits until serve has taken c, so that states are taken in order.
func (s *Server) giveCustom(ctx context.Context, c customConfig) {
	select {
	case s.fromAPI <- c:
	case <-ctx.Done():
	}
}

// reportRefused writes an Event to the ConfigMap when it is refused.
func (s *Server) reportRefused(ctx context.Context, client clientset.Interface) {
	events := record.NewBroadcaster(record.WithContext(ctx))
	defer events.Shutdown()
	events.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: client.CoreV1().Events(CustomNamespace)})
	recorder := events.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "kedge-dns", Host: s.cfg.NodeName})
	for {
		select {
		case <-ctx.Done():
			return
		case r := <-s.refusals:
			ref := &corev1.ObjectReference{APIVersion: "v1", Kind: "ConfigMap", Namespace: CustomNamespace, Name: CustomName, UID: r.configMap}
			text := fmt.Sprintf("node %s goes on with the last good DNS configuration: %v", s.cfg.NodeName, r.reason)
			recorder.Event(ref, corev1.EventTypeWarning, "DNSConfigRefused", text[:min(len(text), maxEventText)])
		}
	}
}
