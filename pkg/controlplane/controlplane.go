// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/klog/v2"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	apiserveroptions "k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	controllermanageroptions "k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	scheduleroptions "k8s.io/kubernetes/cmd/kube-scheduler/app/options"

	"github.com/kedge-io/kedge/pkg/supervise"
)

// plane holds the options of all components: the feature gates of the process are closed and set once, before any of them runs.
type plane struct {
	cfg               Config
	apiserver         *apiserveroptions.ServerRunOptions
	controllerManager *controllermanageroptions.KubeControllerManagerOptions
	scheduler         *scheduleroptions.Options
}

// CheckArgs refuses flags that the components do not have or do not accept, before anything is started.
func CheckArgs(cfg Config) error {
	_, err := newPlane(cfg)
	return err
}

func newPlane(cfg Config) (*plane, error) {
	p := &plane{cfg: cfg, apiserver: apiserveroptions.NewServerRunOptions(), scheduler: scheduleroptions.NewOptions()}
	var err error
	if p.controllerManager, err = controllermanageroptions.NewKubeControllerManagerOptions(); err != nil {
		return nil, fmt.Errorf("controller manager: %w", err)
	}
	return p, errors.Join(
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
	// What the apiserver's and the controller manager's commands do before they run: gates and versions of the whole
	// process, and no log lines about the API's own requests to itself.
	if err := p.apiserver.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return fmt.Errorf("feature gates: %w", err)
	}
	rest.SetDefaultWarningHandler(rest.NoWarnings{})

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		child.Report(ComponentAPIServer, supervise.Running, "")
		if err := p.runAPIServer(component(ctx, ComponentAPIServer)); err != nil {
			return fmt.Errorf("apiserver: %w", err)
		}
		return ended(ctx, ComponentAPIServer)
	})
	group.Go(func() error { return p.afterAPIServer(ctx, group, child, log) })
	return group.Wait()
}

// afterAPIServer starts everything that is a client of the API as soon as it answers.
func (p *plane) afterAPIServer(ctx context.Context, group *errgroup.Group, child *supervise.Child, log *slog.Logger) error {
	clientConfig, err := clientcmd.BuildConfigFromFlags("", p.cfg.Files.Kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(clientConfig)
	if err != nil {
		return err
	}
	for _, c := range []string{ComponentScheduler, ComponentControllerManager, ComponentManifests} {
		child.Report(c, supervise.Waiting, "for the API")
	}
	if err := supervise.Poll(ctx, func() error { return healthy(ctx, client, "/livez/ping") }); err != nil {
		return nil // the process is stopping
	}
	// Nodes wait for their rules: first things first.
	group.Go(func() error { return p.applyManifests(ctx, clientConfig, child, log) })
	group.Go(func() error {
		child.Report(ComponentScheduler, supervise.Ready, "")
		if err := p.runScheduler(component(ctx, ComponentScheduler)); err != nil && ctx.Err() == nil {
			return fmt.Errorf("scheduler: %w", err)
		}
		return ended(ctx, ComponentScheduler)
	})
	group.Go(func() error {
		child.Report(ComponentControllerManager, supervise.Ready, "")
		if err := p.runControllerManager(component(ctx, ComponentControllerManager)); err != nil && ctx.Err() == nil {
			return fmt.Errorf("controller manager: %w", err)
		}
		return ended(ctx, ComponentControllerManager)
	})
	group.Go(func() error { p.labelNode(ctx, client); return nil })
	if err := supervise.Poll(ctx, func() error { return healthy(ctx, client, "/healthz") }); err != nil {
		return nil
	}
	child.Report(ComponentAPIServer, supervise.Ready, "")
	return p.watchHealth(ctx, client, child)
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

func (p *plane) runAPIServer(ctx context.Context) error {
	completed, err := p.apiserver.Complete(ctx)
	if err != nil {
		return err
	}
	if errs := completed.Validate(); len(errs) != 0 {
		return utilerrors.NewAggregate(errs)
	}
	return apiserver.Run(ctx, completed)
}

func (p *plane) runScheduler(ctx context.Context) error {
	completed, sched, err := scheduler.Setup(ctx, p.scheduler)
	if err != nil {
		return err
	}
	return scheduler.Run(ctx, completed, sched)
}

func (p *plane) runControllerManager(ctx context.Context) error {
	cfg, err := p.controllerManager.Config(ctx, controllermanager.KnownControllers(), controllermanager.ControllersDisabledByDefault(), controllermanager.ControllerAliases())
	if err != nil {
		return err
	}
	cfg.Kubeconfig.Wrap(func(next http.RoundTripper) http.RoundTripper { return noHealthWait{next} })
	return controllermanager.Run(ctx, cfg.Complete())
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

func healthy(ctx context.Context, client kubernetes.Interface, path string) error {
	var code int
	res := client.Discovery().RESTClient().Get().AbsPath(path).Timeout(5 * time.Second).Do(ctx).StatusCode(&code)
	if code == http.StatusOK {
		return nil
	}
	if err := res.Error(); err != nil {
		return err
	}
	return fmt.Errorf("status %d", code)
}

// labelNode marks this server's Node as one of the control plane, as soon as its kubelet has made it; a kubelet may not do so
// itself. Only `kubectl get nodes` and people's selectors read the label.
func (p *plane) labelNode(ctx context.Context, client kubernetes.Interface) {
	patch := []byte(`{"metadata":{"labels":{"node-role.kubernetes.io/control-plane":""}}}`)
	for {
		_, err := client.CoreV1().Nodes().Patch(ctx, p.cfg.NodeName, types.StrategicMergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
	}
}

// watchHealth keeps the reported state of the API server true.
func (p *plane) watchHealth(ctx context.Context, client kubernetes.Interface, child *supervise.Child) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(15 * time.Second):
		}
		if err := healthy(ctx, client, "/readyz"); err != nil && ctx.Err() == nil {
			child.Report(ComponentAPIServer, supervise.Failed, err.Error())
		} else {
			child.Report(ComponentAPIServer, supervise.Ready, "")
		}
	}
}
