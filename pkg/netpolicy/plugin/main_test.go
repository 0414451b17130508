// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/kedge-io/kedge/pkg/netpolicy/announce"
)

func TestParse(t *testing.T) {
	const (
		good = `{"cniVersion":"1.0.0","name":"kedge","type":"kedge-policy","socket":"/s","dir":"/d",
			"prevResult":{"cniVersion":"1.0.0","ips":[{"address":"10.42.0.2/24"},{"address":"fd00::2/64"}]}}`
		args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=p;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=u"
	)
	parse := func(a *skel.CmdArgs) (conf *config, pod announce.Pod, err error) {
		if conf, err = parseConfig(a.StdinData); err == nil {
			var result *current.Result
			if result, err = conf.result(); err == nil {
				pod, err = podOf(a, result)
			}
		}
		return conf, pod, err
	}
	conf, pod, err := parse(&skel.CmdArgs{ContainerID: "c", StdinData: []byte(good), Args: args})
	if err != nil {
		t.Fatal(err)
	}
	if conf.first() {
		t.Error("it is taken for the first plugin")
	}
	if got := fmt.Sprint(conf.Socket, conf.Dir, pod); got != "/s/d{c a p u [10.42.0.2 fd00::2]}" {
		t.Error(got)
	}
	for name, a := range map[string]skel.CmdArgs{
		"not JSON":  {ContainerID: "c", StdinData: []byte("{"), Args: args},
		"no dir":    {ContainerID: "c", StdinData: []byte(`{"cniVersion":"1.0.0","socket":"/s"}`), Args: args},
		"nothing":   {ContainerID: "c", StdinData: []byte(`{"cniVersion":"1.0.0"}`), Args: args},
		"no socket": {ContainerID: "c", StdinData: []byte(`{"cniVersion":"1.0.0","dir":"/d"}`), Args: args},
		"first":     {ContainerID: "c", StdinData: []byte(`{"cniVersion":"1.0.0","socket":"/s","dir":"/d"}`), Args: args},
		"no pod":    {ContainerID: "c", StdinData: []byte(good)},
		"no ID":     {StdinData: []byte(good), Args: args},
	} {
		if _, _, err := parse(&a); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestFirst(t *testing.T) {
	conf, err := parseConfig([]byte(`{"cniVersion":"1.0.0","name":"kedge","type":"kedge-policy","ipv6":true}`))
	if err != nil || !conf.first() {
		t.Errorf("%+v, %v", conf, err)
	}
	if err := skipInPod("/proc/self/ns/mnt"); err == nil {
		t.Error("a namespace of another kind: no error")
	}
}
