// SPDX-License-Identifier: Apache-2.0

package singlenode

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
)

const minute = time.Minute

func unexpected(got string) error { return fmt.Errorf("unexpected: %q", got) }

// deployment is three test servers behind a Service with two ports.
const deployment = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: server
        image: kedge.test/server:1
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}, {name: alt, port: 81, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: sticky}
spec:
  selector: {app: web}
  sessionAffinity: ClientIP
  ports: [{port: 80, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: headless}
spec:
  clusterIP: None
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}]
`

func TestServices(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	n.Apply(cluster.ClientPod)
	n.Apply(deployment)
	n.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	n.Ready("client")

	ask := func(url string, times int) map[string]int {
		t.Helper()
		names := map[string]int{}
		for line := range strings.Lines(n.InPod("client", fmt.Sprintf("for i in $(seq %d); do timeout 5 wget -q -O- %s || echo failed; done", times, url))) {
			names[strings.Fields(line)[0]]++
		}
		return names
	}
	t.Run("ClusterIP", func(t *testing.T) {
		for _, url := range []string{"http://web/", "http://web:81/"} {
			if got := ask(url, 30); len(got) != 3 || got["failed"] > 0 {
				t.Errorf("%s is answered by %v; want all three pods", url, got)
			}
		}
	})
	t.Run("ClusterIP from the node", func(t *testing.T) {
		ip := n.Kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
		out, err := n.Exec(n.Within(minute), "curl", "-sS", "-m", "5", "http://"+ip+":81/")
		if err != nil || !strings.HasPrefix(out, "web-") {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("session affinity", func(t *testing.T) {
		if got := ask("http://sticky/", 15); len(got) != 1 || got["failed"] > 0 {
			t.Errorf("answered by %v; want one pod", got)
		}
	})
	t.Run("NodePort", func(t *testing.T) {
		port := n.Kubectl("get", "service", "web", "-o", "jsonpath={.spec.ports[0].nodePort}")
		for _, url := range []string{"http://" + n.IP() + ":" + port + "/"} {
			if got, err := get(n, url); err != nil || !strings.HasPrefix(got, "web-") {
				t.Errorf("from outside, %s: %q, %v", url, got, err)
			}
			if got := ask(url, 3); got["failed"] > 0 {
				t.Errorf("from a pod, %s: %v", url, got)
			}
		}
	})
	t.Run("a pod reaches itself through its Service", func(t *testing.T) {
		n.Apply(`{apiVersion: v1, kind: Pod, metadata: {name: self, labels: {app: self}}, spec: {terminationGracePeriodSeconds: 0,
  containers: [{name: c, image: "kedge.test/busybox:1", command: [sh, -c, "echo me >/var/www/index.html; httpd -f -h /var/www"]}]}}`)
		n.Kubectl("expose", "pod", "self", "--port=80")
		n.Ready("self")
		n.Eventually("an answer of the pod to itself", func() error {
			if got, err := n.Try("exec", "self", "--", "timeout", "3", "wget", "-q", "-O-", "http://self/"); err != nil || got != "me" {
				return fmt.Errorf("%q, %w", got, err)
			}
			return nil
		})
	})
	t.Run("headless", func(t *testing.T) {
		ips := strings.Fields(n.Kubectl("get", "pods", "-l", "app=web", "-o", "jsonpath={.items[*].status.podIP}"))
		got := n.InPod("client", "nslookup headless."+n.NS+".svc.cluster.local")
		for _, ip := range ips {
			if !strings.Contains(got, ip) {
				t.Errorf("%s is missing in: %s", ip, got)
			}
		}
	})
	t.Run("endpoints follow the pods", func(t *testing.T) {
		n.Kubectl("scale", "deployment/web", "--replicas=1")
		n.Eventually("one pod to answer alone", func() error {
			if got := ask("http://web/", 10); len(got) != 1 || got["failed"] > 0 {
				return fmt.Errorf("answers: %v", got)
			}
			return nil
		})
		n.Kubectl("scale", "deployment/web", "--replicas=0")
		n.Eventually("no pod to answer", func() error {
			if got := ask("http://web/", 1); got["failed"] != 1 {
				return fmt.Errorf("answers: %v", got)
			}
			return nil
		})
	})
}

// TestCourse is what a Kubernetes course does with a Deployment, and no other test does.
func TestCourse(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	n.Kubectl("create", "deployment", "web", "--image=kedge.test/server:1", "--replicas=2")
	n.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	n.Kubectl("expose", "deployment", "web", "--port=80", "--target-port=8080")
	for _, mode := range []string{"client", "server"} {
		n.Kubectl("create", "configmap", "never", "--from-literal=a=b", "--dry-run="+mode)
	}
	if _, err := n.Try("get", "configmap", "never"); err == nil {
		t.Error("a dry run made a ConfigMap")
	}
	pods := func() string {
		return n.Kubectl("get", "pods", "-l", "app=web", "-o", "jsonpath={.items[?(@.status.phase==\"Running\")].metadata.uid}")
	}
	before := pods()
	n.Kubectl("rollout", "restart", "deployment/web")
	n.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	if pods() == before {
		t.Error("rollout restart left the pods as they were")
	}
	n.Kubectl("set", "image", "deployment/web", "server=kedge.test/none:1")
	n.Kubectl("rollout", "undo", "deployment/web")
	n.Kubectl("rollout", "status", "deployment/web", "--timeout=55s")
	if got := n.Kubectl("run", "once", "-i", "--rm", "--restart=Never", "--image=kedge.test/busybox:1", "--", "wget", "-q", "-O-", "http://web/"); !strings.HasPrefix(got, "web-") {
		t.Errorf("kubectl run -i: %q", got)
	}
	for _, kind := range []string{"events", "all", "deployment/web"} {
		n.Kubectl("get", kind)
	}
	if got := n.Kubectl("describe", "deployment", "web"); !strings.Contains(got, "2 available") {
		t.Errorf("describe: %s", got)
	}
}

func TestHostPortAndHostNetwork(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	n.Apply(cluster.ServerPod, "port", `    ports: [{containerPort: 8080, hostPort: 18080}]`, "")
	n.Apply(cluster.ServerPod, "host", `    env: [{name: PORT, value: "18081"}]`, "  hostNetwork: true")
	n.Ready("port")
	if got, err := get(n, "http://"+n.IP()+":18080/"); err != nil || !strings.HasPrefix(got, "port ") {
		t.Errorf("hostPort from outside: %q, %v", got, err)
	}
	n.Eventually("hostNetwork to answer", func() error {
		got, err := get(n, "http://"+n.IP()+":18081/")
		if err == nil && !strings.HasPrefix(got, n.Name()+" ") {
			err = unexpected(got)
		}
		return err
	})
	if got := n.Kubectl("get", "pod", "host", "-o", "jsonpath={.status.podIP}"); got != n.IP() {
		t.Errorf("a pod with hostNetwork has the address %s", got)
	}
	n.Kubectl("delete", "pod", "port", "--timeout=50s")
	n.Eventually("the hostPort to be free", func() error {
		if got, err := get(n, "http://"+n.IP()+":18080/"); err == nil {
			return unexpected(got)
		}
		return nil
	})
}
