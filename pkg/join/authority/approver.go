// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"sync"
	"time"

	capi "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/kubernetes/pkg/apis/certificates"

	"github.com/kedge-io/kedge/pkg/join"
)

// ApproverConfig is what an [Approver] needs.
type ApproverConfig struct {
	Client kubernetes.Interface
	// Networks of pods and services hold no address of a machine.
	Networks []netip.Prefix
	// ReservedNames are no names of nodes: the DNS names of the API server's own certificate, but the servers' node names. A
	// kubelet's certificate of that name would be the API server's.
	ReservedNames []string
	Logger        *slog.Logger
}

// Approver decides on the certificate signing requests of machines that join, and of kubelets. It leaves others alone, and never
// approves what it could not check: then it tries again. One is to run in a cluster at a time.
//
// The controller manager's own approver runs beside it. It approves what the requester is allowed to by RBAC (subresources nodeclient
// and selfnodeclient), and no rule says so about tokens or nodes.
type Approver struct {
	cfg      ApproverConfig
	log      *slog.Logger
	reserved map[string]bool
	queue    workqueue.TypedRateLimitingInterface[string]
	store    cache.Store

	// Of the one worker.
	silence  *silence
	admitted admitted
	waiting  map[string]time.Time // by name: since when requests wait that cannot be decided on yet
	told     map[string]time.Time // denials that the log has
}

// NewApprover makes one to be run once.
func NewApprover(cfg ApproverConfig) *Approver {
	a := &Approver{
		cfg:      cfg,
		log:      cfg.Logger.With("component", component),
		reserved: map[string]bool{},
		queue: workqueue.NewTypedRateLimitingQueue(
			workqueue.NewTypedItemExponentialFailureRateLimiter[string](200*time.Millisecond, 10*time.Second)),
		silence:  newSilence(cfg.Client),
		admitted: admitted{},
		waiting:  map[string]time.Time{},
		told:     map[string]time.Time{},
	}
	for _, name := range append([]string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"}, cfg.ReservedNames...) {
		a.reserved[name] = true
	}
	return a
}

// Run blocks until ctx ends.
func (a *Approver) Run(ctx context.Context) error {
	enqueue := func(obj any) {
		if csr, ok := obj.(*capi.CertificateSigningRequest); ok && undecided(csr) {
			a.queue.Add(csr.Name)
		}
	}
	store, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: listWatcher(a.cfg.Client, a.cfg.Client.CertificatesV1().CertificateSigningRequests(), ""),
		ObjectType:    &capi.CertificateSigningRequest{},
		Handler:       cache.ResourceEventHandlerFuncs{AddFunc: enqueue, UpdateFunc: func(_, obj any) { enqueue(obj) }},
	})
	a.store = store
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { informer.RunWithContext(ctx) })
	wg.Go(func() { <-ctx.Done(); a.queue.ShutDown() })
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		return nil
	}
	a.recall()
	for a.next(ctx) {
	}
	return nil
}

// recall learns from the requests themselves what an earlier leader has admitted.
func (a *Approver) recall() {
	for _, obj := range a.store.List() {
		csr, ok := obj.(*capi.CertificateSigningRequest)
		if !ok {
			continue
		}
		for _, c := range csr.Status.Conditions {
			if c.Type != capi.CertificateApproved {
				continue
			}
			if r, d := parseRequest(csr); r != nil && d == nil {
				r.sign = unknownSign
				a.admit(r, csr.Name, c.LastUpdateTime.Time)
			}
		}
	}
}

func (a *Approver) admit(r *request, requestName string, at time.Time) {
	if r.kind == nodeClient || r.kind == serverClient {
		a.admitted.add(r, requestName, at, r.sign)
	}
}

func (a *Approver) exists(requestName string) bool {
	_, ok, _ := a.store.GetByKey(requestName)
	return ok
}

// next works on one request. There is one worker, so that two requests for one name are decided on one after the other.
func (a *Approver) next(ctx context.Context) bool {
	name, quit := a.queue.Get()
	if quit {
		return false
	}
	defer a.queue.Done(name)
	obj, _, _ := a.store.GetByKey(name)
	csr, ok := obj.(*capi.CertificateSigningRequest)
	var err error
	if ok {
		err = a.handle(ctx, csr)
	}
	if err == nil {
		a.queue.Forget(name)
		delete(a.waiting, name)
		return true
	}
	if !errors.As(err, new(*notYet)) && ctx.Err() == nil {
		a.log.Warn("certificate signing request cannot be decided on, trying again", "request", name, "requester", csr.Spec.Username, "error", err)
	}
	a.queue.AddRateLimited(name)
	return true
}

// notYet is the error of a request that can be decided on later; Reason is what to say if later never comes.
type notYet struct{ *denial }

// maxWait is how long a request may wait for what it depends on.
const maxWait = 2 * time.Minute

func (a *Approver) handle(ctx context.Context, csr *capi.CertificateSigningRequest) error {
	if !undecided(csr) {
		return nil
	}
	r, d := parseRequest(csr)
	if r == nil && d == nil {
		return nil
	}
	var done func(context.Context)
	if d == nil {
		var err error
		if done, err = a.decide(ctx, r); err != nil {
			if d = a.denialFor(csr, err); d == nil {
				return err
			}
		}
	}
	if d == nil {
		a.admit(r, csr.Name, time.Now()) // also when the answer gets lost: it may have been written
	}
	if err := a.answer(ctx, csr, r, d); err != nil {
		return err
	}
	if done != nil {
		done(ctx)
	}
	return nil
}

// denialFor returns nil if a decision failed for now and not for good.
func (a *Approver) denialFor(csr *capi.CertificateSigningRequest, err error) *denial {
	var d *denial
	var later *notYet
	switch {
	case errors.As(err, &later):
		since, ok := a.waiting[csr.Name]
		if !ok {
			a.waiting[csr.Name] = time.Now()
			return nil
		}
		if time.Since(since) < maxWait {
			return nil
		}
		return later.denial
	case errors.As(err, &d):
		return d
	}
	return nil
}

// decide returns nil to approve, a *denial, a *notYet, or another error if it could not find out. What is left to do after an
// approval is in done.
func (a *Approver) decide(ctx context.Context, r *request) (done func(context.Context), err error) {
	switch r.kind {
	case nodeRotation:
		return nil, nil
	case nodeServing:
		return nil, a.checkServing(ctx, r)
	}
	return a.checkName(ctx, r)
}

// checkName decides whether a machine may have the name that it asks for.
func (a *Approver) checkName(ctx context.Context, r *request) (done func(context.Context), err error) {
	if a.reserved[r.name] {
		return nil, deny(join.ReasonNameInUse, "%q is a name of the API server, and no machine's; give this one another with --node-name", r.name)
	}
	servers, err := ListServers(ctx, a.cfg.Client)
	if err != nil {
		return nil, err
	}
	node, err := a.cfg.Client.CoreV1().Nodes().Get(ctx, r.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		node = nil
	} else if err != nil {
		return nil, err
	}
	if _, registered := servers[r.name]; !r.server && (registered || isServer(node)) {
		return nil, deny(join.ReasonWrongRole, "%s is the name of a server, and this token is for agents; give this machine another name (--node-name), "+
			"join it as a server (kedge token create --role server), or, if the server is gone for good, remove it: kedge node remove %s", r.name, r.name)
	}
	var p pulse
	if node != nil {
		if p, err = a.silence.of(ctx, node); err != nil {
			return nil, err
		}
		r.sign = p.sign
		if !p.silent {
			return nil, deny(join.ReasonNameSeenRecently, "a node %s exists and may be alive: %s; if it was this machine before, wait: it may have the name again "+
				"after %v without a sign of the old one; otherwise give this machine another name (--node-name), or remove the node: kedge node remove %s",
				r.name, p.describe(), p.wait.Round(time.Second), r.name)
		}
	}
	if other, ok := a.admitted.before(r, p.sign, a.exists); ok {
		return nil, deny(join.ReasonNameSeenRecently, "another machine was admitted under the name %s, %s; give this one another name (--node-name); "+
			"if it was this one, wait: it may have the name again %v after that", r.name, ago(other.at, time.Now()), hold)
	}
	if node == nil || r.kind != nodeClient {
		return nil, nil
	}
	return func(ctx context.Context) {
		about := corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}
		recordEvent(ctx, a.cfg.Client, a.log, about, corev1.EventTypeNormal, "Rejoined",
			"a machine with a valid token joins under this name again; the one before: "+p.describe())
	}, nil
}

func isServer(node *corev1.Node) bool {
	if node == nil {
		return false
	}
	_, controlPlane := node.Labels["node-role.kubernetes.io/control-plane"]
	_, etcd := node.Labels["node-role.kubernetes.io/etcd"]
	return controlPlane || etcd
}

// answer writes the decision into the request: approved if d is nil.
func (a *Approver) answer(ctx context.Context, csr *capi.CertificateSigningRequest, r *request, d *denial) error {
	log := a.log.With("request", csr.Name, "signer", csr.Spec.SignerName, "requester", csr.Spec.Username)
	c := capi.CertificateSigningRequestCondition{Status: corev1.ConditionTrue, LastUpdateTime: metav1.Now()}
	if d == nil {
		c.Type, c.Reason, c.Message = capi.CertificateApproved, "ApprovedByKedge", "a valid request for the "+string(r.kind)+" certificate of "+r.name
	} else {
		c.Type, c.Reason, c.Message = capi.CertificateDenied, d.reason, d.message
	}
	csr = csr.DeepCopy()
	csr.Status.Conditions = append(csr.Status.Conditions, c)
	if _, err := a.cfg.Client.CertificatesV1().CertificateSigningRequests().UpdateApproval(ctx, csr.Name, csr, metav1.UpdateOptions{}); err != nil {
		return err
	}
	switch {
	case d == nil:
		log.Info("certificate approved", "for", r.kind, "name", r.name)
	case a.isNews(d.reason + " " + csr.Spec.Username + " " + claimedName(csr)):
		log.Warn("certificate denied", "reason", d.reason, "message", d.message)
	default:
		log.Debug("certificate denied", "reason", d.reason, "message", d.message)
	}
	return nil
}

// toldEvery is how often the log says again that a machine was denied a certificate: it tries again every few seconds.
const toldEvery = 10 * time.Minute

// claimedName is the common name in a request, for the log.
func claimedName(csr *capi.CertificateSigningRequest) string {
	cert, err := certificates.ParseCSR(csr.Spec.Request)
	if err != nil {
		return ""
	}
	return cert.Subject.CommonName
}

func (a *Approver) isNews(what string) bool {
	maps.DeleteFunc(a.told, func(_ string, at time.Time) bool { return time.Since(at) >= toldEvery })
	if _, ok := a.told[what]; ok {
		return false
	}
	a.told[what] = time.Now()
	return true
}

func undecided(csr *capi.CertificateSigningRequest) bool {
	for _, c := range csr.Status.Conditions {
		if c.Type == capi.CertificateApproved || c.Type == capi.CertificateDenied || c.Type == capi.CertificateFailed {
			return false
		}
	}
	return len(csr.Status.Certificate) == 0
}
