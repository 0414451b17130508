// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// The fields of a lease.
const (
	keyHolder  = "holder"
	keyRenewed = "renewed"
)

// Times of the leases: another node takes over leaseDuration after it saw the last renewal; the holder gives up before.
const (
	leaseDuration = 5 * time.Second
	renewDeadline = 3500 * time.Millisecond
	renewInterval = time.Second
	// leaseRequest bounds one request, so that one which hangs in a server that died leaves time for another one.
	leaseRequest = time.Second
	// spread keeps many nodes from asking for a free lease in the same moment.
	spread = 200 * time.Millisecond
)

// election competes for one lease. Whether it holds it is judged by when the last renewal that succeeded was sent, and, if it keeps, by
// whether another node has appeared as the holder.
//
// The lease is kept in a ConfigMap: the API server's admission lets nodes write no Lease but their own. And it is not client-go's
// election, which reads every so often, on every node, and sees the holder's end up to twice that later: here nodes watch, and
// know of every renewal at once.
type election struct {
	log      *slog.Logger
	identity string
	changed  func() // called when it holds the lease from now on or does not any more
	create   bool   // the lease if there is none
	// keep holds on to a lease that cannot be renewed until somebody else is seen with it: as long as no API server takes renewals, nobody
	// can take it over. Who keeps has to look out for others, and yield.
	keep bool

	mu      sync.Mutex
	renewed time.Time // when the last successful renewal was sent; zero: not held
	lease   *corev1.ConfigMap
	seen    time.Time // when lease became known
	away    bool      // another's lease was asked for and no API server answered
}

// remaining is how long the lease is still held without another renewal; 0: it is not held. overdue says that it is only kept: another
// node may hold it by now.
func (e *election) remaining() (left time.Duration, overdue bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch since := time.Since(e.renewed); {
	case e.renewed.IsZero():
		return 0, false
	case since <= renewDeadline:
		return leaseDuration - since, false
	case e.keep:
		return leaseDuration, true
	}
	return 0, false
}

// yield gives up a lease that another node was seen with, until it is renewed.
func (e *election) yield() { e.set(time.Time{}) }

func (e *election) set(renewed time.Time) {
	e.mu.Lock()
	news := e.renewed.IsZero() != renewed.IsZero()
	e.renewed = renewed
	e.mu.Unlock()
	if news {
		e.changed()
	}
}

// observe takes note of a state of the lease, unless a later one is known: the watch is behind the holder's own writes.
func (e *election) observe(l *corev1.ConfigMap) {
	e.mu.Lock()
	if e.lease != nil {
		if order, err := resourceversion.CompareResourceVersion(e.lease.ResourceVersion, l.ResourceVersion); err == nil && order >= 0 {
			e.mu.Unlock()
			return
		}
	}
	e.lease, e.seen = l, time.Now()
	lost := holder(l) != e.identity
	e.mu.Unlock()
	if lost {
		e.set(time.Time{})
	}
}

func holder(l *corev1.ConfigMap) string { return l.Data[keyHolder] }

// wait is how long nothing is to be done, unless the lease changes.
func (e *election) wait() time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.lease == nil, e.away:
		return renewInterval
	case holder(e.lease) == e.identity:
		return time.Until(e.renewed.Add(renewInterval))
	case holder(e.lease) == "":
		return rand.N(spread)
	}
	return time.Until(e.seen.Add(leaseDuration)) + rand.N(spread)
}

// run competes until ctx ends, and gives the lease back then, after changed has returned.
func (e *election) run(ctx context.Context, client kubernetes.Interface, name string) {
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(metav1.NamespaceSystem),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, name).String()
		}))
	watching, cancel := context.WithCancel(ctx)
	defer factory.Shutdown()
	defer cancel()
	news := make(chan struct{}, 1)
	observe := func(obj any) {
		if l, ok := obj.(*corev1.ConfigMap); ok && l.Name == name {
			e.observe(l)
			select {
			case news <- struct{}{}:
			default:
			}
		}
	}
	_, err := factory.Core().V1().ConfigMaps().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: observe, UpdateFunc: func(_, obj any) { observe(obj) },
	})
	if err != nil {
		e.log.Error("floating addresses are not announced from here", "lease", name, "error", err)
		return
	}
	factory.Start(watching.Done())
	c := candidate{election: e, client: client, name: name}
	for {
		select {
		case <-ctx.Done():
			c.giveBack(context.WithoutCancel(ctx))
			return
		case <-news: // wait anew
			continue
		case <-time.After(e.wait()):
		}
		if err := c.attempt(ctx); err != nil && ctx.Err() == nil {
			e.log.Debug("lease of floating addresses", "lease", name, "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(renewInterval / 2):
			}
		}
	}
}

// candidate writes a lease.
type candidate struct {
	*election
	client kubernetes.Interface
	name   string
}

// attempt renews the lease, or takes it. The server refuses it if the lease is another one than was seen.
func (c *candidate) attempt(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, leaseRequest)
	defer cancel()
	leases := c.client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	c.mu.Lock()
	have, away := c.lease, c.away
	c.mu.Unlock()
	if have == nil || away {
		got, err := leases.Get(ctx, c.name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) && c.create {
			got, err = leases.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: c.name}}, metav1.CreateOptions{})
		}
		if err == nil {
			c.observe(got)
			if away {
				c.answered()
			}
		}
		return err
	}
	l := have.DeepCopy()
	sent := time.Now()
	l.Data = map[string]string{keyHolder: c.identity, keyRenewed: sent.UTC().Format(time.RFC3339Nano)}
	got, err := leases.Update(ctx, l, metav1.UpdateOptions{})
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		c.forget(have)
		return err
	}
	if err != nil {
		c.unanswered()
		return err
	}
	c.observe(got)
	c.set(sent)
	return nil
}

// unanswered notes that what kept this node from taking a lease may have kept the holder from renewing it.
func (c *candidate) unanswered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.away = c.lease != nil && holder(c.lease) != c.identity
}

// answered gives the holder of a lease its time anew after that.
func (c *candidate) answered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.away, c.seen = false, time.Now()
}

// forget makes the next attempt read the lease, unless the watch was faster.
func (c *candidate) forget(l *corev1.ConfigMap) {
	c.mu.Lock()
	if c.lease == l {
		c.lease = nil
	}
	c.mu.Unlock()
}

func (c *candidate) giveBack(ctx context.Context) {
	c.mu.Lock()
	l, held := c.lease, !c.renewed.IsZero()
	c.mu.Unlock()
	if c.set(time.Time{}); !held || l == nil || holder(l) != c.identity {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, leaseRequest)
	defer cancel()
	l = l.DeepCopy()
	l.Data[keyHolder] = ""
	if _, err := c.client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Update(ctx, l, metav1.UpdateOptions{}); err != nil {
		c.log.Debug("the lease could not be given back", "lease", c.name, "error", err)
	}
}
