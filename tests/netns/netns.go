// SPDX-License-Identifier: Apache-2.0

// Package netns gives tests network namespaces: one for the tests of a package, which is "the node", and others that are pods or machines.
package netns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNode is in the environment of the process that is the node.
const inNode = "KEDGE_TEST_NODE"

// Main runs the tests of a package once more, in a process with a network namespace of its own, if it may:
//
//	func TestMain(m *testing.M) { os.Exit(netns.Main(m)) }
//
// nft and the like are found where this host has them, or else among the built assets of the module.
func Main(m *testing.M) int {
	Programs()
	if os.Getuid() != 0 || os.Getenv(inNode) != "" {
		return m.Run()
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inNode+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	// The signal comes when the thread ends that started the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return max(exit.ExitCode(), 1)
	} else if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// Programs makes nft, iptables and so on known to this process.
func Programs() {
	for _, dir := range []string{"/usr/sbin", filepath.Join(module(), "build", runtime.GOARCH, "userland")} {
		os.Setenv("PATH", os.Getenv("PATH")+":"+dir)
	}
}

// module is the directory with go.mod above the working directory.
func module() string {
	dir, err := os.Getwd()
	for ; err == nil && dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
	}
	return "."
}

// NeedNode skips a test unless it runs in a process of [Main] and nft is there. The node's loopback device is up then, and it forwards.
func NeedNode(t testing.TB) {
	t.Helper()
	if os.Getenv(inNode) == "" {
		t.Skip("needs root, for network namespaces")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft")
	}
	for _, f := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		must(t, os.WriteFile("/proc/sys/net/"+f, []byte("1"), 0))
	}
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.LinkSetUp(lo))
}

// Space is a network namespace: a pod's or another machine's. A nil one is the node.
type Space struct{ ns *os.File }

// New makes one that ends with the test.
func New(t testing.TB) *Space {
	t.Helper()
	s := &Space{}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocks: the thread ends with its namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			s.ns, err = os.Open("/proc/thread-self/ns/net")
		}
		made <- err
	}()
	must(t, <-made)
	t.Cleanup(func() { s.ns.Close() })
	return s
}

// Do runs f inside. Sockets that it makes stay there.
func (s *Space) Do(f func() error) error {
	if s == nil {
		return f()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocks
		err := unix.Setns(int(s.ns.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// Cable connects the node's interface name, which it makes, with eth0 in s. It goes when the test ends.
func (s *Space) Cable(t testing.TB, name string) *netlink.Veth {
	t.Helper()
	cable := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(s.ns.Fd()))}
	must(t, netlink.LinkAdd(cable))
	t.Cleanup(func() { _ = netlink.LinkDel(cable) })
	return cable
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
