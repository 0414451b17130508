// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Duplicate address detection takes an IPv6 address out of use for one to two seconds, first the pod's, for which ptp waits, then its
// gateway's on the node, during which the pod reaches nobody. The addresses of pods are handed out by the node and cannot be
// there twice, and the gateway's is meant to be on the devices of all pods.

// skipInPod switches the detection off for devices that are going to be made in a pod's network namespace. A kernel without IPv6 has no
// such setting.
func skipInPod(netns string) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // until the process ends: the thread is in the pod's namespace
		result <- inNamespace(netns, func() error {
			err := os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0)
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			return err
		})
	}()
	if err := <-result; err != nil {
		return fmt.Errorf("switch duplicate address detection off in the pod's network: %w", err)
	}
	return nil
}

func inNamespace(file string, f func() error) error {
	ns, err := os.Open(file)
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return err
	}
	return f()
}

// skipOnNode sets the IPv6 gateways on the pod's device of the node anew, without the detection.
func skipOnNode(result *current.Result) error {
	for _, i := range result.Interfaces {
		if i.Sandbox != "" {
			continue
		}
		link, err := netlink.LinkByName(i.Name)
		if err != nil {
			return fmt.Errorf("the pod's device %s: %w", i.Name, err)
		}
		for _, ip := range result.IPs {
			if ip.Gateway == nil || ip.Gateway.To4() != nil {
				continue
			}
			a := &netlink.Addr{IPNet: &net.IPNet{IP: ip.Gateway, Mask: net.CIDRMask(128, 128)}}
			err := netlink.AddrDel(link, a)
			if errors.Is(err, unix.EADDRNOTAVAIL) {
				continue // a device of another plugin: the one that shapes traffic has one
			}
			a.Flags = unix.IFA_F_NODAD
			if err := errors.Join(err, netlink.AddrAdd(link, a)); err != nil {
				return fmt.Errorf("the gateway %s on the pod's device %s: %w", ip.Gateway, i.Name, err)
			}
		}
	}
	return nil
}
