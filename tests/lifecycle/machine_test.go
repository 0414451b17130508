// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// TestFullDisk: a machine whose disk is full says so, and recovers when there is space again.
func TestFullDisk(t *testing.T) {
	s := start(t, cluster.Options{
		Machine: []testbed.Option{testbed.Disk("3G")},
		Flags:   []string{"--kubelet-arg", "eviction-pressure-transition-period=15s"}, // 5 minutes otherwise, which nobody wants to wait
	})
	runningPod(s, "web")
	if out, err := s.Shell(within(t, minute), "fallocate -l $(($(df --output=avail -B1 /var | tail -1) - 1048576)) /var/fill; dd if=/dev/zero of=/var/rest bs=64k 2>/dev/null; df -k /var"); err != nil {
		t.Fatalf("fill the disk: %v: %s", err, out)
	}
	s.EventuallyWithin(2*minute, "Kedge to say that the disk is full", func() error {
		st, err := s.Status(s.Within(10 * time.Second))
		if err != nil {
			return err
		}
		for _, p := range st.Processes {
			for _, c := range p.Components {
				if strings.Contains(c.Reason, "space") || strings.Contains(c.Reason, "disk") {
					return nil
				}
			}
		}
		if out, err := s.Server.Kubectl(s.Within(10*time.Second), "get", "node", s.Name(), "-o", `jsonpath={.status.conditions[?(@.type=="DiskPressure")].status}`); err == nil && out == "True" {
			return nil
		}
		return fmt.Errorf("neither the status nor the node's DiskPressure says it: %+v", st.Processes)
	})
	if _, err := s.Exec(within(t, minute), "rm", "-f", "/var/fill", "/var/rest"); err != nil {
		t.Fatal(err)
	}
	statusBecomes(s, "all to be ready", allReady)
	s.EventuallyWithin(3*minute, "a new pod to run", func() error { // DiskPressure ends with a delay
		_, _ = s.Try("delete", "pod", "web", "--ignore-not-found", "--force")
		if err := s.Server.Apply(s.Within(minute), s.NS, fmt.Sprintf(cluster.ServerPod, "web", "", "")); err != nil {
			return err
		}
		_, err := s.Try("wait", "--for=condition=Ready", "--timeout=20s", "pod/web")
		return err
	})
	mustWork(t, s, "web")
}

// TestResolvers: what the machine's resolv.conf says is no reason to fail, nor to ask oneself in circles.
func TestResolvers(t *testing.T) {
	server := prepare(t, cluster.Options{Files: map[string]string{"/etc/resolv.conf": "nameserver 127.0.0.1\nnameserver 127.0.0.53\n"}})
	var s *cluster.Session
	for _, resolvConf := range []string{"loopback", "none"} {
		t.Run(resolvConf, func(t *testing.T) {
			if resolvConf == "none" {
				if err := server.Stop(within(t, minute)); err != nil {
					t.Fatal(err)
				}
				if _, err := server.Exec(within(t, minute), "rm", "/etc/resolv.conf"); err != nil {
					t.Fatal(err)
				}
			}
			ctx := within(t, 2*minute)
			if err := errors.Join(server.Run(ctx), server.WaitReady(ctx)); err != nil {
				t.Fatal(err)
			}
			s = server.Session(t)
			s.Apply(cluster.ClientPod)
			s.Ready("client")
			if got := s.InPod("client", "nslookup kubernetes.default.svc.cluster.local"); !strings.Contains(got, "10.43.0.1") {
				t.Errorf("a cluster name: %s", got)
			}
			began := time.Now()
			got := s.InPod("client", "nslookup outside.example 2>&1 || true")
			if d := time.Since(began); d > 15*time.Second || strings.Contains(got, "Address: 1") {
				t.Errorf("an outside name, after %s: %s", d, got)
			}
			if got := s.InPod("client", "nslookup kubernetes.default.svc.cluster.local"); !strings.Contains(got, "10.43.0.1") {
				t.Errorf("a cluster name, afterwards: %s", got)
			}
		})
	}
}

const unit = `
[Unit]
Description=Kedge
[Service]
Type=notify
ExecStart=/usr/local/bin/kedge server
KillMode=process
Delegate=yes
Restart=always
WatchdogSec=10
TimeoutStartSec=120
[Install]
WantedBy=multi-user.target
`

// TestSystemd: the server tells systemd when it is ready, that it lives, and that it stops.
func TestSystemd(t *testing.T) {
	s := prepare(t, cluster.Options{Machine: []testbed.Option{testbed.Systemd()}, Files: map[string]string{"/etc/systemd/system/kedge.service": unit}})
	show := func(property string) string {
		t.Helper()
		out, err := s.Exec(within(t, minute), "systemctl", "show", "--value", "-p", property, "kedge")
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	eventually(t, "systemd", func() error {
		_, err := s.Exec(within(t, minute), "systemctl", "is-system-running")
		return err
	})
	if _, err := s.Exec(within(t, 3*minute), "systemctl", "enable", "--now", "kedge"); err != nil { // ends with READY=1
		t.Fatal(err)
	}
	var st *cluster.Status
	eventually(t, "all to be ready", func() error {
		var err error
		if st, err = s.Status(within(t, minute)); err != nil {
			return err
		}
		return allReady(st)
	})
	if got := show("StatusText"); got == "" {
		t.Error("the server tells systemd no status text")
	}
	session := s.Session(t)
	web := runningPod(session, "web")
	pid := show("MainPID")
	// Two and a half watchdog periods: without pings systemd would have restarted the server by then.
	time.Sleep(25 * time.Second)
	if now, restarts := show("MainPID"), show("NRestarts"); now != pid || restarts != "0" {
		t.Errorf("after %s: pid %s, was %s, %s restarts", 25*time.Second, now, pid, restarts)
	}
	began := time.Now()
	if _, err := s.Exec(within(t, minute), "systemctl", "stop", "kedge"); err != nil {
		t.Error(err)
	}
	if d := time.Since(began); d > 15*time.Second {
		t.Errorf("systemctl stop took %s", d)
	}
	if got := show("Result"); got != "success" {
		t.Errorf("the unit ended with %s", got)
	}
	if err := web.answers(within(t, minute)); err != nil {
		t.Errorf("the pod, while the unit is stopped: %v", err)
	}
	if _, err := s.Exec(within(t, 3*minute), "systemctl", "start", "kedge"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pod to be taken over", web.untouched)
	// A supervisor that hangs is replaced.
	pid = show("MainPID")
	if _, err := s.Exec(within(t, minute), "kill", "-STOP", pid); err != nil {
		t.Fatal(err)
	}
	eventually(t, "systemd to replace a server that hangs", func() error {
		if now := show("MainPID"); now == pid || now == "0" {
			return fmt.Errorf("pid %s", now)
		}
		return nil
	})
	eventually(t, "the pod to be taken over", web.untouched)
}

func eventually(t *testing.T, what string, cond func() error) {
	t.Helper()
	if err := testbed.Wait(within(t, 2*minute), what, func(context.Context) error { return cond() }); err != nil {
		t.Fatal(err)
	}
}

func TestRefusals(t *testing.T) {
	s := prepare(t, cluster.Options{})
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"unknown flag":  {[]string{"--node-nam", "x"}, "node-name"},
		"bad value":     {[]string{"--cluster-cidr", "10.42.0.0"}, "cluster-cidr"},
		"bad node name": {[]string{"--node-name", "UPPER_case"}, "node-name"},
		"bad proxy":     {[]string{"--proxy-mode", "magic"}, "ipvs"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := s.Exec(within(t, 30*time.Second), append([]string{cluster.Program, "server"}, c.args...)...)
			var exit *testbed.ExitError
			if !errors.As(err, &exit) || !strings.Contains(exit.Stderr+exit.Stdout, c.want) {
				t.Errorf("%v; want an error with %q", err, c.want)
			}
			if out, err := s.Shell(within(t, minute), "ls -A /var/lib/kedge | grep -vx images; ls -A /run/kedge"); err == nil || strings.TrimSpace(out) != "" {
				t.Errorf("something was written before the refusal: %s", out)
			}
		})
	}
}
