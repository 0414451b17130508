// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	ctr "github.com/containerd/containerd/v2/cmd/ctr/app"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // as kubectl's own main does
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	kubectl "k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/utils/exec"

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
		} else {
			util.BehaviorOnFatal(func(text string, code int) { fatal(text, code, err) })
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

// fatal ends kubectl as it does itself, and says which configuration Kedge would have had when there was none.
func fatal(text string, code int, missing error) {
	if strings.Contains(text, "localhost:8080") {
		text = strings.TrimSuffix(text, "\n")
		if errors.Is(missing, fs.ErrPermission) {
			text += fmt.Sprintf("\n%s is for root: use sudo, or give --kubeconfig", config.DefaultKubeconfig)
		} else {
			text += fmt.Sprintf("\nThere is no %s: use a server of the cluster, or give --kubeconfig", config.DefaultKubeconfig)
		}
	}
	util.DefaultBehaviorOnFatal()
	util.CheckErr(exec.CodeExitError{Err: errors.New(text), Code: code})
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
