// SPDX-License-Identifier: Apache-2.0

package servicelb

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
)

const (
	// leaseName is that of the lease, a ConfigMap, for all addresses that any node may announce; one for a Service with
	// externalTrafficPolicy Local has the Service's UID behind it.
	leaseName = "kedge-servicelb"
	roleName  = "kedge:servicelb"
)

// leaseOf is the name of the lease whose holder announces a Service's addresses.
func leaseOf(svc *corev1.Service) string {
	if local(svc) {
		return leaseName + "-" + string(svc.UID)
	}
	return leaseName
}

// syncLeases makes the leases of the Services that have addresses of the pool, and lets nodes write these, by name: the other ConfigMaps in
// kube-system are none of their business. Without such a Service there is neither lease nor Role.
func (c *Controller) syncLeases(ctx context.Context, services []*corev1.Service, verdicts map[types.NamespacedName]verdict) error {
	want := sets.Set[string]{}
	if len(c.cfg.Pool()) > 0 {
		for _, svc := range services {
			if len(verdicts[nameOf(svc)].ingress) > 0 {
				want.Insert(leaseOf(svc))
			}
		}
	}
	if c.leases != nil && c.leases.Equal(want) {
		return nil
	}
	client := c.cfg.Client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	list, err := client.List(ctx, metav1.ListOptions{LabelSelector: Class})
	if err != nil {
		return fmt.Errorf("leases of floating addresses: %w", err)
	}
	have, errs := sets.Set[string]{}, []error{}
	for _, l := range list.Items {
		have.Insert(l.Name)
		if !want.Has(l.Name) {
			errs = append(errs, ignoreNotFound(client.Delete(ctx, l.Name, metav1.DeleteOptions{})))
		}
	}
	for name := range want.Difference(have) {
		_, err := client.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{Class: ""}}}, metav1.CreateOptions{})
		errs = append(errs, err)
	}
	if err := errors.Join(append(errs, c.writeRole(ctx, want))...); err != nil {
		return fmt.Errorf("leases of floating addresses: %w", err)
	}
	c.leases = want
	return nil
}

// writeRole lets nodes write certain leases.
func (c *Controller) writeRole(ctx context.Context, leases sets.Set[string]) error {
	roles, bindings := c.cfg.Client.RbacV1().Roles(metav1.NamespaceSystem), c.cfg.Client.RbacV1().RoleBindings(metav1.NamespaceSystem)
	if leases.Len() == 0 {
		return errors.Join(ignoreNotFound(bindings.Delete(ctx, roleName, metav1.DeleteOptions{})), ignoreNotFound(roles.Delete(ctx, roleName, metav1.DeleteOptions{})))
	}
	role := &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: roleName}, Rules: []rbacv1.PolicyRule{{
		APIGroups: []string{corev1.GroupName}, Resources: []string{"configmaps"}, ResourceNames: sets.List(leases), Verbs: []string{"get", "list", "watch", "update"},
	}}}
	_, err := roles.Update(ctx, role, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		_, err = roles.Create(ctx, role, metav1.CreateOptions{})
	}
	if err != nil {
		return err
	}
	_, err = bindings.Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: roleName},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: roleName},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: "system:nodes"}},
	}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

func ignoreNotFound(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
