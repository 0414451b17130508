// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace/noop"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	internalapi "k8s.io/cri-api/pkg/apis"
	criapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	cri "k8s.io/cri-client/pkg"
	"k8s.io/kubelet/pkg/types"

	"github.com/kedge-io/kedge/pkg/supervise"
)

// What the kubelet notes at a container (its kuberuntime/labels.go).
const (
	annotationGrace   = "io.kubernetes.pod.terminationGracePeriod" // seconds
	annotationPreStop = "io.kubernetes.container.preStopHandler"   // a LifecycleHandler in JSON
	annotationPorts   = "io.kubernetes.container.ports"            // ContainerPorts in JSON
)

// defaultGrace is what a pod gets that says nothing; leastGrace is left to a container after its preStop hook, as the kubelet does.
const (
	defaultGrace = corev1.DefaultTerminationGracePeriodSeconds * time.Second
	leastGrace   = 2 * time.Second
)

// criticalPriority is where the priorities of the cluster's own pods begin (scheduling.SystemCriticalPriority).
const criticalPriority = 2_000_000_000

// PodStop says how the pods of a machine are ended.
type PodStop struct {
	// Grace is what pods get at the most, of what they ask for with terminationGracePeriodSeconds; after them GraceCritical those that the
	// cluster itself needs. What does not end by then is killed.
	Grace, GraceCritical time.Duration
	// Pods is what the API knows of the machine's pods, by UID. Without it a pod of kube-system counts as critical.
	Pods map[string]*corev1.Pod
	// Remove has the pods' sandboxes and containers removed, too: they are not to start again.
	Remove bool
	// Say gets a line of progress a pod; may be nil.
	Say func(string)
}

// podGroup is a pod's running containers.
type podGroup struct {
	name       string // namespace/name
	sandbox    string
	running    bool // false: what an earlier start of the pod has left
	critical   bool
	containers []*criapi.Container
	sidecars   []*criapi.Container // end after the others
}

// StopPods ends all pods of this machine in an orderly way, through containerd at socket: the preStop hooks, SIGTERM, time to end; ordinary
// pods first, then critical ones. Their networks and root file systems go away with them. No kubelet runs, which would start them again.
func StopPods(ctx context.Context, socket string, o PodStop) error {
	if o.Say == nil {
		o.Say = func(string) {}
	}
	runtime, err := dialRuntime(ctx, socket)
	if err != nil {
		return fmt.Errorf("containerd: %w", err)
	}
	defer runtime.Close(ctx)
	pods, err := listPods(ctx, runtime, o.Pods)
	if err != nil {
		return fmt.Errorf("containerd: %w", err)
	}
	var mu sync.Mutex
	var errs []error
	for _, critical := range []bool{false, true} {
		grace := o.Grace
		if critical {
			grace = o.GraceCritical
		}
		var ended sync.WaitGroup
		for _, p := range pods {
			if p.critical != critical {
				continue
			}
			ended.Go(func() {
				start := time.Now()
				err := p.stop(ctx, runtime, grace, o.Remove)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					errs = append(errs, fmt.Errorf("pod %s: %w", p.name, err))
					return
				}
				if p.running {
					o.Say(fmt.Sprintf("pod %s ended after %s", p.name, time.Since(start).Round(100*time.Millisecond)))
				}
			})
		}
		ended.Wait()
	}
	return errors.Join(errs...)
}

// runtimePatience is how long containerd may take until it answers.
const runtimePatience = 30 * time.Second

// dialRuntime waits until containerd knows its containers: it may just have started.
func dialRuntime(ctx context.Context, socket string) (runtime internalapi.RuntimeService, err error) {
	wait, cancel := context.WithTimeout(ctx, runtimePatience)
	defer cancel()
	dial := func() error {
		if _, err = os.Stat(socket); err == nil {
			// Its timeout is that of each request; StopContainer gets what the container has besides.
			runtime, err = cri.NewRemoteRuntimeServiceBuilder().WithEndpoint("unix://" + socket).WithConnectionTimeout(time.Minute).
				WithTracerProvider(noop.NewTracerProvider()).Build(ctx)
		}
		return err
	}
	if supervise.Poll(wait, dial) != nil {
		return nil, err
	}
	return runtime, nil
}

func listPods(ctx context.Context, runtime internalapi.RuntimeService, known map[string]*corev1.Pod) ([]*podGroup, error) {
	sandboxes, err := runtime.ListPodSandbox(ctx, nil)
	if err != nil {
		return nil, err
	}
	running, err := runtime.ListContainers(ctx, &criapi.ContainerFilter{State: &criapi.ContainerStateValue{State: criapi.ContainerState_CONTAINER_RUNNING}})
	if err != nil {
		return nil, err
	}
	var pods []*podGroup
	for _, s := range sandboxes {
		p := &podGroup{name: s.Metadata.Namespace + "/" + s.Metadata.Name, sandbox: s.Id, running: s.State == criapi.PodSandboxState_SANDBOX_READY,
			critical: s.Metadata.Namespace == metav1.NamespaceSystem}
		pod := known[s.Metadata.Uid]
		if pod != nil {
			p.critical = pod.Spec.Priority != nil && *pod.Spec.Priority >= criticalPriority
		}
		for _, c := range running {
			switch {
			case c.PodSandboxId != s.Id:
			case isSidecar(pod, c.Labels[types.KubernetesContainerNameLabel]):
				p.sidecars = append(p.sidecars, c)
			default:
				p.containers = append(p.containers, c)
			}
		}
		pods = append(pods, p)
	}
	return pods, nil
}

// isSidecar says whether a container is one that starts before a pod's others and ends after them.
func isSidecar(pod *corev1.Pod, name string) bool {
	return pod != nil && slices.ContainsFunc(pod.Spec.InitContainers, func(c corev1.Container) bool {
		return c.Name == name && c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
	})
}

// stop ends the containers, and then what remains of the pod.
func (p *podGroup) stop(ctx context.Context, runtime internalapi.RuntimeService, limit time.Duration, remove bool) error {
	end := time.Now().Add(limit)
	var errs []error
	for _, list := range [][]*criapi.Container{p.containers, p.sidecars} {
		ended := make(chan error)
		for _, c := range list {
			go func() { ended <- stopContainer(ctx, runtime, p.sandbox, c, max(time.Until(end), 0)) }()
		}
		for range list {
			errs = append(errs, <-ended)
		}
	}
	errs = append(errs, runtime.StopPodSandbox(ctx, p.sandbox))
	if remove {
		errs = append(errs, runtime.RemovePodSandbox(ctx, p.sandbox))
	}
	return errors.Join(errs...)
}

// stopContainer gives a container the time that its pod asks for, limit at the most, its preStop hook included.
func stopContainer(ctx context.Context, runtime internalapi.RuntimeService, sandbox string, c *criapi.Container, limit time.Duration) error {
	grace := min(graceOf(c.Annotations), limit)
	if hook := preStop(c.Annotations); hook != nil && grace > leastGrace {
		start := time.Now()
		hookCtx, cancel := context.WithTimeout(ctx, grace-leastGrace)
		runHook(hookCtx, runtime, sandbox, c, hook) // what it says is its own business: the container ends all the same
		cancel()
		grace = max(grace-time.Since(start), leastGrace)
	}
	return runtime.StopContainer(ctx, c.Id, int64(grace.Round(time.Second)/time.Second))
}

func graceOf(annotations map[string]string) time.Duration {
	seconds, err := strconv.ParseInt(annotations[annotationGrace], 10, 32)
	if err != nil || seconds < 0 {
		return defaultGrace
	}
	return time.Duration(seconds) * time.Second
}

func preStop(annotations map[string]string) *corev1.LifecycleHandler {
	text := annotations[annotationPreStop]
	if text == "" {
		return nil
	}
	var h corev1.LifecycleHandler
	if json.Unmarshal([]byte(text), &h) != nil {
		return nil
	}
	return &h
}

func runHook(ctx context.Context, runtime internalapi.RuntimeService, sandbox string, c *criapi.Container, h *corev1.LifecycleHandler) {
	switch {
	case h.Exec != nil:
		deadline, _ := ctx.Deadline()
		_, _, _ = runtime.ExecSync(ctx, c.Id, h.Exec.Command, time.Until(deadline))
	case h.Sleep != nil:
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(h.Sleep.Seconds) * time.Second):
		}
	case h.HTTPGet != nil:
		host := h.HTTPGet.Host
		if host == "" {
			st, err := runtime.PodSandboxStatus(ctx, sandbox, false)
			if err != nil {
				return
			}
			host = st.GetStatus().GetNetwork().GetIp()
		}
		port := portOf(h.HTTPGet.Port, c.Annotations)
		url := strings.ToLower(string(h.HTTPGet.Scheme)) + "://" + net.JoinHostPort(host, strconv.Itoa(port)) + "/" + strings.TrimPrefix(h.HTTPGet.Path, "/")
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return
		}
		if res, err := http.DefaultClient.Do(req); err == nil {
			res.Body.Close()
		}
	}
}

// portOf is the number of a port that may be given by a name of the container's.
func portOf(port intstr.IntOrString, annotations map[string]string) int {
	var ports []corev1.ContainerPort
	if port.Type == intstr.String && json.Unmarshal([]byte(annotations[annotationPorts]), &ports) == nil {
		for _, p := range ports {
			if p.Name == port.StrVal {
				return int(p.ContainerPort)
			}
		}
	}
	return port.IntValue()
}
