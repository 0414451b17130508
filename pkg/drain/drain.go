// SPDX-License-Identifier: Apache-2.0

// Package drain moves the pods of a node elsewhere before the machine goes away or is upgraded.
package drain

import (
	"context"
	"fmt"
	"io"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubectl/pkg/drain"
)

// Node moves the pods of a node elsewhere, as `kubectl drain` does, those without a controller and with local data, too: the machine
// goes away. The node stays cordoned, also after an error. A node that does not exist has no pods.
func Node(ctx context.Context, client kubernetes.Interface, name string, timeout time.Duration, out io.Writer) error {
	h := helper(ctx, client, timeout, out)
	h.Force = true
	return run(h, name)
}

// Movable is Node for a machine that comes back: pods that nothing makes anew stay.
func Movable(ctx context.Context, client kubernetes.Interface, name string, timeout time.Duration, out io.Writer) error {
	h := helper(ctx, client, timeout, out)
	h.AdditionalFilters = []drain.PodFilter{func(pod corev1.Pod) drain.PodDeleteStatus {
		if metav1.GetControllerOf(&pod) == nil {
			return drain.MakePodDeleteStatusSkip()
		}
		return drain.MakePodDeleteStatusOkay()
	}}
	h.Force = true // else those that the filter leaves are errors
	return run(h, name)
}

// Uncordon lets the node have pods again.
func Uncordon(ctx context.Context, client kubernetes.Interface, name string) error {
	node, err := client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	return drain.RunCordonOrUncordon(helper(ctx, client, 0, io.Discard), node, false)
}

func helper(ctx context.Context, client kubernetes.Interface, timeout time.Duration, out io.Writer) *drain.Helper {
	return &drain.Helper{
		Ctx: ctx, Client: client, GracePeriodSeconds: -1, IgnoreAllDaemonSets: true, DeleteEmptyDirData: true, Timeout: timeout,
		// A node that is gone cannot confirm that its pods have ended.
		SkipWaitForDeleteTimeoutSeconds: 60,
		Out:                             out, ErrOut: out,
		OnPodDeletionOrEvictionFinished: func(pod *corev1.Pod, _ bool, err error) {
			if err == nil {
				fmt.Fprintf(out, "pod %s/%s has left\n", pod.Namespace, pod.Name)
			}
		},
	}
}

func run(h *drain.Helper, name string) error {
	node, err := h.Client.CoreV1().Nodes().Get(h.Ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := drain.RunCordonOrUncordon(h, node, true); err != nil {
		return err
	}
	return drain.RunNodeDrain(h, name)
}
