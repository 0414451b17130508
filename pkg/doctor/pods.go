// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// A pod that is younger is still starting; one that ends gets as much time after its termination grace period.
const patience = 2 * time.Minute

// judgePods finds the pods that cannot start, or cannot end, and why.
func judgePods(f Facts) []Finding {
	var all []Finding
	for i := range f.Pods {
		p := &f.Pods[i]
		text, remedy := judgePod(p, f)
		if text != "" {
			all = append(all, Finding{Problem, "pod " + p.Namespace + "/" + p.Name, "pod", text, remedy})
		}
	}
	return all
}

func judgePod(p *corev1.Pod, f Facts) (text, remedy string) {
	name := "-n " + p.Namespace + " " + p.Name
	if p.DeletionTimestamp != nil { // the end of the grace period
		late := f.Now.Sub(p.DeletionTimestamp.Time)
		if late < patience {
			return "", ""
		}
		text = fmt.Sprintf("it should have ended %s ago", late.Round(time.Second))
		if len(p.Finalizers) > 0 {
			return text + " and waits for finalizers: " + strings.Join(p.Finalizers, ", "), "Whoever set them has to remove them: is that controller running?"
		}
		return text, fmt.Sprintf("Is its node %s running? If the machine is gone for good: `kedge node remove %s`.", p.Spec.NodeName, p.Spec.NodeName)
	}
	if p.Status.Phase == corev1.PodSucceeded {
		return "", ""
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			return "no node takes it: " + c.Message, schedulingRemedy(c.Message)
		}
	}
	for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if w := c.State.Waiting; w != nil {
			if text, remedy := judgeWaiting(c, w, p, name); text != "" {
				return text, remedy
			}
		}
	}
	if p.Status.Phase == corev1.PodFailed {
		return "it has failed: " + cmp.Or(p.Status.Message, p.Status.Reason, "see its containers"), "$ kedge kubectl describe pod " + name
	}
	if p.Status.Phase == corev1.PodPending && f.Now.Sub(p.CreationTimestamp.Time) > patience {
		return "it does not start: " + cmp.Or(lastWarning(p, f.Events), "no event says why"), "$ kedge kubectl describe pod " + name
	}
	return "", ""
}

func judgeWaiting(c corev1.ContainerStatus, w *corev1.ContainerStateWaiting, p *corev1.Pod, name string) (text, remedy string) {
	text = fmt.Sprintf("container %s: %s: %s", c.Name, w.Reason, w.Message)
	switch w.Reason {
	case "ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "RegistryUnavailable":
		return text, "Is the name right, and the registry reached (docs/registries.md)? Without a registry: `kedge images import`, and imagePullPolicy: IfNotPresent (docs/images.md)."
	case "CrashLoopBackOff":
		if t := c.LastTerminationState.Terminated; t != nil {
			text = fmt.Sprintf("container %s has ended %d times, the last time with exit status %d (%s)", c.Name, c.RestartCount, t.ExitCode, t.Reason)
			if t.Reason == "OOMKilled" {
				return text, "It needs more memory than its limit: raise resources.limits.memory."
			}
		}
		return text, fmt.Sprintf("$ kedge kubectl logs %s -c %s --previous", name, c.Name)
	case "CreateContainerConfigError":
		return text, "Create the ConfigMap or Secret that the message names, in namespace " + p.Namespace + "."
	case "", "ContainerCreating", "PodInitializing":
		return "", "" // judged by age
	}
	return text, "$ kedge kubectl describe pod " + name
}

func schedulingRemedy(message string) string {
	switch {
	case strings.Contains(message, "Insufficient"):
		return "The nodes have not as much left as it requests: lower resources.requests, or add a node. What is requested: `kedge kubectl describe nodes`."
	case strings.Contains(message, "untolerated taint"):
		return "Give it a toleration, or take the taint off a node: `kedge kubectl describe nodes | grep Taints`."
	case strings.Contains(message, "PersistentVolumeClaim") || strings.Contains(message, "persistentvolumeclaim"):
		return "Its claim is not bound: `kedge kubectl get pvc -A`. Is there a StorageClass that makes volumes?"
	case strings.Contains(message, "node affinity"), strings.Contains(message, "node selector"):
		return "No node has the labels that it asks for: `kedge kubectl get nodes --show-labels`."
	}
	return "$ kedge kubectl get nodes"
}

// lastWarning is the newest warning about a pod.
func lastWarning(p *corev1.Pod, events []corev1.Event) string {
	var last *corev1.Event
	when := func(e *corev1.Event) time.Time {
		return slices.MaxFunc([]time.Time{e.LastTimestamp.Time, e.EventTime.Time}, time.Time.Compare)
	}
	for i := range events {
		if e := &events[i]; e.InvolvedObject.UID == p.UID && (last == nil || when(e).After(when(last))) {
			last = e
		}
	}
	if last == nil {
		return ""
	}
	return last.Reason + ": " + last.Message
}
