// SPDX-License-Identifier: Apache-2.0

package joining

import (
	"context"
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	certutil "k8s.io/client-go/util/cert"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

const extension = "far.kedge.test"

// extensionPod is what answers. Arguments: node, certificate, key.
const extensionPod = `
apiVersion: v1
kind: Secret
metadata: {name: far}
type: kubernetes.io/tls
data: {tls.crt: %[2]s, tls.key: %[3]s}
---
apiVersion: v1
kind: Pod
metadata: {name: far, labels: {app: far}}
spec:
  nodeName: %[1]s
  containers:
  - name: server
    image: kedge.test/server:1
    env: [{name: TLS, value: /tls}, {name: PORT, value: "8443"}]
    readinessProbe: {httpGet: {path: /healthz, port: 8443, scheme: HTTPS}, periodSeconds: 1}
    volumeMounts: [{name: tls, mountPath: /tls}]
  volumes: [{name: tls, secret: {secretName: far}}]
---
apiVersion: v1
kind: Service
metadata: {name: far}
spec: {selector: {app: far}, ports: [{port: 443, targetPort: 8443}]}
`

// registrations make an API and a webhook of it. Arguments: namespace, certificate, API group.
const registrations = `
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1.%[3]s}
spec:
  group: %[3]s
  version: v1
  groupPriorityMinimum: 1000
  versionPriority: 10
  caBundle: %[2]s
  service: {namespace: %[1]s, name: far}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: %[3]s}
webhooks:
- name: %[3]s
  clientConfig: {caBundle: %[2]s, service: {namespace: %[1]s, name: far, path: /validate}}
  rules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]
  namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %[1]s}}
  sideEffects: None
  admissionReviewVersions: [v1]
`

// extend has a webhook and an API of a node's take part in the cluster's API, until the test ends.
func extend(t *testing.T, s *cluster.Session, n *cluster.Node) {
	t.Helper()
	chain, key, err := certutil.GenerateSelfSignedCertKey("far."+s.NS+".svc", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // before the namespace, which could not be deleted with an API that does not answer
		ctx, cancel := context.WithTimeout(context.Background(), minute)
		defer cancel()
		if _, err := s.Server.Kubectl(ctx, "delete", "--ignore-not-found", "apiservice/v1."+extension, "validatingwebhookconfiguration/"+extension); err != nil {
			t.Error(err)
		}
	})
	chain64 := base64.StdEncoding.EncodeToString(chain)
	s.Apply(extensionPod, n.Name(), chain64, base64.StdEncoding.EncodeToString(key))
	s.Ready("far") // before the API is registered: API servers ask what does not answer ever more seldom
	s.Apply(registrations, s.NS, chain64, extension)
}

// cutOff makes the pods of a node unreachable for servers, as Shield does with the node itself.
func cutOff(t *testing.T, c *cluster.Cluster, n *cluster.Node) {
	t.Helper()
	pods, err := c.Servers[0].Kubectl(cluster.Within(t, minute), "get", "node", n.Name(), "-o", "jsonpath={.spec.podCIDR}")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range c.Servers {
		rule := []string{"to", pods, "unreachable"}
		if _, err := s.Exec(cluster.Within(t, minute), append([]string{"ip", "rule", "add"}, rule...)...); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if _, err := s.Exec(context.Background(), append([]string{"ip", "rule", "delete"}, rule...)...); err != nil {
				t.Error(err)
			}
		})
	}
}

// extended uses what extend has made, through each of some servers.
func extended(t *testing.T, ns string, servers ...*cluster.Server) {
	t.Helper()
	for _, s := range servers {
		cluster.Eventually(t, s.Name()+" to have the API of the extension", func(ctx context.Context) error {
			return says(ctx, s, "greetings", "get", "--raw", "/apis/"+extension+"/v1")
		})
		create := func(ctx context.Context, verdict string) error {
			_, err := s.Kubectl(ctx, "-n", ns, "create", "configmap", "asked-"+s.Name(), "--from-literal=verdict="+verdict, "--dry-run=server")
			return err
		}
		for what, try := range map[string]func(context.Context) error{
			"a request to the extension": func(ctx context.Context) error {
				return says(ctx, s, `"from":"far"`, "get", "--raw", "/apis/"+extension+"/v1/greetings/"+s.Name())
			},
			"the webhook's yes": func(ctx context.Context) error { return create(ctx, "allow") },
			"the webhook's no": func(ctx context.Context) error {
				err := create(ctx, "deny")
				var exit *testbed.ExitError
				if !errors.As(err, &exit) || !strings.Contains(exit.Stderr, "no, says far") {
					return errors.Join(errors.New("it was not refused by the webhook"), err)
				}
				return nil
			},
		} {
			patiently(t, what+" from "+s.Name(), try)
		}
	}
}
