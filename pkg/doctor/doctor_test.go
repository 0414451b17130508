// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kedge-io/kedge/pkg/check"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/supervise"
)

func now() time.Time { return time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC) }

func report(change func(*NodeReport)) Facts {
	r := &NodeReport{Node: "n1", Version: "v1"}
	change(r)
	return Facts{Now: now(), Reports: map[string]*NodeReport{"n1": r}}
}

func pod(change func(*corev1.Pod)) Facts {
	p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "u", CreationTimestamp: metav1.NewTime(now().Add(-time.Hour))}}
	p.Status.Phase = corev1.PodPending
	change(&p)
	return Facts{Now: now(), Pods: []corev1.Pod{p}}
}

func waiting(reason, message string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", RestartCount: 7,
			State:                corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}},
			LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 137, Reason: "OOMKilled"}}}}
	}
}

func member(change func(*datastore.Health)) Facts {
	return report(func(r *NodeReport) {
		r.Datastore = &datastore.Health{HasLeader: true, Leader: true, Size: 20 << 20, InUse: 10 << 20, Quota: 2 << 30, Members: make([]datastore.Member, 3)}
		change(r.Datastore)
	})
}

// Each case is one thing that is wrong: one finding of that level, with these words in its text and its remedy.
func TestJudge(t *testing.T) {
	peer := netip.MustParseAddrPort("192.0.2.2:2380")
	for name, tt := range map[string]struct {
		facts        Facts
		level        Level
		about        string
		text, remedy string
	}{
		"no API": {Facts{APIError: "connection refused"}, Problem, "cluster", "connection refused", "kedge status"},
		"silent": {Facts{Silent: map[string]string{"n2": "no tunnel"}}, Problem, "n2", "no tunnel", "Is the machine on"},
		"process": {report(func(r *NodeReport) {
			r.Processes = []supervise.ProcessStatus{{Name: "node", Components: []supervise.Component{{Name: "kubelet", State: supervise.Running, Reason: "waits"}}}}
		}), Problem, "n1", "kubelet in [node]", "kedge status"},
		"certificate ended": {report(func(r *NodeReport) {
			r.Certificates = []pki.CertStatus{{Name: "apiserver", DaysLeft: -1, NotAfter: now()}}
		}), Problem, "n1", "apiserver has ended", "certificates.md"},
		"certificate ends": {report(func(r *NodeReport) {
			r.Certificates = []pki.CertStatus{{Name: "apiserver", DaysLeft: 3, Warning: "soon"}}
		}), Warning, "n1", "soon", "certificates.md"},
		"preflight": {report(func(r *NodeReport) {
			r.Preflight.Groups = []check.GroupReport{{Probes: []check.ProbeReport{{Name: "fsync", Result: check.Result{Status: check.Warning, Finding: "99 ms", Remedy: "another disk"}},
				{Name: "fine", Result: check.Result{Status: check.Pass}}}}}
		}), Warning, "n1", "99 ms", "another disk"},
		"part of a probe": {report(func(r *NodeReport) {
			r.Preflight.Groups = []check.GroupReport{{Probes: []check.ProbeReport{{Name: "ports", Result: check.Result{Status: check.Fail, Finding: "a part",
				Items: []check.Item{{Name: "fine", Result: check.Result{Status: check.Pass}}, {Name: "6443", Result: check.Result{Status: check.Fail, Finding: "taken", Remedy: "stop it"}}}}}}}}
		}), Problem, "n1", "6443: taken", "stop it"},
		"dns":      {report(func(r *NodeReport) { r.DNSError = "timeout" }), Problem, "n1", "timeout", "dns.md"},
		"services": {report(func(r *NodeReport) { r.Services = map[string]string{"10.43.0.1": "refused"} }), Problem, "n1", "10.43.0.1:443", "kube-proxy"},
		"closed port": {report(func(r *NodeReport) {
			r.Ways = []Way{{Path: Path{"n2", TCP, peer, "the datastore", false}, Error: "timeout"}, {Path: Path{"n3", TCP, peer, "the datastore", false}}}
		}), Problem, "n1", "no way to the datastore of n2 (192.0.2.2:2380)", "TCP port 2380 from n1 to n2"},
		"closed kubelet": {report(func(r *NodeReport) {
			r.Ways = []Way{{Path: Path{"n2", TCP, peer, "the kubelet", true}, Error: "timeout"}}
		}), Warning, "n1", "the kubelet", "tunnel"},
		"overlay": {report(func(r *NodeReport) {
			r.Ways = []Way{{Path: Path{"n2", Overlay, netip.AddrPortFrom(peer.Addr(), 0), "the pods", false}, Error: "no reply"}}
		}), Problem, "n1", "no reply", "UDP port 8472"},
		"mtu": {report(func(r *NodeReport) {
			r.Ways = []Way{{Path: Path{"n2", Overlay, peer, "the pods", false}, Error: (&mtuError{1450, errors.New("no reply")}).Error()}}
		}), Problem, "n1", "1450 bytes", "smaller MTU"},
		"clock":           {Facts{Skew: map[string]time.Duration{"n1": -700 * time.Millisecond, "n2": time.Millisecond}}, Warning, "n1", "700ms behind", "chrony"},
		"clock far":       {Facts{Skew: map[string]time.Duration{"n1": time.Hour}}, Problem, "n1", "1h0m0s ahead", "chrony"},
		"versions":        {Facts{Reports: map[string]*NodeReport{"a": {Version: "v1"}, "b": {Version: "v2"}}}, Warning, "cluster", "v1 on a; v2 on b", "upgrade"},
		"no leader":       {member(func(h *datastore.Health) { h.HasLeader = false }), Problem, "n1", "no leader", "ha.md"},
		"learner":         {member(func(h *datastore.Health) { h.Learner = true }), Warning, "n1", "learner", "voter"},
		"behind":          {member(func(h *datastore.Health) { h.Behind = 6000 }), Warning, "n1", "6000 entries", "disk"},
		"slow":            {member(func(h *datastore.Health) { h.Took = time.Second }), Warning, "n1", "took 1s", "slow"},
		"full":            {member(func(h *datastore.Health) { h.Size, h.InUse = 1900<<20, 1800<<20 }), Warning, "n1", "1900Mi of at most 2Gi", "delete"},
		"fragmented":      {member(func(h *datastore.Health) { h.Size = 500 << 20 }), Warning, "n1", "500Mi", "defragmentation"},
		"alarm":           {member(func(h *datastore.Health) { h.Alarms = []string{"NOSPACE of n1"} }), Problem, "cluster", "NOSPACE of n1", "disks.md"},
		"two members":     {member(func(h *datastore.Health) { h.Members = h.Members[:2] }), Warning, "cluster", "two members", "third server"},
		"datastore error": {report(func(r *NodeReport) { r.DatastoreError = "refused" }), Problem, "n1", "refused", "ha.md"},
		"not ready": {Facts{Nodes: []corev1.Node{{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{
			{Type: corev1.NodeReady, Status: corev1.ConditionUnknown, Message: "stopped posting"}, {Type: corev1.NodeDiskPressure, Status: corev1.ConditionFalse}}}}}}, Problem, "n1", "stopped posting", "kedge status"},
		"pressure": {Facts{Nodes: []corev1.Node{{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{
			{Type: corev1.NodeDiskPressure, Status: corev1.ConditionTrue, Message: "full"}}}}}}, Problem, "n1", "DiskPressure: full", "describe node"},
		"cordoned": {Facts{Nodes: []corev1.Node{{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Spec: corev1.NodeSpec{Unschedulable: true}}}}, Warning, "n1", "cordoned", "uncordon n1"},
		"unschedulable": {pod(func(p *corev1.Pod) {
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: "0/1 nodes: Insufficient cpu"}}
		}), Problem, "pod shop/web", "Insufficient cpu", "requests"},
		"image":  {pod(waiting("ImagePullBackOff", "not found")), Problem, "pod shop/web", "not found", "kedge images import"},
		"crash":  {pod(waiting("CrashLoopBackOff", "back-off")), Problem, "pod shop/web", "7 times, the last time with exit status 137", "memory"},
		"config": {pod(waiting("CreateContainerConfigError", `secret "x" not found`)), Problem, "pod shop/web", `secret "x"`, "Create"},
		"failed": {pod(func(p *corev1.Pod) { p.Status.Phase, p.Status.Reason = corev1.PodFailed, "Evicted" }), Problem, "pod shop/web", "Evicted", "describe"},
		"no end": {pod(func(p *corev1.Pod) {
			p.DeletionTimestamp, p.Spec.NodeName = &metav1.Time{Time: now().Add(-time.Hour)}, "n9"
		}), Problem, "pod shop/web", "1h0m0s ago", "node remove n9"},
		"finalizer": {pod(func(p *corev1.Pod) {
			p.DeletionTimestamp, p.Finalizers = &metav1.Time{Time: now().Add(-time.Hour)}, []string{"x/y"}
		}), Problem, "pod shop/web", "x/y", "controller"},
		"creating": func() struct {
			facts        Facts
			level        Level
			about        string
			text, remedy string
		} {
			f := pod(waiting("ContainerCreating", ""))
			f.Events = []corev1.Event{{InvolvedObject: corev1.ObjectReference{UID: "u"}, Reason: "FailedMount", Message: "new", LastTimestamp: metav1.NewTime(now())},
				{InvolvedObject: corev1.ObjectReference{UID: "u"}, Reason: "Old", Message: "old", LastTimestamp: metav1.NewTime(now().Add(-time.Hour))}}
			return struct {
				facts        Facts
				level        Level
				about        string
				text, remedy string
			}{f, Problem, "pod shop/web", "FailedMount: new", "describe"}
		}(),
	} {
		t.Run(name, func(t *testing.T) {
			got := Judge(tt.facts)
			if len(got) != 1 {
				t.Fatalf("findings: %+v", got)
			}
			f := got[0]
			if f.Level != tt.level || f.About != tt.about || !strings.Contains(f.Text, tt.text) || !strings.Contains(f.Remedy, tt.remedy) || f.Check == "" {
				t.Errorf("got %+v", f)
			}
		})
	}
}

func TestNothingWrong(t *testing.T) {
	for name, f := range map[string]Facts{
		"member":   member(func(*datastore.Health) {}),
		"starting": pod(func(p *corev1.Pod) { p.CreationTimestamp = metav1.NewTime(now().Add(-time.Minute)) }),
		"ended":    pod(func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }),
		"runs":     pod(func(p *corev1.Pod) { p.Status.Phase = corev1.PodRunning }),
		"ends":     pod(func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: now()} }),
	} {
		if got := Judge(f); len(got) > 0 {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestSkew(t *testing.T) {
	asked, answered := now(), now().Add(time.Second)
	for shown, want := range map[time.Duration]time.Duration{0: 0, time.Second: 0, 500 * time.Millisecond: 0, 3 * time.Second: 2 * time.Second, -time.Second: -time.Second} {
		if got := skew(asked.Add(shown), asked, answered); got != want {
			t.Errorf("%s: %s", shown, got)
		}
	}
}

func TestQuestion(t *testing.T) {
	servers := map[string]authority.Server{
		"s1": {Address: "192.0.2.1:6443", PeerURL: "https://192.0.2.1:2380", Etcd: true, ControlPlane: true},
		"s2": {Address: "192.0.2.2:6443", PeerURL: "https://192.0.2.2:2380", Etcd: true, ControlPlane: true},
		"s3": {Address: "192.0.2.3:6443", ControlPlane: true},
	}
	var nodes []corev1.Node
	for i, name := range []string{"a1", "s1", "s2", "s3"} {
		n := corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
		n.Spec.PodCIDRs = []string{"10.42." + string(rune('0'+i)) + ".0/24"}
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: name}, {Type: corev1.NodeInternalIP, Address: "192.0.2." + string(rune('0'+i))}}
		nodes = append(nodes, n)
	}
	settings := config.Cluster{ClusterDNS: netip.MustParseAddr("10.43.0.10"), FlannelBackend: config.FlannelVXLAN, ServiceCIDR: config.Prefixes{netip.MustParsePrefix("10.43.0.0/16")}}
	for name, want := range map[string]string{
		"a1": "s1 tcp 192.0.2.1:6443, s2 tcp 192.0.2.2:6443, s3 tcp 192.0.2.3:6443, s1 overlay 10.42.1.0:0, s2 overlay 10.42.2.0:0, s3 overlay 10.42.3.0:0",
		"s1": "s2 tcp 192.0.2.2:6443, s2 tcp 192.0.2.2:2380, s3 tcp 192.0.2.3:6443, a1 tcp 192.0.2.0:10250, a1 overlay 10.42.0.0:0, s2 tcp 192.0.2.2:10250, s2 overlay 10.42.2.0:0, s3 tcp 192.0.2.3:10250, s3 overlay 10.42.3.0:0",
		"s3": "s1 tcp 192.0.2.1:6443, s1 tcp 192.0.2.1:2379, s2 tcp 192.0.2.2:6443, s2 tcp 192.0.2.2:2379, a1 tcp 192.0.2.0:10250, a1 overlay 10.42.0.0:0, s1 tcp 192.0.2.1:10250, s1 overlay 10.42.1.0:0, s2 tcp 192.0.2.2:10250, s2 overlay 10.42.2.0:0",
	} {
		q := question(name, nodes, servers, settings)
		var got []string
		for _, p := range q.Paths {
			got = append(got, p.Peer+" "+string(p.Protocol)+" "+p.Address.String())
		}
		if s := strings.Join(got, ", "); s != want {
			t.Errorf("%s:\ngot  %s\nwant %s", name, s, want)
		}
		if !slices.Equal(q.Services, []netip.Addr{netip.MustParseAddr("10.43.0.1")}) || q.DNS != settings.ClusterDNS {
			t.Errorf("%s: %v, %v", name, q.Services, q.DNS)
		}
	}
}

const key = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE\n-----END EC PRIVATE KEY-----"

func TestRedact(t *testing.T) {
	for text, want := range map[string]string{
		"before " + key + " after":                     "before (removed) after",
		"cut off: -----BEGIN PRIVATE KEY-----\nMHcC":   "cut off: (removed)",
		"joined with abcdef.0123456789abcdef today":    "joined with (removed) today",
		"Authorization: Bearer abcdefghijklmnop":       "Authorization: (removed)",
		"https://user:secret@registry/x":               "https" + removed + "registry/x",
		`"password": "hunter22", "a": 1`:               `"password": "(removed)", "a": 1`,
		"token: hellokedge-2026\nnode: n1":             "token: (removed)\nnode: n1",
		"age AGE-SECRET-KEY-1QQQ":                      "age (removed)",
		"eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJrdWIifQ.c2ln": "(removed)",
		"nothing v1.37.2 10.42.0.0/16 sha256:abcdef":   "nothing v1.37.2 10.42.0.0/16 sha256:abcdef",
	} {
		if got := Redact(text); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func TestBundle(t *testing.T) {
	f := pod(func(p *corev1.Pod) {
		p.Annotations = map[string]string{corev1.LastAppliedConfigAnnotation: "env hunter22"}
		p.Spec.Containers = []corev1.Container{{Args: []string{"--pw=hunter22"}, Env: []corev1.EnvVar{{Name: "X", Value: "hunter22"}}}}
	})
	f.Reports = map[string]*NodeReport{"n1": {Node: "n1", Log: "the key\n" + key + "\nend"}}
	var b bytes.Buffer
	if err := (Bundle{Facts: f, Findings: Judge(f)}).Write(&b); err != nil {
		t.Fatal(err)
	}
	z, err := zstd.NewReader(&b)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	var names []string
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
		if bytes.Contains(data, []byte("hunter22")) || bytes.Contains(data, []byte("MHcC")) {
			t.Errorf("%s has a secret: %s", h.Name, data)
		}
	}
	const dir = "kedge-doctor-20261128-120000/"
	for _, want := range []string{"findings.json", "pods.json", "node-n1.json", "node-n1.log"} {
		if !slices.Contains(names, dir+want) {
			t.Errorf("%s is missing in %v", want, names)
		}
	}
	if f.Pods[0].Spec.Containers[0].Env[0].Value != "hunter22" {
		t.Error("the facts themselves were changed")
	}
}
