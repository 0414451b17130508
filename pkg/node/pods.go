// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.opentelemetry.io/otel/trace/noop"
	criapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	cri "k8s.io/cri-client/pkg"
)

// podStopTimeout is what containers get after SIGTERM when their machine leaves the cluster.
const podStopTimeout = 15 * time.Second

// RemovePods stops all pods of this machine and removes them with their network and volumes' mounts, through containerd at socket.
// say gets a line a pod.
func RemovePods(ctx context.Context, socket string, say func(string)) error {
	runtime, err := cri.NewRemoteRuntimeServiceBuilder().WithEndpoint("unix://" + socket).WithConnectionTimeout(10 * time.Second).
		WithTracerProvider(noop.NewTracerProvider()).Build(ctx)
	if err != nil {
		return fmt.Errorf("containerd: %w", err)
	}
	containers, err := runtime.ListContainers(ctx, &criapi.ContainerFilter{State: &criapi.ContainerStateValue{State: criapi.ContainerState_CONTAINER_RUNNING}})
	if err != nil {
		return fmt.Errorf("containerd: %w", err)
	}
	ended := make(chan error)
	for _, c := range containers {
		go func() { ended <- runtime.StopContainer(ctx, c.Id, int64(podStopTimeout.Seconds())) }()
	}
	var errs []error
	for range containers {
		errs = append(errs, <-ended)
	}
	pods, err := runtime.ListPodSandbox(ctx, nil)
	errs = append(errs, err)
	for _, p := range pods {
		if err := errors.Join(runtime.StopPodSandbox(ctx, p.Id), runtime.RemovePodSandbox(ctx, p.Id)); err != nil {
			errs = append(errs, fmt.Errorf("pod %s/%s: %w", p.Metadata.Namespace, p.Metadata.Name, err))
			continue
		}
		say(fmt.Sprintf("pod %s/%s removed", p.Metadata.Namespace, p.Metadata.Name))
	}
	return errors.Join(errs...)
}
