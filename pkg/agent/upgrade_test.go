// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net/url"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kedge-io/kedge/pkg/release"
)

// What an administrator's kedge asks for is what the machine reads.
func TestUpgradeRequest(t *testing.T) {
	for _, r := range []UpgradeRequest{
		{},
		{Check: true, Force: true, Cluster: true, Signer: "0123", Info: release.Info{Version: "v1.37.2+kedge2", Arch: "arm64", Size: 1 << 28}},
		{Back: true, Timeout: 90 * time.Second, SHA256: "ab"},
	} {
		got, err := parseUpgradeRequest(r.Values())
		if diff := cmp.Diff(r, got); err != nil || diff != "" {
			t.Errorf("%v (-want +got)\n%s", err, diff)
		}
	}
}

func FuzzParseUpgradeRequest(f *testing.F) {
	f.Add("check=true&back=false&timeout=5m0s&size=1&version=v1")
	f.Add("check=maybe")
	f.Add("timeout=1&size=x")
	f.Fuzz(func(t *testing.T, query string) {
		v, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		r, err := parseUpgradeRequest(v)
		if err != nil {
			return
		}
		again, err := parseUpgradeRequest(r.Values())
		if diff := cmp.Diff(r, again); err != nil || diff != "" {
			t.Errorf("%v (-first +again)\n%s", err, diff)
		}
	})
}
