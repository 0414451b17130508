// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"fmt"
	"net/http"
	"os"

	v1core "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/util/keyutil"
	"k8s.io/controller-manager/pkg/clientbuilder"
	controllermanagerhealthz "k8s.io/controller-manager/pkg/healthz"
	"k8s.io/klog/v2"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app/config"
	"k8s.io/kubernetes/cmd/kube-controller-manager/names"
	serviceaccountcontroller "k8s.io/kubernetes/pkg/controller/serviceaccount"
	"k8s.io/kubernetes/pkg/serviceaccount"
)

// runControllerManager runs upstream's controllers until ctx ends and all of them have stopped.
//
// It takes the steps of k8s.io/kubernetes/cmd/kube-controller-manager/app.Run one by one, because that function keeps the name of its
// informers reserved when it returns and so works once in a process's life: after the lease was lost the process would have to
// go, and the API server with it.
func (p *plane) runControllerManager(ctx context.Context) error {
	cfg, err := p.controllerManager.Config(ctx, controllermanager.KnownControllers(), controllermanager.ControllersDisabledByDefault(), controllermanager.ControllerAliases())
	if err != nil {
		return err
	}
	cfg.Kubeconfig.Wrap(func(next http.RoundTripper) http.RoundTripper { return noHealthWait{next} })
	completed := cfg.Complete()
	completed.EventBroadcaster.StartStructuredLogging(0)
	completed.EventBroadcaster.StartRecordingToSink(&v1core.EventSinkImpl{Interface: completed.Client.CoreV1().Events("")})
	defer completed.EventBroadcaster.Shutdown()

	clients := clientbuilder.SimpleControllerClientBuilder{ClientConfig: completed.Kubeconfig}
	cc, err := controllermanager.CreateControllerContext(ctx, completed, clients, clients)
	if err != nil {
		return err
	}
	defer cc.InformerFactory.InformerName().Release()
	tokens, err := newTokenController(ctx, completed, cc, clients)
	if err != nil {
		return err
	}
	// Here BuildControllers would make upstream's token controller, without a client.
	descriptors := controllermanager.NewControllerDescriptors()
	delete(descriptors, names.ServiceAccountTokenController)
	controllers, err := controllermanager.BuildControllers(ctx, cc, descriptors, nil, controllermanagerhealthz.NewMutableHealthzHandler())
	if err != nil {
		return err
	}
	cc.InformerFactory.Start(ctx.Done())
	defer cc.InformerFactory.Shutdown()
	cc.ObjectOrMetadataInformerFactory.Start(ctx.Done())
	close(cc.InformersStarted)
	if !controllermanager.RunControllers(ctx, cc, append(controllers, tokens), controllermanager.ControllerStartJitter, completed.ControllerShutdownTimeout) {
		return errStillRunning
	}
	return nil
}

// tokenController fills Secrets of type service-account-token. Upstream's descriptor of it cannot be used from outside.
type tokenController struct {
	*serviceaccountcontroller.TokensController
	workers int
}

// Name of the controller.
func (tokenController) Name() string { return names.ServiceAccountTokenController }

// Run blocks until ctx ends.
func (c tokenController) Run(ctx context.Context) { c.TokensController.Run(ctx, c.workers) }

func newTokenController(ctx context.Context, c *config.CompletedConfig, cc controllermanager.ControllerContext, clients clientbuilder.ControllerClientBuilder) (controllermanager.Controller, error) {
	sa := c.ComponentConfig.SAController
	key, err := keyutil.PrivateKeyFromFile(sa.ServiceAccountKeyFile)
	if err != nil {
		return nil, fmt.Errorf("service-account key: %w", err)
	}
	rootCA, err := os.ReadFile(sa.RootCAFile)
	if err != nil {
		return nil, fmt.Errorf("root CA: %w", err)
	}
	generator, err := serviceaccount.JWTTokenGenerator(serviceaccount.LegacyIssuer, key)
	if err != nil {
		return nil, err
	}
	client, err := clients.Client("tokens-controller")
	if err != nil {
		return nil, err
	}
	controller, err := serviceaccountcontroller.NewTokensController(klog.FromContext(ctx), cc.InformerFactory.Core().V1().ServiceAccounts(),
		cc.InformerFactory.Core().V1().Secrets(), client, serviceaccountcontroller.TokensControllerOptions{TokenGenerator: generator, RootCA: rootCA})
	if err != nil {
		return nil, err
	}
	return tokenController{controller, int(sa.ConcurrentSATokenSyncs)}, nil
}
