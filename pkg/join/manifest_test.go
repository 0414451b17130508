// SPDX-License-Identifier: Apache-2.0

package join

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"testing"
	"text/template"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/kubernetes/pkg/registry/rbac/validation"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac/bootstrappolicy"

	"github.com/kedge-io/kedge/manifests"
)

// joinManifest is manifests/join.yaml, read strictly, together with the rules that every API server has.
func joinManifest(t *testing.T) (info corev1.ConfigMap, rules *rbac.RBACAuthorizer) {
	t.Helper()
	text, err := manifests.FS.ReadFile("join.yaml")
	if err != nil {
		t.Fatal(err)
	}
	tmpl, err := template.New("join.yaml").Option("missingkey=error").Parse(string(text))
	if err != nil {
		t.Fatal(err)
	}
	var rendered bytes.Buffer
	if err := tmpl.Execute(&rendered, struct{ ServerCAData string }{base64.StdEncoding.EncodeToString([]byte("the CA"))}); err != nil {
		t.Fatal(err)
	}
	var (
		roles        []*rbacv1.Role
		bindings     []*rbacv1.RoleBinding
		clusterRoles []*rbacv1.ClusterRole
		clusterBinds []*rbacv1.ClusterRoleBinding
	)
	for _, r := range bootstrappolicy.ClusterRoles() {
		clusterRoles = append(clusterRoles, &r)
	}
	for _, b := range bootstrappolicy.ClusterRoleBindings() {
		clusterBinds = append(clusterBinds, &b)
	}
	for dec := yaml.NewYAMLToJSONDecoder(&rendered); ; {
		var raw json.RawMessage
		if err := dec.Decode(&raw); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		var kind struct{ Kind string }
		if err := json.Unmarshal(raw, &kind); err != nil {
			t.Fatal(err)
		}
		switch kind.Kind {
		case "ConfigMap":
			info = decode[corev1.ConfigMap](t, raw)
		case "Role":
			roles = append(roles, new(decode[rbacv1.Role](t, raw)))
		case "RoleBinding":
			bindings = append(bindings, new(decode[rbacv1.RoleBinding](t, raw)))
		case "ClusterRole":
			clusterRoles = append(clusterRoles, new(decode[rbacv1.ClusterRole](t, raw)))
		case "ClusterRoleBinding":
			clusterBinds = append(clusterBinds, new(decode[rbacv1.ClusterRoleBinding](t, raw)))
		default:
			t.Fatalf("unexpected %s", kind.Kind)
		}
	}
	_, static := validation.NewTestRuleResolver(roles, bindings, clusterRoles, clusterBinds)
	return info, rbac.New(static, static, static, static)
}

func decode[T any](t *testing.T, raw []byte) (o T) {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&o); err != nil {
		t.Fatal(err)
	}
	return o
}

func TestManifestClusterInfo(t *testing.T) {
	info, _ := joinManifest(t)
	if info.Namespace != "kube-public" || info.Name != "cluster-info" {
		t.Errorf("%s/%s", info.Namespace, info.Name)
	}
	if diff := cmp.Diff(kubeconfigOf([]byte("the CA")), info.Data["kubeconfig"]); diff != "" {
		t.Errorf("the tests use another one (-manifest +tests)\n%s", diff)
	}
}

// TestManifestRights asks upstream's authorizer who may do what.
func TestManifestRights(t *testing.T) {
	_, rules := joinManifest(t)
	users := map[string]*user.DefaultInfo{
		"anybody":      {Name: "system:anonymous", Groups: []string{"system:unauthenticated"}},
		"agent token":  {Name: "system:bootstrap:abc123", Groups: append(Agent.groups(), "system:bootstrappers", "system:authenticated")},
		"server token": {Name: "system:bootstrap:abc123", Groups: append(Server.groups(), "system:bootstrappers", "system:authenticated")},
		"other token":  {Name: "system:bootstrap:abc123", Groups: []string{"system:bootstrappers", "system:authenticated"}},
		"node":         {Name: UserNodePrefix + "n1", Groups: []string{GroupNodes, "system:authenticated"}},
		"server":       {Name: UserServerPrefix + "n1", Groups: []string{GroupServers, "system:authenticated"}},
		"pod":          {Name: "system:serviceaccount:default:default", Groups: []string{"system:serviceaccounts", "system:authenticated"}},
	}
	resource := func(verb, namespace, group, resource, name string) authorizer.AttributesRecord {
		return authorizer.AttributesRecord{Verb: verb, Namespace: namespace, APIGroup: group, APIVersion: "v1", Resource: resource, Name: name, ResourceRequest: true}
	}
	path := func(verb, path string) authorizer.AttributesRecord {
		return authorizer.AttributesRecord{Verb: verb, Path: path}
	}
	tokens := []string{"agent token", "server token"}
	authenticated := []string{"agent token", "node", "other token", "pod", "server", "server token"}
	for _, tt := range []struct {
		request authorizer.AttributesRecord
		allowed []string
	}{
		{resource("get", "kube-public", "", "configmaps", "cluster-info"), []string{"anybody"}},
		{resource("list", "kube-public", "", "configmaps", ""), nil},
		{resource("update", "kube-public", "", "configmaps", "cluster-info"), nil},
		{path("get", "/version"), append([]string{"anybody"}, authenticated...)},
		{resource("create", "", "authentication.k8s.io", "selfsubjectreviews", ""), authenticated},
		{resource("get", "kube-system", "", "configmaps", ConfigMapCluster), append([]string{"node", "server"}, tokens...)},
		{resource("update", "kube-system", "", "configmaps", ConfigMapCluster), []string{"server"}},
		{resource("watch", "kube-system", "", "configmaps", ConfigMapServers), []string{"node"}},
		{resource("get", "kube-system", "", "configmaps", "coredns-custom"), nil},
		{resource("create", "", "certificates.k8s.io", "certificatesigningrequests", ""), tokens},
		{resource("get", "", "certificates.k8s.io", "certificatesigningrequests", "x"), tokens},
		{resource("update", "", "certificates.k8s.io", "certificatesigningrequests/approval", "x"), nil},
		{resource("delete", "", "certificates.k8s.io", "certificatesigningrequests", "x"), nil},
		{resource("list", "kube-system", "", "secrets", ""), nil},
		{resource("get", "kube-system", "", "secrets", "bootstrap-token-abc123"), nil},
		{resource("create", "", "", "nodes", ""), nil},
		{path("get", PathKeys), []string{"server"}},
		{path("get", PathMembers), []string{"server"}},
		{path("post", PathMembers), []string{"server"}},
		{path("post", PathMembers+"/n1/promote"), []string{"server"}},
		{path("delete", PathMembers+"/n1"), []string{"server"}},
		{path("get", "/kedge/v1/connect"), []string{"node"}},
	} {
		var allowed []string
		for name, u := range users {
			tt.request.User = u
			if decision, _, _ := rules.Authorize(t.Context(), tt.request); decision == authorizer.DecisionAllow {
				allowed = append(allowed, name)
			}
		}
		slices.Sort(allowed)
		slices.Sort(tt.allowed)
		if !slices.Equal(allowed, tt.allowed) {
			t.Errorf("%s %s%s %s: allowed to %q, want %q", tt.request.Verb, tt.request.Path, tt.request.Resource, tt.request.Name, allowed, tt.allowed)
		}
	}
}
