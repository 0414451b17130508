// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/json"
	"net/netip"
	"testing"

	"github.com/flannel-io/flannel/pkg/lease"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/cache"

	"github.com/kedge-io/kedge/pkg/config"
)

func dualConfig() Config {
	cfg := testConfig()
	cfg.ClusterCIDR = config.Prefixes{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd42::/56")}
	return cfg
}

func leased(name, v4, v6, address, address6 string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{
			flannelManaged: "true", flannelType: "vxlan", flannelAddress: address, flannelAddressV6: address6,
			flannelData: `{"VNI":1,"VtepMAC":"92:b8:1d:32:c0:81"}`, flannelDataV6: `{"VNI":1,"VtepMAC":"12:ee:15:07:78:b9"}`,
		}},
		Spec: corev1.NodeSpec{PodCIDR: v4, PodCIDRs: []string{v4, v6}},
	}
}

func testLeases(nodes ...*corev1.Node) *leases {
	store := cache.NewStore(cache.MetaNamespaceKeyFunc)
	for _, n := range nodes {
		_ = store.Add(n) // has a key
	}
	return &leases{node: nodes[0], nodes: store, conf: flannelConfig(dualConfig())}
}

// TestChanges has every difference told once, what goes before what comes.
func TestChanges(t *testing.T) {
	own := leased("own", "10.42.0.0/24", "fd42::/64", "192.0.2.1", "2001:db8::1")
	a := leased("a", "10.42.1.0/24", "fd42:0:0:1::/64", "192.0.2.2", "2001:db8::2")
	moved := leased("a", "10.42.1.0/24", "fd42:0:0:1::/64", "192.0.2.9", "2001:db8::2") // of two addresses one has changed
	heir := leased("b", "10.42.1.0/24", "fd42:0:0:1::/64", "192.0.2.3", "2001:db8::3")
	half := leased("c", "10.42.2.0/24", "fd42:0:0:2::/64", "192.0.2.4", "")
	for _, test := range []struct {
		name     string
		was, are []*corev1.Node
		want     string
	}{
		{"nothing", nil, nil, ""},
		{"one comes", nil, []*corev1.Node{a}, "+192.0.2.2"},
		{"one stays", []*corev1.Node{a}, []*corev1.Node{a}, ""},
		{"one goes", []*corev1.Node{a}, nil, "-192.0.2.2"},
		{"another address", []*corev1.Node{a}, []*corev1.Node{moved}, "-192.0.2.2 +192.0.2.9"},
		{"its network is another's", []*corev1.Node{a}, []*corev1.Node{heir}, "-192.0.2.2 +192.0.2.3"},
		{"not there in both families yet", nil, []*corev1.Node{half}, ""},
	} {
		got := ""
		events := changes(testLeases(append([]*corev1.Node{own}, test.was...)...).others(), testLeases(append([]*corev1.Node{own}, test.are...)...).others())
		for _, e := range events {
			if got != "" {
				got += " "
			}
			got += map[lease.EventType]string{lease.EventAdded: "+", lease.EventRemoved: "-"}[e.Type] + e.Lease.Attrs.PublicIP.String()
		}
		if got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

// TestAcquireLease checks what other nodes, also those with another make of flannel, read.
func TestAcquireLease(t *testing.T) {
	node := leased("own", "10.42.0.0/24", "fd42::/64", "192.0.2.1", "")
	node.Annotations[flannelOverride] = "203.0.113.8"
	l := testLeases(node)
	client := fake.NewClientset(node)
	l.client = client
	for _, test := range []struct {
		public         []netip.Addr
		want4, want6   string
		returned4, mac string
	}{
		{nil, "203.0.113.8", "2001:db8::1", "203.0.113.8", "92:b8:1d:32:c0:81"},
		{[]netip.Addr{netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("2001:db8:9::7")}, "203.0.113.7", "2001:db8:9::7", "203.0.113.7", "92:b8:1d:32:c0:81"},
	} {
		l.public = test.public
		attrs, err := l.of(leased("own", "10.42.0.0/24", "fd42::/64", "192.0.2.1", "2001:db8::1"))
		if err != nil {
			t.Fatal(err)
		}
		own, err := l.AcquireLease(t.Context(), &attrs.Attrs)
		if err != nil {
			t.Fatal(err)
		}
		got, err := client.CoreV1().Nodes().Get(t.Context(), "own", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		a := got.Annotations
		if a[flannelAddress] != test.want4 || a[flannelAddressV6] != test.want6 || vtepMAC([]byte(a[flannelData])) != test.mac || a[flannelManaged] != "true" {
			t.Errorf("with %v the Node has %v", test.public, a)
		}
		if own.Attrs.PublicIP.String() != test.returned4 || own.Subnet.String() != "10.42.0.0/24" || own.IPv6Subnet.String() != "fd42::/64" {
			t.Errorf("lease %+v", own)
		}
	}
}

// FuzzVTEP reads what other nodes have written.
func FuzzVTEP(f *testing.F) {
	f.Add([]byte(`{"VNI":1,"VtepMAC":"92:b8:1d:32:c0:81"}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if mac := vtepMAC(data); mac != "" && !json.Valid(data) {
			t.Errorf("%q out of %q", mac, data)
		}
	})
}
