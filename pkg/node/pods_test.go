// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	internalapi "k8s.io/cri-api/pkg/apis"
	criapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubelet/pkg/types"
)

func TestGraceOf(t *testing.T) {
	for text, want := range map[string]time.Duration{"": defaultGrace, "0": 0, "90": 90 * time.Second, "-1": defaultGrace, "x": defaultGrace, "99999999999": defaultGrace} {
		if got := graceOf(map[string]string{annotationGrace: text}); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

func TestPreStop(t *testing.T) {
	h := preStop(map[string]string{annotationPreStop: `{"exec":{"command":["sh","-c","sync"]}}`})
	if h == nil || h.Exec == nil || !slices.Equal(h.Exec.Command, []string{"sh", "-c", "sync"}) {
		t.Errorf("%+v", h)
	}
	for _, text := range []string{"", "{", "[]"} {
		if h := preStop(map[string]string{annotationPreStop: text}); h != nil {
			t.Errorf("%q: %+v", text, h)
		}
	}
	ports := map[string]string{annotationPorts: `[{"name":"web","containerPort":8080}]`}
	for port, want := range map[intstr.IntOrString]int{intstr.FromString("web"): 8080, intstr.FromString("81"): 81, intstr.FromInt32(82): 82, intstr.FromString("none"): 0} {
		if got := portOf(port, ports); got != want {
			t.Errorf("%v: %d, want %d", port, got, want)
		}
	}
}

func FuzzPreStop(f *testing.F) {
	f.Add(`{"exec":{"command":["sh"]}}`, `[{"name":"web"}]`)
	f.Fuzz(func(_ *testing.T, hook, ports string) {
		preStop(map[string]string{annotationPreStop: hook})
		portOf(intstr.FromString("web"), map[string]string{annotationPorts: ports})
	})
}

// fakeRuntime has pods and containers.
type fakeRuntime struct {
	internalapi.RuntimeService
	pods       []*criapi.PodSandbox
	containers []*criapi.Container
}

func (f *fakeRuntime) ListPodSandbox(context.Context, *criapi.PodSandboxFilter) ([]*criapi.PodSandbox, error) {
	return f.pods, nil
}

func (f *fakeRuntime) ListContainers(context.Context, *criapi.ContainerFilter) ([]*criapi.Container, error) {
	return f.containers, nil
}

// TestListPods: what the API knows decides; without it kube-system is critical.
func TestListPods(t *testing.T) {
	var f fakeRuntime
	for _, uid := range []string{"a", "b", "c"} {
		namespace := map[string]string{"b": "kube-system"}[uid]
		f.pods = append(f.pods, &criapi.PodSandbox{Id: uid, Metadata: &criapi.PodSandboxMetadata{Name: uid, Uid: uid, Namespace: namespace}})
		for _, name := range []string{"proxy", "app"} {
			f.containers = append(f.containers, &criapi.Container{PodSandboxId: uid, Labels: map[string]string{types.KubernetesContainerNameLabel: name}})
		}
	}
	priority, always := int32(criticalPriority), corev1.ContainerRestartPolicyAlways
	known := map[string]*corev1.Pod{
		"a": {Spec: corev1.PodSpec{Priority: &priority, InitContainers: []corev1.Container{{Name: "proxy", RestartPolicy: &always}}}},
		"c": {},
	}
	pods, err := listPods(t.Context(), &f, known)
	if err != nil || len(pods) != 3 {
		t.Fatal(pods, err)
	}
	for _, p := range pods {
		sidecars := map[string]int{"a": 1}[p.sandbox]
		if want := p.sandbox != "c"; p.critical != want || len(p.sidecars) != sidecars || len(p.containers) != 2-sidecars {
			t.Errorf("%+v", p)
		}
	}
}
