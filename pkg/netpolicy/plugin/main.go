// SPDX-License-Identifier: Apache-2.0

// Command kedge-policy is the last CNI plugin of a pod's network. It lets a pod start when the rules for its addresses are loaded, and
// fails when nobody can say that they are.
package main

import (
	"encoding/json"
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
	Socket string `json:"socket"` // of the node process
	Dir    string `json:"dir"`    // with its announcements
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
	conf, pod, err := parse(args)
	if err != nil {
		return err
	}
	if err := announce.Add(conf.Socket, pod); err != nil {
		return err
	}
	return types.PrintResult(conf.PrevResult, conf.CNIVersion)
}

func check(args *skel.CmdArgs) error {
	conf, pod, err := parse(args)
	if err != nil {
		return err
	}
	return announce.Check(conf.Socket, pod)
}

func del(args *skel.CmdArgs) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	return announce.Release(conf.Socket, conf.Dir, args.ContainerID)
}

func parseConfig(text []byte) (*config, error) {
	conf := &config{}
	if err := json.Unmarshal(text, conf); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	if conf.Socket == "" || conf.Dir == "" {
		return nil, fmt.Errorf("configuration: socket and dir are needed")
	}
	return conf, nil
}

// parse gives the configuration with the result of the plugins before this one, and the pod with the addresses that they gave it.
func parse(args *skel.CmdArgs) (*config, announce.Pod, error) {
	pod := announce.Pod{Container: args.ContainerID}
	conf, err := parseConfig(args.StdinData)
	if err != nil {
		return nil, pod, err
	}
	if err := version.ParsePrevResult(&conf.PluginConf); err != nil {
		return nil, pod, err
	}
	if conf.PrevResult == nil {
		return nil, pod, fmt.Errorf("there is no result of a plugin before this one: it has to be the last of the list")
	}
	result, err := current.NewResultFromResult(conf.PrevResult)
	if err != nil {
		return nil, pod, err
	}
	for _, ip := range result.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			pod.Addresses = append(pod.Addresses, a.Unmap())
		}
	}
	names := podArgs{}
	if err := types.LoadArgs(args.Args, &names); err != nil {
		return nil, pod, fmt.Errorf("CNI_ARGS: %w", err)
	}
	pod.Namespace, pod.Name, pod.UID = string(names.K8S_POD_NAMESPACE), string(names.K8S_POD_NAME), string(names.K8S_POD_UID)
	return conf, pod, pod.Validate()
}
