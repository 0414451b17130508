// SPDX-License-Identifier: Apache-2.0

package singlenode

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

func TestExecLogsAttach(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	n.Apply(cluster.ClientPod + `    stdin: true
---
apiVersion: v1
kind: Pod
metadata: {name: reader}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - {name: reader, image: "kedge.test/busybox:1", stdin: true, command: [sh, -c, "echo begin; while read line; do echo got $line; done"]}
`)
	n.Ready("client", "reader")
	t.Run("exec", func(t *testing.T) {
		out, err := n.ExecInput(n.Within(time.Minute), strings.NewReader("from outside\n"),
			cluster.Program, "kubectl", "-n", n.NS, "exec", "-i", "client", "--", "sh", "-c", "cat; hostname; exit 3")
		var exit *testbed.ExitError
		if !errors.As(err, &exit) || exit.Code != 3 || out != "from outside\nclient\n" {
			t.Errorf("output %q, error %v; want status 3", out, err)
		}
	})
	t.Run("attach and logs", func(t *testing.T) {
		cmd := n.Command(n.Within(time.Minute), cluster.Program, "kubectl", "-n", n.NS, "attach", "-i", "reader")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(in, "hello\n"); err != nil {
			t.Error(err)
		}
		for lines := bufio.NewScanner(out); ; {
			if !lines.Scan() {
				t.Fatal("attach ended without the answer")
			}
			if lines.Text() == "got hello" {
				break
			}
		}
		if err := errors.Join(in.Close(), cmd.Wait()); err != nil {
			t.Errorf("attach: %v", err)
		}
		if got := n.Kubectl("logs", "reader"); !strings.Contains(got, "begin\ngot hello") {
			t.Errorf("logs: %q", got)
		}
	})
}

func TestPortForward(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	n.Apply(cluster.ServerPod, "web", "", "")
	n.Ready("web")
	cmd := n.Command(n.Within(time.Minute), cluster.Program, "kubectl", "-n", n.NS, "port-forward", "--address", "0.0.0.0", "pod/web", ":8080")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Cancel() // it runs until it is killed
		_ = cmd.Wait()
	}()
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatal("port-forward ended")
	}
	var port int
	if _, err := fmt.Sscanf(lines.Text(), "Forwarding from 0.0.0.0:%d -> 8080", &port); err != nil {
		t.Fatalf("%q: %v", lines.Text(), err)
	}
	if got, err := get(n, fmt.Sprintf("http://%s:%d/", n.IP(), port)); err != nil || !strings.HasPrefix(got, "web ") {
		t.Errorf("answer %q, %v", got, err)
	}
}

// get asks from the host, which is outside of the cluster.
func get(n *cluster.Session, url string) (string, error) {
	req, err := http.NewRequestWithContext(n.Within(5*time.Second), http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = errors.New(res.Status)
	}
	return strings.TrimSpace(string(b)), err
}

func TestProbes(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	n.Apply(cluster.ClientPod)
	n.Apply(cluster.ServerPod, "web", `    livenessProbe: {httpGet: {path: /file, port: 8080}, periodSeconds: 1, failureThreshold: 1, initialDelaySeconds: 2}
    env: [{name: FILE, value: /alive/yes}]
    volumeMounts: [{name: alive, mountPath: /alive}]`, `
  - name: helper
    image: kedge.test/busybox:1
    command: [sh, -c, "touch /alive/yes; sleep 100000"]
    volumeMounts: [{name: alive, mountPath: /alive}]
  terminationGracePeriodSeconds: 1
  volumes: [{name: alive, emptyDir: {}}]`)
	n.Kubectl("expose", "pod", "web", "--port=80", "--target-port=8080")
	n.Ready("client", "web")
	endpoints := []string{"get", "endpointslices", "-l", "kubernetes.io/service-name=web", "-o", "jsonpath={.items[*].endpoints[*].conditions.ready}"}
	n.Becomes("true", endpoints...)
	ip := n.Kubectl("get", "pod", "web", "-o", "jsonpath={.status.podIP}")
	n.InPod("client", "wget -q -O- --post-data= 'http://"+ip+":8080/healthz?ok=false'")
	n.Becomes("false", endpoints...)
	n.InPod("client", "wget -q -O- --post-data= 'http://"+ip+":8080/healthz?ok=true'")
	n.Becomes("true", endpoints...)

	restarts := []string{"get", "pod", "web", "-o", `jsonpath={.status.containerStatuses[?(@.name=="server")].restartCount}`}
	before := n.Kubectl(restarts...)
	n.Kubectl("exec", "web", "-c", "helper", "--", "rm", "/alive/yes")
	n.Eventually("a restart by the liveness probe", func() error {
		now, err := n.Try(restarts...)
		if err == nil && now == before {
			err = fmt.Errorf("%s restarts", now)
		}
		return err
	})
}

func TestMemoryLimit(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	n.Apply(cluster.ClientPod)
	n.Apply(cluster.ServerPod, "web", `    resources: {limits: {memory: 64Mi, cpu: 500m}}`, "")
	n.Ready("client", "web")
	ip := n.Kubectl("get", "pod", "web", "-o", "jsonpath={.status.podIP}")
	if _, err := n.Try("exec", "client", "--", "wget", "-q", "-O-", "--post-data=", "http://"+ip+":8080/memory?mib=200"); err == nil {
		t.Error("200 MiB fit into a limit of 64 MiB")
	}
	n.Becomes("OOMKilled 137", "get", "pod", "web", "-o",
		"jsonpath={.status.containerStatuses[0].lastState.terminated.reason} {.status.containerStatuses[0].lastState.terminated.exitCode}")
	n.Ready("web") // restarted
}

func TestConfigAndSecrets(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	n.Apply(`
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {colour: red, file: "line 1\nline 2\n"}
---
apiVersion: v1
kind: Secret
metadata: {name: keys}
stringData: {password: s3cret}
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: client
    image: kedge.test/busybox:1
    command: [sleep, "100000"]
    env:
    - {name: COLOUR, valueFrom: {configMapKeyRef: {name: settings, key: colour}}}
    - {name: PASSWORD, valueFrom: {secretKeyRef: {name: keys, key: password}}}
    - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    volumeMounts:
    - {name: settings, mountPath: /settings}
    - {name: keys, mountPath: /keys}
    - {name: token, mountPath: /token}
  volumes:
  - {name: settings, configMap: {name: settings}}
  - {name: keys, secret: {secretName: keys, defaultMode: 0400}}
  - name: token
    projected:
      sources:
      - serviceAccountToken: {path: token, audience: "", expirationSeconds: 600}
      - downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}
`)
	n.Ready("client")
	if got := n.InPod("client", `echo $COLOUR $PASSWORD; cat /settings/file /keys/password; stat -L -c " %a" /keys/password; cat /token/name; df /keys | grep -c tmpfs`); got != "red s3cret\nline 1\nline 2\ns3cret 400\nclient1" {
		t.Errorf("what the pod sees: %q", got)
	}
	if got, want := n.InPod("client", "echo $POD_IP"), n.Kubectl("get", "pod", "client", "-o", "jsonpath={.status.podIP}"); got != want {
		t.Errorf("POD_IP is %q, want %q", got, want)
	}
	// The API takes the token for the service account; that may not list secrets.
	ca := n.InPod("client", "cat /var/run/secrets/kubernetes.io/serviceaccount/ca.crt")
	if err := n.WriteFile("/tmp/"+n.NS+".ca", []byte(ca), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{"api": "200", "api/v1/secrets": "403"} {
		got, err := n.Exec(n.Within(minute), "curl", "-sS", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", "/tmp/"+n.NS+".ca",
			"-H", "Authorization: Bearer "+n.InPod("client", "cat /token/token"), "https://10.43.0.1/"+path)
		if err != nil || got != want {
			t.Errorf("%s with the projected token: %s, %v; want %s", path, got, err, want)
		}
	}
	n.Kubectl("patch", "configmap", "settings", "-p", `{"data":{"colour":"blue"}}`)
	n.EventuallyWithin(150*time.Second, "the changed ConfigMap in the pod", func() error {
		if got, err := n.Try("exec", "client", "--", "cat", "/settings/colour"); err != nil || got != "blue" {
			return errors.Join(err, fmt.Errorf("it is %q", got))
		}
		return nil
	})
}

func TestVolumes(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	n.Apply(`
apiVersion: v1
kind: Pod
metadata: {name: two}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: one
    image: kedge.test/busybox:1
    command: [sh, -c, "echo shared >/disk/file; echo host >/host/file; sleep 100000"]
    volumeMounts: [{name: disk, mountPath: /disk}, {name: memory, mountPath: /memory}, {name: host, mountPath: /host}]
  - name: other
    image: kedge.test/busybox:1
    command: [sleep, "100000"]
    volumeMounts: [{name: disk, mountPath: /disk, readOnly: true}]
  volumes:
  - {name: disk, emptyDir: {}}
  - {name: memory, emptyDir: {medium: Memory, sizeLimit: 8Mi}}
  - {name: host, hostPath: {path: /var/lib/%s, type: DirectoryOrCreate}}
`, n.NS)
	n.Ready("two")
	if got := n.Kubectl("exec", "two", "-c", "other", "--", "sh", "-c", "cat /disk/file; touch /disk/x 2>&1 || true"); !strings.Contains(got, "shared") || !strings.Contains(got, "Read-only") {
		t.Errorf("emptyDir in the other container: %q", got)
	}
	if got := n.Kubectl("exec", "two", "-c", "one", "--", "sh", "-c", "df -k /memory | tail -1"); !strings.Contains(got, "tmpfs") || !strings.Contains(got, "8192") {
		t.Errorf("emptyDir in memory: %q", got)
	}
	if b, err := n.ReadFile("/var/lib/" + n.NS + "/file"); err != nil || string(b) != "host\n" {
		t.Errorf("hostPath: %q, %v", b, err)
	}
}

func TestInitAndSidecarContainers(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	n.Apply(`
apiVersion: v1
kind: Pod
metadata: {name: ordered}
spec:
  restartPolicy: Never
  initContainers:
  - {name: first, image: "kedge.test/busybox:1", command: [sh, -c, "echo first >>/d/order"], volumeMounts: [{name: d, mountPath: /d}]}
  - name: sidecar
    image: kedge.test/busybox:1
    restartPolicy: Always
    command: [sh, -c, "trap 'echo sidecar-end; exit' TERM; echo sidecar >>/d/order; touch /d/up; while :; do sleep 0.2; done"]
    startupProbe: {exec: {command: [test, -e, /d/up]}, periodSeconds: 1}
    volumeMounts: [{name: d, mountPath: /d}]
  - {name: second, image: "kedge.test/busybox:1", command: [sh, -c, "echo second >>/d/order"], volumeMounts: [{name: d, mountPath: /d}]}
  containers:
  - {name: main, image: "kedge.test/busybox:1", command: [sh, -c, "echo main >>/d/order; cat /d/order"], volumeMounts: [{name: d, mountPath: /d}]}
  volumes: [{name: d, emptyDir: {}}]
`)
	n.Becomes("Succeeded", "get", "pod", "ordered", "-o", "jsonpath={.status.phase}")
	if got := n.Kubectl("logs", "ordered", "-c", "main"); got != "first\nsidecar\nsecond\nmain" {
		t.Errorf("order: %q", got)
	}
	if got := n.Kubectl("logs", "ordered", "-c", "sidecar"); !strings.Contains(got, "sidecar-end") {
		t.Errorf("the sidecar was not asked to end after the main container: %q", got)
	}
}

func TestUserNamespace(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	n.Apply(strings.Replace(cluster.ClientPod, "spec:\n", "spec:\n  hostUsers: false\n", 1))
	n.Ready("client")
	fields := strings.Fields(n.InPod("client", "id -u; cat /proc/self/uid_map"))
	if len(fields) != 4 || fields[0] != "0" || fields[1] != "0" || fields[2] == "0" {
		t.Errorf("uid and uid_map: %v; root in the pod must be somebody else outside", fields)
	}
}

func TestGracefulTermination(t *testing.T) {
	t.Parallel()
	n := shared.Server(t).Session(t)
	n.Apply(cluster.ServerPod, "web", `    env: [{name: TERM_DELAY, value: 2s}]`, "")
	n.Apply(cluster.ClientPod) // its grace period is 0
	n.Ready("web", "client")
	logs := make(chan string, 1)
	go func() {
		out, err := n.Server.Kubectl(n.Within(time.Minute), "-n", n.NS, "logs", "-f", "web")
		logs <- out + fmt.Sprint(err)
	}()
	start := time.Now()
	n.Kubectl("delete", "pod", "web", "--wait", "--timeout=50s")
	if d := time.Since(start); d < 2*time.Second || d > 25*time.Second {
		t.Errorf("the pod was gone after %s; it takes 2 s to end, and its grace period is 30 s", d)
	}
	if got := <-logs; !strings.Contains(got, "SIGTERM: stopping\nstopped\n") {
		t.Errorf("the pod's last words: %q", got)
	}
	start = time.Now()
	n.Kubectl("delete", "pod", "client", "--wait", "--timeout=50s")
	if d := time.Since(start); d > 25*time.Second {
		t.Errorf("a pod with a grace period of 0 was gone after %s", d)
	}
}
