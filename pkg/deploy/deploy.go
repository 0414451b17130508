// SPDX-License-Identifier: Apache-2.0

// Package deploy brings the manifests directory of the servers into the cluster. Each server keeps its own directory and the cluster's records
// of the files the same (Sync); the leader applies what the records say, and removes what is in no file any more (Apply). See
// docs/decisions/manifests.md.
package deploy

import (
	"context"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	eventrecord "k8s.io/client-go/tools/record"
)

// fieldManager owns what the files set in objects.
const fieldManager = "kedge-deploy"

// annotationManifest is on every object that a file made, with the file's name. What has it not was there before, and is never deleted.
const annotationManifest = "kedge.io/manifest"

// Config of a [Deployer].
type Config struct {
	Client kubernetes.Interface
	// REST is for clients of kinds that are not known beforehand.
	REST *rest.Config
	// Dir has the manifests of this server. It is made if it is not there.
	Dir string
	// NodeName of this server, for people.
	NodeName string
	Log      *slog.Logger
	// Report is told what is worth knowing about this server's directory and, where the leadership is, about the files; empty: nothing is.
	Report func(remark string)
}

// Dir is where a server with that data directory has its manifests.
func Dir(dataDir string) string { return filepath.Join(dataDir, "manifests") }

// Deployer works for one server.
type Deployer struct {
	cfg    Config
	log    *slog.Logger
	lister corelisters.SecretNamespaceLister
	synced cache.InformerSynced
	start  func(ctx context.Context)
	events eventrecord.EventRecorder

	mu      sync.Mutex
	signals []chan struct{}
	remarks [2]string // of Sync and Apply
}

// New makes a deployer that does nothing yet.
func New(cfg Config) *Deployer {
	d := &Deployer{cfg: cfg, log: cfg.Log.With("component", "manifests")}
	factory := informers.NewSharedInformerFactoryWithOptions(cfg.Client, 0, informers.WithNamespace(recordNamespace),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector("type", recordType).String()
		}),
		informers.WithTransform(func(obj any) (any, error) {
			if s, ok := obj.(*corev1.Secret); ok {
				s.ManagedFields = nil
			}
			return obj, nil
		}))
	secrets := factory.Core().V1().Secrets()
	d.lister, d.synced = secrets.Lister().Secrets(recordNamespace), secrets.Informer().HasSynced
	d.start = func(ctx context.Context) {
		broadcaster := eventrecord.NewBroadcaster(eventrecord.WithContext(ctx))
		broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: cfg.Client.CoreV1().Events(metav1.NamespaceAll)})
		d.events = broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: fieldManager, Host: cfg.NodeName})
		// Without an error it is never removed: the informer ends with ctx.
		_, err := secrets.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { d.signal() }, UpdateFunc: func(any, any) { d.signal() }, DeleteFunc: func(any) { d.signal() },
		})
		if err != nil {
			d.log.Error("records of manifests are not watched", "error", err)
		}
		factory.Start(ctx.Done())
		<-ctx.Done()
		broadcaster.Shutdown()
		factory.Shutdown()
	}
	return d
}

// Run reads the cluster's records until ctx ends. Sync and Apply wait for it.
func (d *Deployer) Run(ctx context.Context) { d.start(ctx) }

// listen gives a channel that has something in it when records may have changed.
func (d *Deployer) listen() (changed <-chan struct{}, stop func()) {
	c := make(chan struct{}, 1)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.signals = append(d.signals, c)
	return c, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.signals = slices.DeleteFunc(d.signals, func(o chan struct{}) bool { return o == c })
	}
}

func (d *Deployer) signal() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.signals {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// ready waits for the records; false: ctx ended.
func (d *Deployer) ready(ctx context.Context) bool {
	return cache.WaitForCacheSync(ctx.Done(), d.synced)
}

// records of all files, by the files' names.
func (d *Deployer) records() map[string]record {
	secrets, err := d.lister.List(labels.Everything())
	if err != nil {
		return nil // the lister of a cache has no errors
	}
	all := map[string]record{}
	for _, s := range secrets {
		r, err := parseRecord(s)
		if err != nil {
			d.log.Error("damaged record", "error", err)
			continue
		}
		all[r.file] = r
	}
	return all
}

// The two that have something to say.
const (
	ofSync = iota
	ofApply
)

func (d *Deployer) report(who int, remark string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.remarks[who] == remark {
		return
	}
	d.remarks[who] = remark
	d.cfg.Report(strings.Join(slices.DeleteFunc(slices.Clone(d.remarks[:]), func(s string) bool { return s == "" }), "; "))
}

// event tells the owner of the cluster about a file.
func (d *Deployer) event(r record, kind, reason, message string) {
	const limit = 1000 // the API refuses more than 1024 bytes
	if len(message) > limit {
		message = message[:limit] + " …"
	}
	d.events.Event(r.secret, kind, reason, message)
}

// retry is a pause that grows from try to try.
type retry struct{ tries int }

const (
	firstRetry = 500 * time.Millisecond
	lastRetry  = 5 * time.Minute
)

func (r *retry) next() time.Duration {
	r.tries++
	return min(firstRetry<<min(r.tries-1, 16), lastRetry)
}
