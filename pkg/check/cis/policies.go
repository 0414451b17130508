// SPDX-License-Identifier: Apache-2.0

package cis

import (
	"context"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/kedge-io/kedge/pkg/config"
)

// objects are what the items of section 5 look at.
type objects struct {
	admins      []string // bindings to cluster-admin beside the built-in one
	automounted []string // namespaces whose default service account's token is mounted
	unlabelled  []string // namespaces without a Pod Security level of their own that restricts
	unprotected []string // namespaces without a NetworkPolicy
	inDefault   int      // pods in the namespace default
}

func list(ctx context.Context, client kubernetes.Interface) (*objects, error) {
	o := &objects{}
	bindings, err := client.RbacV1().ClusterRoleBindings().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, b := range bindings.Items {
		if b.RoleRef.Name == "cluster-admin" && b.Name != "cluster-admin" {
			o.admins = append(o.admins, b.Name)
		}
	}
	accounts, err := client.CoreV1().ServiceAccounts(metav1.NamespaceAll).List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=default"})
	if err != nil {
		return nil, err
	}
	for _, a := range accounts.Items {
		if a.AutomountServiceAccountToken == nil || *a.AutomountServiceAccountToken {
			o.automounted = append(o.automounted, a.Namespace)
		}
	}
	policies, err := client.NetworkingV1().NetworkPolicies(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	protected := map[string]bool{}
	for _, p := range policies.Items {
		protected[p.Namespace] = true
	}
	namespaces, err := client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, n := range namespaces.Items {
		if strings.HasPrefix(n.Name, "kube-") {
			continue
		}
		if !protected[n.Name] {
			o.unprotected = append(o.unprotected, n.Name)
		}
		if level := n.Labels["pod-security.kubernetes.io/enforce"]; level != "baseline" && level != "restricted" {
			o.unlabelled = append(o.unlabelled, n.Name)
		}
	}
	pods, err := client.CoreV1().Pods(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	o.inDefault = len(pods.Items)
	return o, nil
}

// asked is an item about objects of the API.
func asked(look func(*machine, *objects) Result) func(*machine) Result {
	return plane(func(m *machine) Result {
		if m.objects == nil {
			return manual("give --kubeconfig, or try again when the API answers", "objects could not be looked at: %v", m.objectsErr)
		}
		return look(m, m.objects)
	})
}

// few names things, not all of a hundred.
func few(names []string) string {
	slices.Sort(names)
	if n := len(names); n > 5 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:5], ", "), n-5)
	}
	return strings.Join(names, ", ")
}

func review(what, command string) func(*machine) Result {
	return plane(func(*machine) Result { return manual(command, "%s", what) })
}

// secured is an item that a Pod Security Standard settles where it holds by default.
func secured(what string, levels ...config.PodSecurity) func(*machine) Result {
	return plane(func(m *machine) Result {
		have := m.plane.Hardening.PodSecurity
		if slices.Contains(levels, have) {
			return pass("refused by default (pod-security=%s), but in %s", have, strings.Join(m.plane.Hardening.PodSecurityExempt, ", "))
		}
		return manual(fmt.Sprintf("--pod-security %s, or the label pod-security.kubernetes.io/enforce=%s of namespaces", levels[0], levels[0]), "%s are allowed by default", what)
	})
}

func policies() []check {
	const baseline, restricted = config.PodSecurityBaseline, config.PodSecurityRestricted
	return []check{
		{"5.1.1", "who is cluster-admin", asked(func(_ *machine, o *objects) Result {
			if len(o.admins) == 0 {
				return pass("nobody beside the built-in binding")
			}
			return manual("kubectl get clusterrolebindings", "these bindings make somebody an administrator: %s", few(o.admins))
		})},
		{"5.1.2", "who reads Secrets", review("look who may", "kubectl auth can-i --list --as=USER")},
		{"5.1.3", "wildcards in roles", review("look for \"*\" in your own roles", "kubectl get roles,clusterroles -A -o yaml")},
		{"5.1.4", "who creates pods", review("who may create pods has the rights of every service account of the namespace", "kubectl get rolebindings,clusterrolebindings -A")},
		{"5.1.5", "default service accounts", asked(func(_ *machine, o *objects) Result {
			if len(o.automounted) == 0 {
				return pass("no token of one is mounted by itself")
			}
			return manual("automountServiceAccountToken: false", "mounted by itself in: %s", few(o.automounted))
		})},
		{"5.1.6", "tokens only where they are needed", review("pods that do not talk to the API need none", "automountServiceAccountToken: false")},
		{"5.1.7", "group system:masters", review("the administrator's kubeconfig and Kedge's own controllers are in it; give people other users", "")},
		{"5.1.8", "bind, impersonate, escalate", review("look for these verbs in your own roles", "kubectl get roles,clusterroles -A -o yaml")},
		{"5.1.9", "who creates volumes", review("who may create PersistentVolumes may mount the host's files", "kubectl get clusterroles -o yaml")},
		{"5.1.10", "proxy of nodes", review("nodes/proxy is as good as root on the nodes; Kedge asks nodes by it, for administrators", "kubectl get clusterroles -o yaml")},
		{"5.1.11", "who approves certificates", review("Kedge's approver does; look who else may", "kubectl get clusterroles -o yaml")},
		{"5.1.12", "webhook configurations", review("who may write them sees and changes all objects", "kubectl get clusterroles -o yaml")},
		{"5.1.13", "who makes tokens of service accounts", review("serviceaccounts/token gives the rights of the account", "kubectl get roles,clusterroles -A -o yaml")},
		{"5.2.1", "pods are held to a policy", asked(func(m *machine, o *objects) Result {
			switch {
			case m.plane.Hardening.PodSecurity == baseline, m.plane.Hardening.PodSecurity == restricted:
				return pass("pod-security=%s", m.plane.Hardening.PodSecurity)
			case len(o.unlabelled) == 0:
				return pass("every namespace has a label")
			}
			return manual("--pod-security baseline, or a label pod-security.kubernetes.io/enforce", "namespaces without: %s", few(o.unlabelled))
		})},
		{"5.2.2", "privileged containers", secured("they", baseline, restricted)},
		{"5.2.3", "the host's processes", secured("pods that see them", baseline, restricted)},
		{"5.2.4", "the host's IPC", secured("pods that see it", baseline, restricted)},
		{"5.2.5", "the host's network", secured("pods in it", baseline, restricted)},
		{"5.2.6", "privilege escalation", secured("programs that gain privileges", restricted)},
		{"5.2.7", "root in containers", secured("containers that run as root", restricted)},
		{"5.2.8", "NET_RAW", secured("containers with it", restricted)},
		{"5.2.9", "capabilities", secured("containers that keep capabilities", restricted)},
		{"5.2.10", "HostProcess of Windows", plane(func(*machine) Result { return none("there are no nodes with Windows") })},
		{"5.2.11", "directories of the host", secured("they", baseline, restricted)},
		{"5.2.12", "ports of the host", secured("they", baseline, restricted)},
		{"5.3.1", "network policies are enforced", func(m *machine) Result {
			if m.node == nil {
				return none("no pods on this machine")
			}
			if m.node.NetworkPolicy {
				return pass("by Kedge")
			}
			return manual("leave out --disable network-policy, or use a CNI plugin that does", "not by Kedge on this node")
		}},
		{"5.3.2", "every namespace has network policies", asked(func(_ *machine, o *objects) Result {
			if len(o.unprotected) == 0 {
				return pass("every one")
			}
			return manual("a NetworkPolicy that denies by default", "none in: %s", few(o.unprotected))
		})},
		{"5.4.1", "Secrets as files", review("files are better than environment variables, which programs log", "")},
		{"5.4.2", "Secrets elsewhere", review("an external store may suit; here they are encrypted at rest", "")},
		{"5.5.1", "where images come from", review("no ImagePolicyWebhook; a policy engine can verify signatures", "")},
		{"5.6.1", "namespaces as borders", review("one for each tenant or purpose", "")},
		{"5.6.2", "seccomp", func(m *machine) Result {
			if m.settings == nil {
				return none("no pods on this machine")
			}
			return when(m.settings.Kubelet.SeccompDefault, "RuntimeDefault for pods that say nothing", arg("kubelet", "seccomp-default=true"))
		}},
		{"5.6.3", "security contexts", secured("pods without one", restricted)},
		{"5.6.4", "namespace default", asked(func(_ *machine, o *objects) Result {
			if o.inDefault == 0 {
				return pass("there are no pods in it")
			}
			return manual("", "%d pods are in it", o.inDefault)
		})},
	}
}
