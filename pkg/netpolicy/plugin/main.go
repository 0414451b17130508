// SPDX-License-Identifier: Apache-2.0

// Command kedge-policy is the first and the last CNI plugin of a pod's network. As the last it lets a pod start when the rules for its
// addresses are loaded, and fails when nobody can say that they are. Where there is IPv6 it has, before and behind the plugin that makes
// the pod's devices, the kernel use their addresses at once.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/kedge-io/kedge/pkg/netpolicy/announce"
)

// config is the plugin's part of the conflist.
type config struct {
	types.PluginConf
	Socket string `json:"socket"` // of the node process; empty: no policies
	Dir    string `json:"dir"`    // with its announcements
	IPv6   bool   `json:"ipv6"`   // pods have IPv6 addresses
}

// podArgs are what containerd says about the pod.
type podArgs struct {
	types.CommonArgs
	K8S_POD_NAMESPACE types.UnmarshallableString //nolint:revive // the name is the argument's
	K8S_POD_NAME      types.UnmarshallableString //nolint:revive
	K8S_POD_UID       types.UnmarshallableString //nolint:revive
}

func main() {
	skel.PluginMainFuncs(skel.CNIFuncs{
		Add:    add,
		Check:  check,
		Del:    del,
		GC:     func(*skel.CmdArgs) error { return nil },
		Status: func(*skel.CmdArgs) error { return nil },
	}, version.All, "kedge-policy: network policies of Kedge")
}

func add(args *skel.CmdArgs) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	if conf.first() {
		if err := skipInPod(args.Netns); err != nil {
			return err
		}
		return types.PrintResult(&current.Result{CNIVersion: conf.CNIVersion}, conf.CNIVersion)
	}
	result, err := conf.result()
	if err != nil {
		return err
	}
	if conf.IPv6 {
		if err := skipOnNode(result); err != nil {
			return err
		}
	}
	if conf.Socket != "" {
		pod, err := podOf(args, result)
		if err != nil {
			return err
		}
		if err := announce.Add(conf.Socket, pod); err != nil {
			return err
		}
	}
	return types.PrintResult(conf.PrevResult, conf.CNIVersion)
}

func check(args *skel.CmdArgs) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil || conf.Socket == "" {
		return err
	}
	result, err := conf.result()
	if err != nil {
		return err
	}
	pod, err := podOf(args, result)
	if err != nil {
		return err
	}
	return announce.Check(conf.Socket, pod)
}

func del(args *skel.CmdArgs) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil || conf.Socket == "" {
		return err
	}
	return announce.Release(conf.Socket, conf.Dir, args.ContainerID)
}

func parseConfig(text []byte) (*config, error) {
	conf := &config{}
	if err := json.Unmarshal(text, conf); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	if (conf.Socket == "") != (conf.Dir == "") || conf.Socket == "" && !conf.IPv6 {
		return nil, errors.New("configuration: socket and dir, or ipv6, are needed")
	}
	return conf, nil
}

// first says that the pod has no device yet.
func (c *config) first() bool { return c.Socket == "" && c.RawPrevResult == nil }

// result is that of the plugins before this one.
func (c *config) result() (*current.Result, error) {
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return nil, err
	}
	if c.PrevResult == nil {
		return nil, errors.New("there is no result of a plugin before this one: it has to be the last of the list")
	}
	return current.NewResultFromResult(c.PrevResult)
}

// podOf is the pod with the addresses that it was given.
func podOf(args *skel.CmdArgs, result *current.Result) (announce.Pod, error) {
	pod := announce.Pod{Container: args.ContainerID}
	for _, ip := range result.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			pod.Addresses = append(pod.Addresses, a.Unmap())
		}
	}
	names := podArgs{}
	if err := types.LoadArgs(args.Args, &names); err != nil {
		return pod, fmt.Errorf("CNI_ARGS: %w", err)
	}
	pod.Namespace, pod.Name, pod.UID = string(names.K8S_POD_NAMESPACE), string(names.K8S_POD_NAME), string(names.K8S_POD_UID)
	return pod, pod.Validate()
}
