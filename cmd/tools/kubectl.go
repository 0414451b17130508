// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"context"
	"os"
	"path/filepath"

	ctr "github.com/containerd/containerd/v2/cmd/ctr/app"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // as kubectl's own main does
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	kubectl "k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"

	"github.com/kedge-io/kedge/pkg/config"
)

// Kubectl runs kubectl. Without KUBECONFIG and --kubeconfig it takes this machine's admin kubeconfig if that can be read.
func Kubectl(_ context.Context, args []string) error {
	if os.Getenv(clientcmd.RecommendedConfigPathEnvVar) == "" {
		if f, err := os.Open(config.DefaultKubeconfig); err == nil {
			f.Close()
			if err := os.Setenv(clientcmd.RecommendedConfigPathEnvVar, config.DefaultKubeconfig); err != nil {
				return err
			}
			if err := cacheInMemory(); err != nil {
				return err
			}
		}
	}
	// kubectl reads os.Args itself, for plugins and for .kuberc. The rest is its own main.
	os.Args = append([]string{"kubectl"}, args...)
	if _, err := logs.GlogSetter(kubectl.GetLogVerbosity(os.Args)); err != nil {
		return err
	}
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		util.CheckErr(err) // prints and exits as kubectl does
	}
	return nil
}

// cacheInMemory has kubectl keep what it learns of the API beside Kedge's own sockets, and not in root's home: it costs the disk nothing, and
// goes away with Kedge.
func cacheInMemory() error {
	const variable = "KUBECACHEDIR"
	if _, err := os.Stat(config.DefaultRunDir); err != nil || os.Geteuid() != 0 || os.Getenv(variable) != "" {
		return nil
	}
	return os.Setenv(variable, filepath.Join(config.DefaultRunDir, "kubectl"))
}

// Ctr runs containerd's ctr against this node's containerd, in the namespace of Kubernetes unless another is asked for.
func Ctr(ctx context.Context, args []string) error {
	for name, value := range map[string]string{
		"CONTAINERD_ADDRESS":   config.DefaultRunDir + "/containerd/containerd.sock",
		"CONTAINERD_NAMESPACE": "k8s.io",
	} {
		if os.Getenv(name) == "" {
			if err := os.Setenv(name, value); err != nil {
				return err
			}
		}
	}
	return ctr.New().Run(ctx, append([]string{"ctr"}, args...))
}
