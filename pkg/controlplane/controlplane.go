// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/client-go/informers"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/component-base/configz"
	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/klog/v2"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	apiserveroptions "k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	controllermanageroptions "k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	scheduleroptions "k8s.io/kubernetes/cmd/kube-scheduler/app/options"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/deploy"
	"github.com/kedge-io/kedge/pkg/encryption"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
	"github.com/kedge-io/kedge/pkg/tunnel"
)

// plane holds the options of all components: the feature gates of the process are closed and set once, before any of them runs.
type plane struct {
	cfg               Config
	apiserver         *apiserveroptions.ServerRunOptions
	controllerManager *controllermanageroptions.KubeControllerManagerOptions
	scheduler         *scheduleroptions.Options

	child      *supervise.Child
	log        *slog.Logger
	client     kubernetes.Interface
	members    *datastore.Members
	store      *clientv3.Client
	encryption *encryption.Keeper
	leadership *leadership
	wanted     <-chan struct{}
	alone      atomic.Bool // at the start of this process
	tunnel     *tunnel.Server
	nodes      coreinformers.NodeInformer
	deployer   *deploy.Deployer
	manifests  manifestsReport

	settings    atomic.Pointer[config.Cluster] // the cluster's; nil: those of cfg
	poolChanged chan struct{}
	vipChanged  chan struct{}
}

// CheckArgs refuses flags that the components do not have or do not accept, before anything is started.
func CheckArgs(cfg Config) error {
	_, err := newPlane(cfg)
	return err
}

func newPlane(cfg Config) (*plane, error) {
	p := &plane{cfg: cfg, poolChanged: make(chan struct{}, 1), vipChanged: make(chan struct{}, 1), apiserver: apiserveroptions.NewServerRunOptions(), scheduler: scheduleroptions.NewOptions()}
	var err error
	if p.controllerManager, err = controllermanageroptions.NewKubeControllerManagerOptions(); err != nil {
		return nil, fmt.Errorf("controller manager: %w", err)
	}
	return p, errors.Join(
		cfg.checkHardening(),
		parse("kube-apiserver-arg", p.apiserver.Flags(), cfg.apiserverFlags()),
		parse("kube-controller-manager-arg", p.controllerManagerFlagSets(), cfg.controllerManagerFlags()),
		parse("kube-scheduler-arg", *p.scheduler.Flags, cfg.schedulerFlags()),
	)
}

func (p *plane) controllerManagerFlagSets() cliflag.NamedFlagSets {
	return p.controllerManager.Flags(controllermanager.KnownControllers(), controllermanager.ControllersDisabledByDefault(), controllermanager.ControllerAliases())
}

// Run blocks until ctx ends or a component fails; the supervisor then starts the process again.
func Run(ctx context.Context, cfg Config, child *supervise.Child, log *slog.Logger) error {
	p, err := newPlane(cfg)
	if err != nil {
		return err
	}
	p.child, p.log = child, log
	if err := cfg.writeHardening(); err != nil {
		return err
	}
	// What the apiserver's and the controller manager's commands do before they run: gates and versions of the whole
	// process, and no log lines about the API's own requests to itself.
	if err := p.apiserver.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return fmt.Errorf("feature gates: %w", err)
	}
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	legacyregistry.RawMustRegister(pki.Collector(cfg.Certificates))

	clientConfig, err := clientcmd.BuildConfigFromFlags("", cfg.Files.Kubeconfig)
	if err != nil {
		return err
	}
	if p.client, err = kubernetes.NewForConfig(clientConfig); err != nil {
		return err
	}
	if err := p.openDatastore(); err != nil {
		return err
	}
	if p.members != nil {
		defer p.members.Close() //nolint:errcheck // nothing is written through it
	}
	if err := p.openKeyring(); err != nil {
		return err
	}
	defer p.store.Close() //nolint:errcheck // what is written through it is waited for
	informers := informers.NewSharedInformerFactory(p.client, 0)
	p.nodes = informers.Core().V1().Nodes()
	p.nodes.Informer()
	defer informers.Shutdown()
	p.manifests.child = child
	p.deployer = deploy.New(deploy.Config{Client: p.client, REST: clientConfig, Dir: cfg.ManifestsDir, NodeName: cfg.NodeName, Log: log, Report: p.manifests.remark})
	p.leadership, p.wanted = newLeadership(leadership{client: p.client, node: cfg.NodeName, log: log.With("component", "leadership"),
		loops: func(ctx context.Context) error { return p.loops(ctx, clientConfig) }, follows: p.follows})

	group, ctx := errgroup.WithContext(ctx)
	if err := p.serveEgress(ctx, group); err != nil {
		return err
	}
	group.Go(func() error {
		child.Report(ComponentAPIServer, supervise.Waiting, "for the datastore")
		if err := supervise.Poll(ctx, func() error { return p.datastoreAnswers(ctx) }); err != nil {
			return nil // the process is stopping
		}
		if err := p.prepareEncryption(ctx); err != nil {
			return nil
		}
		p.dropFormerLeader(ctx)
		child.Report(ComponentAPIServer, supervise.Running, "")
		if err := p.runAPIServer(component(ctx, ComponentAPIServer)); err != nil {
			return fmt.Errorf("apiserver: %w", err)
		}
		return ended(ctx, ComponentAPIServer)
	})
	group.Go(func() error { return p.afterAPIServer(ctx, group, informers) })
	return group.Wait()
}

// afterAPIServer starts everything that is a client of the API as soon as it answers.
func (p *plane) afterAPIServer(ctx context.Context, group *errgroup.Group, informers informers.SharedInformerFactory) error {
	p.reportLoops(supervise.Waiting, "for the API")
	if err := supervise.Poll(ctx, func() error { return healthy(ctx, p.client, "/livez/ping") }); err != nil {
		return nil // the process is stopping
	}
	informers.Start(ctx.Done())
	group.Go(func() error { p.keepTokens(ctx); return nil })
	group.Go(func() error { p.dropDead(ctx); return nil })
	group.Go(func() error { p.followSettings(ctx); return nil })
	group.Go(func() error { p.runAPIVIP(ctx); return nil })
	group.Go(func() error {
		alone, err := p.isAlone(ctx)
		if err != nil {
			return nil // the process is stopping
		}
		p.alone.Store(alone)
		return p.leadership.run(ctx, alone, p.wanted)
	})
	if err := supervise.Poll(ctx, func() error { return healthy(ctx, p.client, "/healthz") }); err != nil {
		return nil
	}
	p.child.Report(ComponentAPIServer, supervise.Ready, "")
	group.Go(func() error { p.deployer.Run(ctx); return nil })
	group.Go(func() error { return p.deployer.Sync(ctx) })
	return p.watchHealth(ctx)
}

// isAlone says whether this is the only server of the cluster. Every other one has been entered in the registry before it could
// do anything (see BeforeJoin in joinAPI).
func (p *plane) isAlone(ctx context.Context) (bool, error) {
	if !p.cfg.Datastore.Own {
		return false, nil // others may use the same etcd without asking this server
	}
	alone := false
	err := supervise.Poll(ctx, func() error {
		servers, err := authority.ListServers(ctx, p.client)
		delete(servers, p.cfg.NodeName)
		alone = len(servers) == 0
		return err
	})
	return alone, err
}

// follows reports the loops of a server that waits: its part is to be there.
func (p *plane) follows(leader string) {
	p.reportLoops(supervise.Ready, "standby, "+leader+" leads")
}

func (p *plane) reportLoops(state supervise.State, reason string) {
	p.child.Report(ComponentScheduler, state, reason)
	p.child.Report(ComponentControllerManager, state, reason)
	p.manifests.report(state, reason)
}

// loops are what runs once in a cluster, where the leadership is. They end with ctx, all of them, or with an error.
func (p *plane) loops(ctx context.Context, clientConfig *rest.Config) error {
	group, ctx := errgroup.WithContext(ctx)
	// Nodes wait for their rules: first things first.
	group.Go(func() error {
		if err := p.applyManifests(ctx, clientConfig); err != nil {
			return err
		}
		return p.deployer.Apply(ctx)
	})
	group.Go(func() error {
		p.child.Report(ComponentScheduler, supervise.Ready, "")
		if err := p.runScheduler(component(ctx, ComponentScheduler)); err != nil && ctx.Err() == nil {
			return fmt.Errorf("scheduler: %w", err)
		}
		return ended(ctx, ComponentScheduler)
	})
	group.Go(func() error {
		p.child.Report(ComponentControllerManager, supervise.Ready, "")
		if err := p.runControllerManager(component(ctx, ComponentControllerManager)); errors.Is(err, errStillRunning) || err != nil && ctx.Err() == nil {
			return fmt.Errorf("controller manager: %w", err)
		}
		return ended(ctx, ComponentControllerManager)
	})
	p.runControllers(ctx, group, clientConfig)
	err := group.Wait()
	p.reportLoops(supervise.Waiting, "for the lease "+leaseName)
	return err
}

// ended turns a component that returned without an error into one, unless the process is stopping.
func ended(ctx context.Context, name string) error {
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("%s ended by itself", name)
}

// component gives upstream code a logger that says whose lines these are.
func component(ctx context.Context, name string) context.Context {
	return klog.NewContext(ctx, klog.Background().WithValues("component", name))
}

// runAPIServer takes the steps of k8s.io/kubernetes/cmd/kube-apiserver/app.Run, with the join API and the endpoints of the kubernetes
// Service as Kedge's own.
func (p *plane) runAPIServer(ctx context.Context) error {
	completed, err := p.apiserver.Complete(ctx)
	if err != nil {
		return err
	}
	if errs := completed.Validate(); len(errs) != 0 {
		return utilerrors.NewAggregate(errs)
	}
	cfg, err := apiserver.NewConfig(completed)
	if err != nil {
		return err
	}
	if cfg.KubeAPIs.Extra.EndpointReconcilerConfig.Reconciler, err = newEndpointReconciler(cfg.KubeAPIs.ControlPlane.Generic.LoopbackClientConfig); err != nil {
		return err
	}
	defer p.followEncryption(ctx, cfg)()
	ready, err := cfg.Complete()
	if err != nil {
		return err
	}
	server, err := apiserver.CreateServerChain(ready)
	if err != nil {
		return err
	}
	mux := server.GenericAPIServer.Handler.NonGoRestfulMux
	mux.HandlePrefix(joinPrefix, p.joinAPI())
	mux.Handle(tunnel.ConnectPath, p.tunnel)
	mux.Handle(encryption.Path, p.encryption.Handler())
	mux.HandlePrefix(encryption.Path+"/", p.encryption.Handler())
	prepared, err := server.PrepareRun()
	if err != nil {
		return err
	}
	return prepared.Run(ctx)
}

func (p *plane) runScheduler(ctx context.Context) error {
	completed, sched, err := scheduler.Setup(ctx, p.scheduler)
	if err != nil {
		return err
	}
	// Its name stays taken when it ends, and it may run again.
	defer configz.Delete("componentconfig")
	return scheduler.Run(ctx, completed, sched)
}

// noHealthWait spares the controller manager its wait for /healthz at the start. It asks once a second, and until the API server
// has made all default roles, which its identity here does not need: a second or two of every cluster's first start.
type noHealthWait struct{ http.RoundTripper }

func (t noHealthWait) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Path == "/healthz" {
		r = r.Clone(r.Context())
		r.URL.Path = "/livez/ping"
	}
	return t.RoundTripper.RoundTrip(r)
}

// healthy asks the API server one of its health paths. The error names the checks that failed, of the dozens that there are.
func healthy(ctx context.Context, client kubernetes.Interface, path string) error {
	var code int
	res := client.Discovery().RESTClient().Get().AbsPath(path).Timeout(5 * time.Second).Do(ctx).StatusCode(&code)
	if code == http.StatusOK {
		return nil
	}
	body, err := res.Raw()
	var failed []string
	for line := range strings.Lines(string(body)) {
		if name, ok := strings.CutPrefix(line, "[-]"); ok {
			failed = append(failed, strings.Fields(name)[0])
		}
	}
	switch {
	case len(failed) > 0:
		return errors.New("not ready: " + strings.Join(failed, ", "))
	case err != nil:
		return err
	}
	return fmt.Errorf("status %d", code)
}

// watchHealth keeps the reported state of the API server true.
func (p *plane) watchHealth(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(15 * time.Second):
		}
		if err := healthy(ctx, p.client, "/readyz"); err != nil && ctx.Err() == nil {
			p.child.Report(ComponentAPIServer, supervise.Failed, err.Error())
		} else {
			p.child.Report(ComponentAPIServer, supervise.Ready, "")
		}
	}
}
